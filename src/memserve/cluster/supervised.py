"""A supervised process: starts it again when it crashes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence

from memserve.api.control import RESTART_EXIT_CODE
from memserve.api.serving import Shutdown
from memserve.cluster.backend import Place
from memserve.cluster.child import Child, end_children
from memserve.cluster.restarts import Restarts
from memserve.errors import ClusterError
from memserve.models.resolve import Progress
from memserve.pool.segment import sweep

# After a second SIGTERM a process does not wait for requests; KILL_SECONDS later it is killed.
KILL_SECONDS = 5.0


class Supervised:
    """Supervises one child process; a `Kept`. The creator must end the present `child` in any
    case, as `stop` does."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        restarts: Restarts,
        progress: Progress,
        module: str,
        needed: Callable[[], bool] | None = None,
        environment: Mapping[str, str] | None = None,
        more_arguments: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """`module`: run by Python with `arguments`, and then those of `more_arguments`, asked at
        each start. `environment`: variables in addition to this process's. `needed`: while it
        returns True, the process is not given up, however often it crashes, because others are
        useless without it."""
        self.name = name
        self._arguments = arguments
        self._restarts = restarts
        self._progress = progress
        self._module = module
        self._environment = environment
        self._more_arguments = more_arguments
        self._needed = needed or (lambda: False)
        self.crashes = 0  # since the first start
        self._stopped = asyncio.Event()  # it is not started again
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
        """Whether the process runs now; False in the pause before a restart."""
        return self._child is not None and not self._child.ended.done()

    @property
    def place(self) -> Place | None:
        return None if self._child is None else Place(os.uname().nodename, self._child.pid)

    async def start(self) -> None:
        arguments = [*self._arguments, *self._more_arguments()]
        self._child = await Child.spawn(self.name, arguments, self._module, self._environment)
        if self._show is not None:
            self._child.show_output(self._show)

    def show_output(self, show: Callable[[str], None]) -> None:
        """Call `show` with the lines that this process and its restarts print."""
        self._show = show
        self.child.show_output(show)

    async def address(self) -> str:
        return await self.child.address()

    async def failure(self) -> ClusterError:
        # Shielded, because other tasks wait for `ended`, too.
        await asyncio.shield(self.child.ended)
        return await self.child.failure()

    def reload(self) -> None:
        if self._child is not None:
            self._child.reload()

    async def stop(self, shutdown: Shutdown, seconds: float) -> None:
        self._stopped.set()
        if self._child is not None:
            await end_children([self._child], shutdown, seconds, KILL_SECONDS)

    async def keep(self) -> None:
        """Start the process again whenever it ends, until it ends in order, with exit code 0, or
        is stopped.

        Raises ClusterError, with its last lines, if it has crashed too often.
        """
        while (code := await asyncio.shield(self.child.ended)) != 0 and not self._stopped.is_set():
            sweep()  # the dead process's shared memory; that of living processes stays
            if code == RESTART_EXIT_CODE:
                self._progress(f"{self.name} ended to be started again")
            else:
                await asyncio.sleep(await self._pause())
            if self._stopped.is_set():  # in the pause
                break
            await self.start()
        self._progress(f"{self.name} has ended, as it was asked to")

    async def _pause(self) -> float:
        """Count a crash and return the seconds until the next start. Raises ClusterError if the
        process is given up."""
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
        # Show the last lines here if its output is not shown.
        how, _, said = str(failure).partition("\n")
        end = f"\n{said}" if said and self._show is None else ""
        self._progress(f"{how.removesuffix(':')}; starting it again in {pause:g} s{end}")
        return pause
