"""`PlannerLoop`: the planner at work on a cluster, through its gateways and its backend."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import TypeVar

from msgspec.structs import replace

from memserve.api.control import InstanceChange
from memserve.api.status import InstanceState
from memserve.clock import Clock
from memserve.cluster.backend import Groups
from memserve.cluster.client import ClusterClient, GatewayUnreachable
from memserve.cluster.member import ClusterView
from memserve.cluster.scaling import Scaling
from memserve.config import PlannerConfig
from memserve.errors import ClusterError, MemserveError
from memserve.planner.contract import Action, Decision, LoadReport, RoleChange
from memserve.planner.planner import Planner
from memserve.scheduler.contract import Costs
from memserve.scheduler.profiles import decode_profile
from memserve.secrets import Secret
from memserve.vital import Vitals

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class PlannerLoop:
    """One planner of a cluster: several would undo each other's changes."""

    def __init__(
        self,
        urls: Callable[[], Awaitable[Sequence[str]]],
        config: PlannerConfig,
        clock: Clock,
        secret: Secret | None = None,
        tls: Callable[[], ssl.SSLContext | None] = lambda: None,
        groups: Groups | None = None,
        tell: Callable[[str], None] = log.info,
        planner: Planner | None = None,
    ) -> None:
        """`urls` returns those of all gateways, at each look: one that is started again may be
        elsewhere. `tls` returns how they are verified, and may raise ConfigError. `groups`: what
        can be scaled; None: members are not started or ended. `tell` is called with each change,
        and with what keeps the planner from deciding."""
        limited = config if groups is not None else replace(config, max_members=None)
        self._urls = urls
        self._config = config
        self._clock = clock
        self._secret = secret
        self._tls = tls
        self._scaling = None if groups is None else Scaling(groups, config.max_members)
        self._tell = tell
        self._planner = planner or Planner(limited)
        self._costs: Costs | None = None
        self._said = ""  # the last reason in the log

    async def run(self) -> None:
        """Look at the cluster in every interval, until cancelled. A look that fails is logged."""
        vitals = Vitals()
        while True:
            try:
                async with AsyncExitStack() as stack:
                    tls = self._tls()
                    clients = [
                        await stack.enter_async_context(ClusterClient(url, self._secret, tls))
                        for url in await self._urls()
                    ]
                    await self.look(clients)
            except MemserveError as error:
                self._say(f"the planner cannot look at the cluster: {error}")
            except Exception as error:  # noqa: BLE001 - one look must not end the planner
                vitals.survive("a look of the planner", error)
            await asyncio.sleep(self._config.interval)

    async def look(self, clients: Sequence[ClusterClient]) -> Decision | None:
        """Look once, change what is decided, and post the decision. None: there is nothing to
        decide by yet. Raises ClusterError if no gateway answers."""
        reports = await _loads(clients)
        view = await _first_answer(clients, lambda client: client.view())
        costs = await self._known_costs(clients[0], view)
        if costs is None:
            self._say("the planner waits for a member's cost model")
            return None
        starting = sum(one.state is InstanceState.STARTING for one in view.instances)
        if self._scaling is not None:
            starting = max(starting, await self._scaling.late(view))
        decision = self._planner.look(self._clock.now(), reports, costs, starting)
        decision = replace(decision, interval=self._config.interval)
        if self._config.dry_run:
            decision = replace(decision, dry_run=True)
        elif decision.action is not Action.NOTHING:
            decision = await self._carried_out(clients, decision)
        self._explain(decision)
        for client in clients:
            try:
                await client.post_plan(decision)
            except ClusterError as error:
                log.warning("the decision is not shown everywhere: %s", error)
        return decision

    async def _carried_out(self, clients: Sequence[ClusterClient], decision: Decision) -> Decision:
        made: list[RoleChange] = []
        try:
            for change in decision.changes:
                await _change(clients, change)
                made.append(change)
            if decision.role is not None and self._scaling is not None:
                sign = 1 if decision.action is Action.ADD else -1
                changed = await self._scaling.scale(decision.role, sign * decision.count)
                decision = replace(decision, count=abs(changed))
        except ClusterError as error:
            left = len(decision.changes) - len(made)
            failed = f"{error}; {left} of {len(made) + left} roles were not changed"
            return replace(decision, changes=tuple(made), failed=failed if left else str(error))
        return decision

    async def _known_costs(self, client: ClusterClient, view: ClusterView) -> Costs | None:
        """Return the cost model of a ready member; all are taken as alike."""
        for member in view.instances:
            if self._costs is not None:
                break
            if member.state is InstanceState.READY:
                try:
                    self._costs = decode_profile(await client.profile(member)).costs
                except MemserveError as error:
                    log.debug("%s does not give its costs: %s", member.id, error)
        return self._costs

    def _explain(self, decision: Decision) -> None:
        self._said = ""
        if decision.action is Action.NOTHING:
            log.debug("%s", decision.summary())
            return
        failed = f"; failed: {decision.failed}" if decision.failed else ""
        self._tell(f"planner: {decision.summary()}{failed}")
        for change in decision.changes:
            self._tell(f"planner: {change.member}: {change.before} -> {change.after}")

    def _say(self, text: str) -> None:
        """Tell once what may be true at every look."""
        if text != self._said:
            self._tell(text)
            self._said = text


async def _change(clients: Sequence[ClusterClient], change: RoleChange) -> None:
    """Have the first gateway that answers change a role. One that gives no answer may have done
    it: the next one does it again, which changes nothing."""
    wanted = InstanceChange(role=change.after)
    await _first_answer(clients, lambda client: client.change(change.member, wanted))


async def _loads(clients: Sequence[ClusterClient]) -> list[LoadReport]:
    """Return the reports of the gateways that answer. Raises ClusterError if none does."""
    found: list[LoadReport] = []
    failed: ClusterError | None = None
    for client in clients:
        try:
            found += await client.load()
        except GatewayUnreachable as error:
            failed = error
    if not found and failed is not None:
        raise failed
    return found


async def _first_answer(
    clients: Sequence[ClusterClient], ask: Callable[[ClusterClient], Awaitable[_T]]
) -> _T:
    """Return the answer of the first gateway that can be reached. Raises ClusterError."""
    for client in clients[:-1]:
        try:
            return await ask(client)
        except GatewayUnreachable as error:  # which `look` tells when it posts the decision
            log.debug("%s", error)
    return await ask(clients[-1])
