"""One actor's process, as the process that started or found the actor sees it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import ray
import ray.exceptions
import ray.util
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from memserve.api.serving import Shutdown
from memserve.cluster.backend import Launch, Place
from memserve.errors import ClusterError
from memserve.models.resolve import Progress
from memserve.ray.connection import first_line, node_resources
from memserve.ray.member import Member
from memserve.ray.order import Order, Report, amounts, decode_report, encode, missing, needs

# An actor answers a long poll after POLL_SECONDS at the latest. Calls to an actor on a lost node do
# not fail by themselves: after ANSWER_SECONDS more it counts as lost.
POLL_SECONDS = 5.0
ANSWER_SECONDS = 5.0
RETRY_SECONDS = 0.5
# After the time that its process has to end, an actor has this long: `supervised.KILL_SECONDS`,
# and for the answer.
END_SECONDS = 10.0
GONE_SECONDS = 10.0  # a killed actor's name is free within this
GONE_POLL_SECONDS = 0.1
_TAIL_LINES = 30  # that are not shown, for errors
_CALLS = 64  # at once, to one actor: long polls of several commands, and others beside them


class RayKept:
    """A `Kept` whose process belongs to an actor, which Ray starts again when it is lost.

    It finds the actor of this name if there is one, and else makes it. `crashes` counts those of
    the process that this side has heard of, and losses of the actor.
    """

    def __init__(self, launch: Launch, order: Order, progress: Progress, detached: bool) -> None:
        self.name = launch.name
        self.crashes = 0
        self._needs = needs(launch)
        self._order = order
        self._progress = progress
        self._detached = detached
        self._actor: Any = None
        self._before = False  # the actor was there before, and has not reported here
        self._report: Report | None = None  # the last one; None while the actor is lost
        self._ended: str | None = None
        self._lost = False  # it has reported, and does not any more
        self._waits = False  # it has been said that Ray looks for a node
        self._why = ""  # it last ended
        self._unshown: deque[str] = deque(maxlen=_TAIL_LINES)
        self._show: Callable[[str], None] | None = None
        self._changed = asyncio.Condition()
        self._following: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return "" if self._report is None else self._report.url

    @property
    def is_gateway(self) -> bool:
        return self._order.is_gateway

    @property
    def place(self) -> Place | None:
        if self._report is None or self._report.pid is None:
            return None
        return Place(self._report.node, self._report.pid)

    @property
    def alive(self) -> bool:
        return self._report is not None and self._report.alive

    async def start(self) -> None:
        """Find the actor, or have Ray start one. Ray waits until a node has room for it."""
        try:
            self._actor = await asyncio.to_thread(self._found)
            self._before = self._actor is not None
            if self._actor is None:
                self._actor = await asyncio.to_thread(self._made)
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"{self.name}: Ray refuses its actor: {first_line(error)}"
            ) from error
        self._following = asyncio.ensure_future(self._follow())

    async def address(self) -> str:
        await self._until(lambda: self.url != "" or self._ended is not None)
        if self._ended is not None:
            raise self._failed()
        return self.url

    async def failure(self) -> ClusterError:
        before = self.crashes
        await self._until(lambda: self.crashes > before or self._ended is not None)
        return self._failed()

    async def keep(self) -> None:
        await self._until(lambda: self._ended is not None)
        if self._ended:
            raise self._failed()
        await self._remove()

    async def stop(self, shutdown: Shutdown, seconds: float) -> None:
        if self._actor is None:
            return
        await self._wait_for_news(ANSWER_SECONDS)
        if self._report is not None:
            ending = self._call(self._actor.stop.remote(seconds), seconds + END_SECONDS)
            if not await shutdown.wait_for(ending, seconds + END_SECONDS):
                await self._call(self._actor.stop.remote(0.0), END_SECONDS)
        await self._remove()

    def show_output(self, show: Callable[[str], None]) -> None:
        self._show = show
        while self._unshown:
            show(self._unshown.popleft())

    def reload(self) -> None:
        if self._actor is not None:
            self._actor.reload.remote()

    def forget(self) -> None:
        """Follow the actor no longer; it goes on if it is detached."""
        if self._following is not None:
            self._following.cancel()

    # --- the actor ------------------------------------------------------------------------

    def _found(self) -> Any:
        """Return the actor of this name; None if there is none. Blocks for milliseconds: Ray
        keeps actors' names at its head."""
        try:
            return ray.get_actor(self._order.actor, self._order.namespace)
        except ValueError:
            return None

    def _made(self) -> Any:
        order = self._order
        if why := missing(self._needs, node_resources()):
            self._progress(f"{self.name} waits for a node that can run it: {why}")
        custom = {name: n for name, n in self._needs.items() if name not in ("CPU", "GPU")}
        return (
            ray.remote(Member)
            .options(
                name=order.actor,
                namespace=order.namespace,
                lifetime="detached" if self._detached else None,
                max_restarts=-1,
                max_concurrency=_CALLS,
                num_cpus=self._needs["CPU"],
                num_gpus=self._needs.get("GPU", 0),
                resources=custom,
                scheduling_strategy=self._strategy(),
            )
            .remote(encode(order))
        )

    def _strategy(self) -> Any:
        """Return where Ray may place the actor: spread over the nodes, or with GPUs in a placement
        group, which keeps them for it while it is started again."""
        if not self._needs.get("GPU"):
            return "SPREAD"
        self._remove_group()  # an interrupted command may have left it
        group = ray.util.placement_group(
            [{name: n for name, n in self._needs.items() if n}],
            strategy="STRICT_PACK",
            name=self._group_name,
            lifetime="detached" if self._detached else None,
        )
        return PlacementGroupSchedulingStrategy(placement_group=group)

    @property
    def _group_name(self) -> str:
        return f"{self._order.namespace}/{self.name}"

    async def _remove(self) -> None:
        """Have Ray end the actor for good, and wait until its name is free."""
        self.forget()
        if self._ended is None:
            self._ended = ""
            await self._tell()
        actor, self._actor = self._actor, None
        if actor is not None:
            await asyncio.to_thread(self._kill, actor)
        for _ in range(int(GONE_SECONDS / GONE_POLL_SECONDS)):
            if await asyncio.to_thread(self._found) is None:
                return
            await asyncio.sleep(GONE_POLL_SECONDS)

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # it has ended
            ray.kill(actor, no_restart=True)
        if self._needs.get("GPU"):
            self._remove_group()

    def _remove_group(self) -> None:
        with contextlib.suppress(ValueError):  # there is none
            ray.util.remove_placement_group(ray.util.get_placement_group(self._group_name))

    async def _call(self, answer: Any, seconds: float) -> Any:
        """Return an actor's answer; None if it gives none within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                return await answer
        except (ray.exceptions.RayError, TimeoutError):
            return None

    # --- its reports ----------------------------------------------------------------------

    async def _follow(self) -> None:
        """Take reports until the process has ended for good."""
        seen = 0
        waiting: Any = None  # for the first report, which comes when Ray has found a node
        while self._ended is None:
            try:
                async with asyncio.timeout(POLL_SECONDS + ANSWER_SECONDS):
                    if self._report is not None or self._lost:
                        answer = await self._actor.report.remote(seen, POLL_SECONDS)
                    else:
                        waiting = waiting or self._actor.report.remote(seen, 0.0)
                        answer = await waiting
            except ray.exceptions.ActorDiedError as error:
                if await asyncio.to_thread(self._found) is None:
                    self._ended = f"{self.name}: its actor has ended: {first_line(error)}"
                else:  # with its node, and Ray starts it again
                    self._not_answered()
            except (ray.exceptions.RayError, TimeoutError):
                self._not_answered()
                await asyncio.sleep(RETRY_SECONDS)
            else:
                seen = self._take(decode_report(answer))
            await self._tell()

    def _not_answered(self) -> None:
        if self._report is not None:
            self._lost = True
            self.crashes += 1
            self._why = f"its actor on node {self._report.node} is lost, or the node is"
            self._progress(f"{self.name}: {self._why}; Ray starts it again")
            self._report = None
        elif not self._lost and not self._waits:
            self._waits = True
            self._progress(f"{self.name} waits for a node with {amounts(self._needs)} free")

    def _take(self, report: Report) -> int:
        """Take a report; return the number of the last line seen."""
        before = self._report
        if self._before:  # what was before this side came is no news
            self._before, before = False, report
            report = msgspec.structs.replace(report, lines=())
        if before is not None and before.life != report.life:
            self.crashes += 1  # the actor was started again between two reports
        counted = before.crashes if before is not None and before.life == report.life else 0
        self._report, self._lost = report, False
        for printed, line in report.lines:
            self._say(printed, line)
        self.crashes += max(0, report.crashes - counted)
        self._ended = report.ended
        return report.seen

    def _say(self, printed: bool, line: str) -> None:
        if not printed:
            self._why = line
            self._progress(line)
            return
        if self._show is not None:
            self._show(line)
        else:
            self._unshown.append(line)

    def _failed(self) -> ClusterError:
        """Return why the process ended, where, and its last lines that were not shown."""
        said = "".join(f"\n  {line.removeprefix(f'{self.name}: ')}" for line in self._unshown)
        node = "" if self._report is None else f" (on node {self._report.node})"
        return ClusterError(f"{self._ended or self._why or f'{self.name} ended'}{node}{said}")

    async def _wait_for_news(self, seconds: float) -> None:
        """Wait until the actor has reported once, unless it is lost; `seconds` at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._until(lambda: self._report is not None or self._lost)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
