"""`SimPlanner`: the planner that clusters run, in a simulated cluster and its virtual time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from memserve.config import PlannerConfig
from memserve.planner.contract import Action, Decision, RoleChange
from memserve.planner.planner import Planner
from memserve.planner.report import report_of
from memserve.sim.cluster import SimCluster
from memserve.sim.instance import InstanceShape
from memserve.types import InstanceId, Role, SchedulerId

ROLE_SECONDS = 0.1  # until a gateway knows of a change: a call to the member, and a poll
# From the backend's order to a member that is ready: a process, weights from a disk of the host.
START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Delays:
    """Seconds from a decision to its effect."""

    role: float = ROLE_SECONDS
    start: float = START_SECONDS


class SimPlanner:
    """Looks at a cluster in every interval, as long as sessions are unfinished."""

    def __init__(
        self,
        cluster: SimCluster,
        config: PlannerConfig,
        like: InstanceShape,
        delays: Delays | None = None,
        decided: Callable[[Decision], None] | None = None,
    ) -> None:
        """`like`: the shape of members that are added. `decided` is called with each decision."""
        self._cluster = cluster
        self._config = config
        self._like = like
        self._delays = delays or Delays()
        self._decided = decided
        self._planner = Planner(config)
        self._starting = 0
        self._added = 0

    def start(self) -> None:
        self._cluster.timeline.after(self._config.interval, self._look)

    def _look(self) -> None:
        cluster = self._cluster
        if not cluster.unfinished:
            return
        now = cluster.timeline.now()
        report = report_of(cluster.scheduler, SchedulerId("simulated"), now)
        decision = self._planner.look(now, [report], self._like.costs, self._starting)
        if not self._config.dry_run:
            self._act(decision)
        if self._decided is not None:
            self._decided(decision)
        self.start()

    def _act(self, decision: Decision) -> None:
        for change in decision.changes:
            self._cluster.timeline.after(self._delays.role, self._changing(change))
        if decision.role is None:
            return
        for _ in range(decision.count):
            if decision.action is Action.ADD:
                self._starting += 1
                self._cluster.timeline.after(self._delays.start, self._joining(decision.role))
            elif decision.action is Action.REMOVE:
                self._cluster.remove(self._least_loaded(decision.role))

    def _changing(self, change: RoleChange) -> Callable[[], None]:
        return lambda: self._cluster.change_role(change.member, change.after)

    def _joining(self, role: Role) -> Callable[[], None]:
        name = InstanceId(f"added-{self._added}")
        self._added += 1

        def join() -> None:
            self._starting -= 1
            self._cluster.add(replace(self._like, id=name, role=role))

        return join

    def _least_loaded(self, role: Role) -> InstanceId:
        lines = [one for one in self._cluster.scheduler.load.by_slot if one.spec.role is role]
        return min(lines, key=lambda one: (one.answers + len(one.prefills), one.spec.id)).spec.id
