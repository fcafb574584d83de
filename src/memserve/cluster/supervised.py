"""A process with several lives: it is started again when it crashes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

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
        needed: Callable[[], bool] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`module` is what Python runs, with `arguments` and, besides ours, `environment`. As
        long as it is `needed`, it is never given up, however often it crashes: others are of no
        use without it."""
        self.name = name
        self._arguments = arguments
        self._restarts = restarts
        self._progress = progress
        self._module = module
        self._environment = environment
        self._needed = needed or (lambda: False)
        self.crashes = 0  # in all of its lives
        self._show: Callable[[str], None] | None = None
        self._child: Child | None = None

    @property
    def child(self) -> Child:
        assert self._child is not None  # `start` has returned
        return self._child

    @property
    def started(self) -> bool:
        return self._child is not None

    @property
    def alive(self) -> bool:
        """Whether it runs now. One between two lives does not."""
        return self._child is not None and not self._child.ended.done()

    async def start(self) -> None:
        self._child = await Child.spawn(self.name, self._arguments, self._module, self._environment)
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
            if code == RESTART_EXIT_CODE:
                self._progress(f"{self.name} ended to be started again")
            else:
                await asyncio.sleep(await self._pause())
            await self.start()
        self._progress(f"{self.name} has ended, as it was asked to")

    async def _pause(self) -> float:
        """After a crash: seconds until the next start. Raises ClusterError for no more."""
        self.crashes += 1
        failure = await self.child.failure(whole=True)
        pause = self._restarts.crashed()
        if pause is None and self._needed():
            pause = self._restarts.longest_pause
            self._progress(
                f"{self.name} has crashed {self.crashes} times and is tried again, since others "
                "are of use only with it"
            )
        if pause is None:
            raise ClusterError(f"{self.name} crashed too often and is given up; {failure}")
        # While nobody sees what it prints, the reason is told here.
        how, _, said = str(failure).partition("\n")
        end = f"\n{said}" if said and self._show is None else ""
        self._progress(f"{how.removesuffix(':')}; starting it again in {pause:g} s{end}")
        return pause
