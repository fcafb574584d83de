"""`SimCluster`: simulated instances behind the real scheduler, which fill in requests' times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from memserve.config import KEEPING_ROLES, Caching
from memserve.scheduler.contract import InstanceSpec, Plan, PromptRequest, TransferPath
from memserve.scheduler.prompt_tree import PromptTree
from memserve.scheduler.scheduler import Scheduler
from memserve.sim.cache import SimCache
from memserve.sim.instance import InstanceShape, Job, SimInstance
from memserve.sim.prompt import BlockKey, SimRequest, SimSession
from memserve.sim.timeline import Timeline
from memserve.types import SHARED, InstanceId, Role


@dataclass(frozen=True, slots=True)
class Network:
    """How KV moves between instances."""

    path: TransferPath = "nixl"
    aggregated: bool = True  # one piece per block; else two (K, V) per block and layer
    layers: int = 1


class SimCluster:
    """Runs sessions to their end. Deterministic."""

    def __init__(
        self,
        shapes: Sequence[InstanceShape],
        policy: str,
        caching: Caching = "full",
        network: Network | None = None,
    ) -> None:
        self.timeline = Timeline()
        self.tree = PromptTree()
        self.scheduler = Scheduler(self.tree, self.timeline, policy)
        self.fetched_tokens = 0
        self._left: set[InstanceId] = set()
        self._caching = caching
        self._network = network or Network()
        self.unfinished = 0  # sessions
        self.instances: dict[InstanceId, SimInstance] = {}  # also those that left
        for shape in shapes:
            self.add(shape)

    # --- members --------------------------------------------------------------------------

    def add(self, shape: InstanceShape) -> None:
        """Add an instance that takes requests from now on, with an empty cache."""
        cache = SimCache(shape.hbm_blocks, shape.dram_blocks, _Removals(shape.id, self.tree))
        self.instances[shape.id] = SimInstance(shape, cache, self.timeline, self._stored)
        self.tree.join(shape.id, shape.block_tokens, shape.role)
        self.scheduler.put(self._spec(shape))

    def change_role(self, instance: InstanceId, role: Role) -> None:
        """Give an instance another role: what runs there goes on, new requests follow the new
        role, and its cache stays."""
        simulated = self.instances[instance]
        caches = role in KEEPING_ROLES[self._caching]
        simulated.shape = replace(simulated.shape, role=role, caches=caches)
        self.tree.set_role(instance, role)
        self.scheduler.put(self._spec(simulated.shape))

    def remove(self, instance: InstanceId) -> None:
        """Send an instance no more requests, and forget its cache; what runs there goes on."""
        self.scheduler.remove(instance)
        self.tree.leave(instance)
        self._left.add(instance)

    def _spec(self, shape: InstanceShape) -> InstanceSpec:
        host = "here" if self._network.path == "shm" else shape.id
        return InstanceSpec(
            shape.id,
            shape.role,
            shape.costs,
            shape.block_tokens,
            host,
            shape.max_running,
            shape.chunk_tokens,
            shape.hbm_blocks * shape.block_tokens,
            shape.short_share,
        )

    def run(self, sessions: Sequence[SimSession], done: Callable[[SimRequest], None]) -> None:
        """Run until the last answer has ended. `done` is called with each finished request."""
        self.unfinished = len(sessions)
        for session in sessions:
            _SessionRun(self, session, done).start()
        while self.timeline.step():
            pass

    # --- one request ----------------------------------------------------------------------

    def submit(self, request: SimRequest, ended: Callable[[SimRequest], None]) -> None:
        """Place a request by the scheduler, now. `ended` is called when its answer is complete."""
        request.arrival = self.timeline.now()
        decision = self.scheduler.decide(
            PromptRequest(
                id=request.id,
                tokens=request.tokens,
                output_tokens=request.output_tokens,
                session=request.session,
            )
        )
        assert decision is not None  # some instance is always there
        _RequestRun(self, request, decision.plan, ended).start()

    def transfer_seconds(self, source: InstanceId, blocks: int) -> float:
        """Seconds to move `blocks` from `source` to another instance."""
        shape, network = self.instances[source].shape, self._network
        pieces = blocks if network.aggregated else blocks * 2 * network.layers
        size = blocks * shape.block_tokens * shape.costs.kv_bytes_per_token
        return float(shape.costs.transfer_seconds(size, pieces, network.path))

    @property
    def returns(self) -> bool:
        """Whether KV of answers is returned to the prefill instance."""
        return self._caching == "full"

    def _stored(
        self,
        instance: InstanceId,
        keys: Sequence[BlockKey],
        request: SimRequest,
        positions: Sequence[int],
    ) -> None:
        if instance in self._left:
            return
        tokens = request.tokens if request.final_tokens is None else request.final_tokens
        size = self.instances[instance].shape.block_tokens
        for first, last in _runs(positions):
            self.tree.stored(
                instance,
                SHARED,
                keys[first - 1] if first else None,
                keys[first:last],
                tokens[first * size : last * size],
            )


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of ascending positions: (first, last + 1)."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs


class _Removals:
    """Reports the blocks that an instance drops to the prompt tree."""

    def __init__(self, instance: InstanceId, tree: PromptTree) -> None:
        self._instance = instance
        self._tree = tree

    def removed(self, key: BlockKey) -> None:
        if self._instance in self._tree:
            self._tree.removed(self._instance, (key,))


class _SessionRun:
    def __init__(
        self, cluster: SimCluster, session: SimSession, done: Callable[[SimRequest], None]
    ) -> None:
        self._cluster = cluster
        self._session = session
        self._done = done
        self._next = iter(session.requests)

    def start(self) -> None:
        self._cluster.timeline.at(self._session.arrival, self._go_on)

    def _go_on(self) -> None:
        request = next(self._next, None)
        if request is None:
            self._cluster.unfinished -= 1
        else:
            self._cluster.submit(request, self._ended)

    def _ended(self, request: SimRequest) -> None:
        self._done(request)
        self._cluster.timeline.after(self._session.think, self._go_on)


class _RequestRun:
    """One request that runs by its plan: fetch, prefill, hand-over, decode, return."""

    def __init__(
        self,
        cluster: SimCluster,
        request: SimRequest,
        plan: Plan,
        ended: Callable[[SimRequest], None],
    ) -> None:
        self._cluster = cluster
        self._request = request
        self._plan = plan
        self._ended = ended
        self._answers = cluster.instances[plan.instance]
        self._computes = cluster.instances[plan.computes]

    def start(self) -> None:
        source = self._plan.fetch
        if source is None:
            self._compute()
            return
        request, size = self._request, self._computes.shape.block_tokens
        wanted = (self._plan.cached_tokens + self._plan.fetched_tokens) // size
        # Fetch what the source has now and the target lacks: the tree may be out of date.
        there = self._cluster.instances[source].cache.found(request.keys[:wanted])
        here = self._computes.cache.found(request.keys[:wanted])
        if there <= here:
            self._compute()
            return
        request.fetched_tokens = (there - here) * size
        self._cluster.fetched_tokens += request.fetched_tokens

        def arrived() -> None:
            self._computes.store(request.keys[:there], request)
            self._compute()

        seconds = self._cluster.transfer_seconds(source, there - here)
        self._cluster.timeline.after(seconds, arrived)

    def _compute(self) -> None:
        self._computes.submit(self._job(prefill_only=self._plan.prefill is not None))

    def _job(self, prefill_only: bool) -> Job:
        return Job(self._request, prefill_only, self._prefilled, self._finished, [])

    def _prefilled(self, job: Job) -> None:
        if not job.prefill_only:
            self._first_token()
            return
        request, target = self._request, self._answers
        size = target.shape.block_tokens
        held = target.cache.found(request.keys) if target.shape.caches else 0
        missing = -(-request.prompt_tokens // size) - held
        request.moved_tokens = missing * size

        def arrived() -> None:
            self._first_token()
            target.decode(self._job(prefill_only=False))

        seconds = self._cluster.transfer_seconds(self._plan.computes, missing)
        self._cluster.timeline.after(seconds, arrived)

    def _first_token(self) -> None:
        self._request.first_token = self._cluster.timeline.now()
        self._cluster.scheduler.prefilled(self._request.id)

    def _finished(self, job: Job) -> None:
        request, cluster = self._request, self._cluster
        request.end = cluster.timeline.now()
        cluster.scheduler.finished(request.id, request.output_tokens)
        if self._plan.prefill is not None and cluster.returns and request.final_keys:
            missing = len(request.final_keys) - self._computes.cache.found(request.final_keys)
            cluster.timeline.after(
                cluster.transfer_seconds(self._plan.instance, missing),
                lambda: self._computes.store(request.final_keys, request),
            )
        self._ended(request)
