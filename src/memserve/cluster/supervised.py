"""A process with several lives: it is started again when it crashes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from memserve.api.control import RESTART_EXIT_CODE
from memserve.cluster.child import Child
from memserve.cluster.restarts import Restarts
from memserve.errors import ClusterError
from memserve.models.resolve import Progress
from memserve.pool.segment import sweep


class Supervised:
    """Owns the present `child`. Whoever made it must end that, whatever happens."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        restarts: Restarts,
        progress: Progress,
        module: str,
    ) -> None:
        """`module` is what Python runs, with `arguments`."""
        self.name = name
        self._arguments = arguments
        self._restarts = restarts
        self._progress = progress
        self._module = module
        self._show: Callable[[str], None] | None = None
        self._child: Child | None = None

    @property
    def child(self) -> Child:
        assert self._child is not None  # `start` has returned
        return self._child

    @property
    def started(self) -> bool:
        return self._child is not None

    async def start(self) -> None:
        self._child = await Child.spawn(self.name, self._arguments, self._module)
        if self._show is not None:
            self._child.show_output(self._show)

    def show_output(self, show: Callable[[str], None]) -> None:
        """Hand over what this life and the next ones print."""
        self._show = show
        self.child.show_output(show)

    async def keep(self) -> None:
        """Start it again until it ends in order: with exit code 0.

        Raises ClusterError, with its last lines, when it has crashed too often.
        """
        # Shielded: giving up watching must not end what others wait for too.
        while (code := await asyncio.shield(self.child.ended)) != 0:
            sweep()  # what was its shared memory; that of living processes stays
            pause = 0.0
            if code == RESTART_EXIT_CODE:
                self._progress(f"{self.name} ended to be started again")
            else:
                failure = await self.child.failure(whole=True)
                next_pause = self._restarts.crashed()
                if next_pause is None:
                    raise ClusterError(f"{self.name} crashed too often and is given up; {failure}")
                pause = next_pause
                how = str(failure).partition("\n")[0].removesuffix(":")
                self._progress(f"{how}; starting it again in {pause:g} s")
            await asyncio.sleep(pause)
            await self.start()
        self._progress(f"{self.name} has ended, as it was asked to")
