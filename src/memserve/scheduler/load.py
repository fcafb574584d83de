"""`Load`, the reserved work of all instances: reservations are made with a plan and released when
its request ends.

Each instance has an `InstanceLoad`: queued prompts, in order, and answers that decode now or later.
`Load` also keeps the figures in arrays over all instances, in the layout that `kernels` reads.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memserve.scheduler import kernels as k
from memserve.scheduler.contract import Costs, InstanceSpec, Seconds, TransferPath
from memserve.scheduler.instance_load import InstanceLoad, Reservation, Resident
from memserve.scheduler.refined_costs import RefinedCosts
from memserve.types import IndexArray, InstanceId, Namespace, RequestId, Role, TokenArray

MAX_ROWS = 64  # queued prompts of an instance in `left`; the last row is the sum of the rest
_RECENT = 1 / 64  # least weight of the newest value in a running mean
_ROW = struct.Struct(f"{k.KV_CAPACITY}d")  # the columns of `stats` that requests change
_ROW_ITEM = struct.calcsize("d")


@dataclass(frozen=True, slots=True)
class CostGroup:
    """Instances with equal cost models, before the learnt factors of each instance."""

    costs: Costs
    slots: IndexArray


class Load:
    """The `InstanceLoad` of every instance, and their figures in arrays by slot."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._by_id: dict[InstanceId, InstanceLoad] = {}
        self._reservations: dict[RequestId, Reservation] = {}
        self._turn = 0.0
        self._typical_prefill = 0.0  # running means over reservations
        self._typical_context = 0.0
        self._typical_output = 0.0
        self._rebuild()

    @property
    def by_slot(self) -> tuple[InstanceLoad, ...]:
        """Every `InstanceLoad`, by slot; a new tuple after each change of members. Must be read
        before the arrays, and rebuilds them: a change of members only marks them as outdated,
        because a starting cluster has many changes."""
        if self._outdated:
            self._rebuild()
        return self._by_slot

    def _rebuild(self) -> None:
        """Give every instance a slot and make the arrays."""
        self._outdated = False
        loads = self._by_slot = tuple(self._by_id.values())
        n = len(loads)
        self.instances = tuple(self._by_id)
        self.slots: Mapping[InstanceId, int] = {id_: at for at, id_ in enumerate(self.instances)}
        self.stats: Seconds = np.zeros((n, k.STATS))
        # The memory of `stats` as bytes: `pack_into` writes a row of Python numbers in half the
        # time of an assignment in numpy.
        self._bytes = self.stats.reshape(-1).data.cast("B")
        self.kinds: IndexArray = np.zeros((n, k.KINDS), dtype=np.int64)
        self._set_left(np.zeros((n, 1)))
        self.unhindered: Seconds = np.zeros(n)  # zeros: prompts without a minimum wait; read-only
        hosts: dict[str, int] = {}
        groups: list[Costs] = []
        pools: dict[str, int] = {}
        for at, load in enumerate(loads):
            load.slot = at
            spec = load.spec
            model = spec.costs.model if isinstance(spec.costs, RefinedCosts) else spec.costs
            if model not in groups:
                groups.append(model)
            host = hosts.setdefault(spec.host, len(hosts))
            pool = -1 if spec.kv is None else pools.setdefault(spec.kv, len(pools))
            self.kinds[at] = spec.block_tokens, host, groups.index(model), pool
            capacity = np.inf if spec.kv_tokens is None else spec.kv_tokens
            fixed = (capacity, spec.short_share, spec.chunk_tokens, spec.max_running)
            self.stats[at, k.KV_CAPACITY :] = fixed
        of_group = self.kinds[:, k.GROUP]
        self.cost_groups = tuple(
            CostGroup(costs, np.flatnonzero(of_group == at)) for at, costs in enumerate(groups)
        )
        # Transports between any two instances: (`near`, path); near is 1 within a host, as in
        # `kernels`.
        paths: list[tuple[int, TransferPath]] = []
        if len(hosts) > 1:
            paths.append((0, "nixl"))
        if len(hosts) < n:
            paths.append((1, "shm"))
        self.paths = tuple(paths)
        self._stale = set(loads)

    def _set_left(self, left: Seconds) -> None:
        self.left = left  # [instances, prompts] seconds left of each queued prompt
        self._left_bytes = left.reshape(-1).data.cast("B")
        self.arrays: k.LoadArrays = (self.stats, left, self.kinds)

    def refresh(self) -> None:
        """Bring the arrays up to date. Call before reading them."""
        if self._outdated:
            self._rebuild()
        for load in self._stale:
            if load.slot >= 0:
                self._show(load)
        self._stale.clear()

    def _show(self, load: InstanceLoad) -> None:
        """Copy an instance's figures into the arrays."""
        at, others = load.slot, load.other_running
        queued, total, under_way = self._show_queue(load)
        batch = load.answers + others
        context = load.context_tokens + others * self._typical_context
        output = load.output_tokens + others * self._typical_output
        remaining = output / (2 * batch) if batch else 0.0  # on average half is decoded
        room = load.spec.max_running
        prefill_factor = step_factor = far_factor = near_factor = 1.0
        costs = load.spec.costs
        if isinstance(costs, RefinedCosts):
            # Equal instances share a cost model, but each one has its own learnt factors.
            prefill_factor, step_factor = costs.factor("prefill"), costs.factor("decode")
            far_factor, near_factor = costs.factor("nixl"), costs.factor("shm")
        _ROW.pack_into(
            self._bytes,
            at * k.STATS * _ROW_ITEM,
            queued,
            load.queue.updated,
            total,
            under_way,
            load.residents.kv_tokens + others * self._typical_context,
            load.decoding + others,
            batch,
            context / batch if batch else 0.0,
            remaining,
            max(batch + 1 - room, 0) / room * remaining,
            load.used,
            prefill_factor,
            step_factor,
            far_factor,
            near_factor,
        )

    def _show_queue(self, load: InstanceLoad) -> tuple[int, float, float]:
        """Copy the queue into `left`, other gateways' prompts last. Returns the number of prompts,
        the sum of their seconds, and the seconds of those in prefill."""
        if not load.prefills and not load.other_prefills:
            return 0, 0.0, 0.0
        left = [*load.queue.left(), *[self._typical_prefill] * load.other_prefills]
        if len(left) > MAX_ROWS:
            left[MAX_ROWS - 1 :] = [sum(left[MAX_ROWS - 1 :])]
        missing = len(left) - self.left.shape[1]
        if missing > 0:
            wider = np.concatenate([self.left, np.zeros((len(self.by_slot), missing))], axis=1)
            self._set_left(wider)
        # `pack_into` as in `_show`: numpy takes several times as long to convert a list.
        row = load.slot * self.left.shape[1] * _ROW_ITEM
        struct.pack_into(f"{len(left)}d", self._left_bytes, row, *left)
        return len(left), sum(left), load.queue.under_way()

    # --- members ------------------------------------------------------------------------

    def put(self, spec: InstanceSpec) -> bool:
        """Add an instance, or replace its spec; its reservations stay. Returns False if the spec
        is unchanged."""
        load = self._by_id.get(spec.id)
        if load is not None and load.spec == spec:
            return False
        if load is None:
            # Ties go to the least `used`: a random value below 0 puts unused instances first, in
            # an order that differs between gateways with different seeds.
            self._by_id[spec.id] = InstanceLoad(spec, -float(self._random.random()))
        else:
            load.spec = spec
            load.queue.short_share = spec.short_share
        self._outdated = True
        return True

    def remove(self, instance: InstanceId) -> bool:
        """Remove an instance and its reservations. Returns False if it is unknown."""
        load = self._by_id.pop(instance, None)
        if load is None:
            return False
        load.slot = -1
        self._outdated = True
        return True

    def of(self, instance: InstanceId) -> InstanceLoad:
        """Return the `InstanceLoad` of an instance. Raises KeyError for an unknown one."""
        return self._by_id[instance]

    def with_role(self, role: Role, slots: Sequence[int]) -> list[int]:
        return [at for at in slots if self.by_slot[at].spec.role is role]

    def observe(self, instance: InstanceId, running: int, waiting: int) -> None:
        """Set an instance's own counts of sequences. An excess over the reservations is other
        gateways' work. A deficit means that requests are still in flight."""
        load = self._by_id.get(instance)
        if load is None:
            return
        prefills = len(load.prefills)
        load.other_prefills = max(0, waiting - prefills)
        load.other_running = max(0, running + min(waiting, prefills) - prefills - load.decoding)
        self._stale.add(load)

    # --- reservations -------------------------------------------------------------------

    def reserve(self, reservation: Reservation, now: float) -> None:
        """Add a reservation; releases an earlier one of its request first."""
        self.release(reservation.request, now)
        self._reservations[reservation.request] = reservation
        computes, answers = reservation.computes, reservation.answers
        computes.append(reservation, now)
        request, prompt = reservation.request, reservation.tokens
        held = (reservation.namespace, prompt)
        own = Resident(*held, reservation.kv_tokens, reservation.output_tokens)
        answers.residents.add(request, own)
        if answers is not computes:
            computes.residents.add(request, Resident(*held, len(prompt), 0))
        answers.answers += 1
        answers.context_tokens += reservation.context_tokens
        answers.output_tokens += reservation.output_tokens
        self._turn += 1.0
        computes.used = answers.used = self._turn
        self._stale.update((computes, answers))
        newest = max(_RECENT, 1 / self._turn)
        self._typical_prefill += newest * (reservation.prefill_seconds - self._typical_prefill)
        self._typical_context += newest * (reservation.context_tokens - self._typical_context)
        self._typical_output += newest * (reservation.output_tokens - self._typical_output)

    def prefilled(self, request: RequestId, now: float) -> None:
        """Report that a request's prompt is computed. Unknown requests and repeats are ignored."""
        reservation = self._reservations.get(request)
        if reservation is None or not reservation.computes.discard(request, now):
            return
        computes, answers = reservation.computes, reservation.answers
        for load in (computes,) if computes is answers else (computes, answers):
            load.residents.prefilled(request, now)
        answers.decoding += 1
        self._stale.update((computes, answers))

    def release(self, request: RequestId, now: float) -> Reservation | None:
        """Remove and return a request's reservation; None if it has none."""
        reservation = self._reservations.pop(request, None)
        if reservation is None:
            return None
        computes, answers = reservation.computes, reservation.answers
        if not computes.discard(request, now):
            answers.decoding -= 1
        answers.answers -= 1
        answers.context_tokens -= reservation.context_tokens
        answers.output_tokens -= reservation.output_tokens
        computes.residents.remove(request)
        answers.residents.remove(request)
        self._stale.update((computes, answers))
        return reservation

    @property
    def reserved(self) -> int:
        """Number of requests with a reservation."""
        return len(self._reservations)

    # --- queries of predictions ---------------------------------------------------------

    def has_room(self, slot: int, needed: float) -> bool:
        """Return whether, by the arrays, less than half of HBM is reserved with `needed` tokens
        more."""
        reserved, capacity = self.stats[slot, k.KV_TOKENS], self.stats[slot, k.KV_CAPACITY]
        return bool(reserved + needed < capacity / 2)

    def memory_wait(self, slot: int, needed: float, step: float, now: float) -> float:
        """Return the seconds until an instance has HBM for a sequence of `needed` tokens, if its
        requests end as expected, with decode steps of `step` seconds."""
        stats = self.stats[slot].tolist()
        excess = stats[k.KV_TOKENS] + needed - stats[k.KV_CAPACITY]
        queue = self.queue_seconds(slot, now)
        return self.by_slot[slot].residents.wait(excess, queue, step, now)

    def queue_seconds(self, slot: int, now: float) -> float:
        """Return the seconds of prefill that an instance's queue still takes, by the arrays."""
        stats: list[float] = self.stats[slot].tolist()
        gone = min(max(now - stats[k.LEFT_AT], 0.0), stats[k.UNDER_WAY])  # as in `kernels._queue`
        return stats[k.LEFT_TOTAL] - gone

    def shared_tokens(self, slot: int, namespace: Namespace, tokens: TokenArray) -> int:
        """Return the number of leading `tokens`, all cached there, that a request there holds in
        HBM."""
        return self.by_slot[slot].residents.shared(namespace, tokens)

    def promised_tokens(
        self, slot: int, namespace: Namespace, tokens: TokenArray, held: int
    ) -> int:
        """Return how many of the first `held` tokens do not depend on an unfinished prefill of this
        instance: the prompt tree counts a prompt as held as soon as it is routed."""
        prefills = self.by_slot[slot].prefills
        if not prefills:
            return held
        for waiting in prefills.values():
            if (
                waiting.cached_tokens < held <= len(waiting.tokens)
                and waiting.namespace == namespace
                and waiting.tokens[held - 1] == tokens[held - 1]  # cheap, and mostly False
                and np.array_equal(waiting.tokens[:held], tokens[:held])
            ):
                held = waiting.cached_tokens
                if not held:
                    break
        return held
