"""What instances have to do: reservations, made with a plan and released when it ends.

Each instance has a `Line`: the prompts that wait or are computed there, in order, and the
answers that it decodes or will. The same figures stand in arrays over all instances, so that
a decision is a few operations on arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memserve.scheduler.contract import Costs, InstanceSpec, Seconds
from memserve.scheduler.line import Line, Reservation
from memserve.scheduler.refined_costs import RefinedCosts
from memserve.scheduler.residents import Resident
from memserve.types import IndexArray, InstanceId, Namespace, RequestId, Role, TokenArray

MAX_ROWS = 64  # of prompts in an instance's queue that are told apart
_NOTHING = 1e-9  # seconds, instead of none in a quotient
_RECENT = 1 / 64  # weight of the newest value in a running mean


@dataclass(frozen=True, slots=True)
class CostGroup:
    """Instances whose times the same model predicts, but for a factor of each."""

    costs: Costs
    slots: IndexArray | slice  # a slice where it is all instances: indexing copies nothing


@dataclass(frozen=True, slots=True)
class Queues:
    """What a prompt would meet on each instance, [instances]."""

    wait: Seconds  # how much later it would be computed
    delays: Seconds  # how much later the others would be, together
    work: Seconds  # all that waits or is computed there


class Load:
    """The lines of all instances, and their figures in arrays [instances], by slot."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._lines: dict[InstanceId, Line] = {}
        self._reservations: dict[RequestId, Reservation] = {}
        self._turn = 0.0
        self._typical_prefill = 0.0  # running means over reservations
        self._typical_context = 0.0
        self._typical_output = 0.0
        self._rebuild()

    def _rebuild(self) -> None:
        """Give every line a slot. Members change seldom; decisions are made all the time."""
        lines = tuple(self._lines.values())
        n = len(lines)
        self.lines = lines
        self.instances = tuple(self._lines)
        self.slots: Mapping[InstanceId, int] = {id_: at for at, id_ in enumerate(self.instances)}
        self._rows = 1
        self.left = np.zeros((1, n))  # [prompts, instances] seconds of each that waits or runs
        self.left_at = np.zeros(n)  # the time of these figures
        self.left_total = np.zeros(n)
        self.under_way = np.zeros(n)  # of it, before one of the prompts has ended
        self.kv_tokens = np.zeros(n)  # reserved in HBM
        self.kv_capacity = np.array(
            [np.inf if line.spec.kv_tokens is None else line.spec.kv_tokens for line in lines]
        )
        shares = np.array([line.spec.short_share for line in lines])
        self.shares = shares > 0
        # What the oldest prompt gets while the shortest gets one second.
        self.oldest_rate = np.full(n, np.inf)
        self.oldest_rate[self.shares] = (1 - shares[self.shares]) / shares[self.shares]
        self.running = np.zeros(n)  # sequences that decode now
        self.batch = np.zeros(n)  # and those that will when their prompts are computed
        self.remaining = np.zeros(n)  # tokens of each of their answers to come, in the mean
        self.wait_steps = np.zeros(n)  # until a full batch has room for one more
        # Decode steps as they are now, with the whole batch, and with one more sequence.
        self.step_sequences = np.zeros((3, n))
        self.step_contexts = np.zeros((3, n))
        self.step_factor = np.ones((3, n))
        self.used = np.zeros(n)
        self.block_tokens = np.array([line.spec.block_tokens for line in lines], dtype=np.int64)
        self.chunk_tokens = np.array([float(line.spec.chunk_tokens) for line in lines])
        hosts = {line.spec.host: None for line in lines}
        numbers = {host: at for at, host in enumerate(hosts)}
        self.host = np.array([numbers[line.spec.host] for line in lines], dtype=np.int64)
        self.near = self.host[:, None] == self.host  # [instances, instances], on one host
        self.every = np.arange(n)
        self.prefill_factor = np.ones(n)
        self.transfer_factor = np.ones(n)
        self.group = np.zeros(n, dtype=np.int64)
        groups: list[Costs] = []
        for at, line in enumerate(lines):
            costs = line.spec.costs
            model = costs.model if isinstance(costs, RefinedCosts) else costs
            if model not in groups:
                groups.append(model)
            self.group[at] = groups.index(model)
        one = len(groups) == 1
        self.cost_groups = tuple(
            CostGroup(costs, slice(None) if one else (self.group == number).nonzero()[0])
            for number, costs in enumerate(groups)
        )
        for at, line in enumerate(lines):
            line.slot = at
        self._stale = set(lines)

    def refresh(self) -> None:
        """Bring the arrays up to date, before they are read."""
        for line in self._stale:
            self._show(line)
        self._stale.clear()

    def _show(self, line: Line) -> None:
        """Copy a line's figures into the arrays."""
        at = line.slot
        if at < 0:
            return
        self._show_queue(line)
        self.kv_tokens[at] = line.residents.kv_tokens + line.other_running * self._typical_context
        self.used[at] = line.used
        running = line.decoding + line.other_running
        batch = line.answers + line.other_running
        context = line.context_tokens + line.other_running * self._typical_context
        output = line.output_tokens + line.other_running * self._typical_output
        remaining = output / (2 * batch) if batch else 0.0  # half of it is behind them
        room = line.spec.max_running
        self.running[at], self.batch[at], self.remaining[at] = running, batch, remaining
        self.wait_steps[at] = max(batch + 1 - room, 0) / room * remaining
        each = context / batch if batch else 0.0
        step_factor = 1.0
        costs = line.spec.costs
        if isinstance(costs, RefinedCosts):
            # One model for instances that are alike, and what was learnt of each beside it.
            self.prefill_factor[at] = costs.factor("prefill")
            self.transfer_factor[at] = costs.factor("transfer")
            step_factor = costs.factor("decode")
        # Beyond what fits into a batch, sequences wait and do not slow it down.
        for row, sequences in enumerate((running, batch, batch + 1)):
            fitting = min(sequences, room)
            self.step_sequences[row, at] = fitting
            self.step_contexts[row, at] = each * min(fitting, batch)
            self.step_factor[row, at] = step_factor if sequences else 0.0

    def _show_queue(self, line: Line) -> None:
        """The queue's figures, others' prompts at its end."""
        at, queue = line.slot, line.queue
        left = list(queue.left())
        left += [self._typical_prefill] * line.other_prefills
        if len(left) > MAX_ROWS:
            left[MAX_ROWS - 1 :] = [sum(left[MAX_ROWS - 1 :])]
        if len(left) > self._rows:
            more = np.zeros((len(left) - self._rows, len(self.lines)))
            self.left = np.concatenate([self.left, more])
            self._rows = len(left)
        column = self.left[:, at]
        column[:] = 0.0
        column[: len(left)] = left
        self.left_at[at] = queue.updated
        self.left_total[at] = sum(left)
        self.under_way[at] = queue.under_way()

    # --- members ------------------------------------------------------------------------

    def put(self, spec: InstanceSpec) -> bool:
        """Add an instance, or replace what is known of it; its reservations stay. False:
        nothing is new."""
        line = self._lines.get(spec.id)
        if line is not None and line.spec == spec:
            return False
        if line is None:
            # Never chosen yet, in an order of this seed: gateways that start together do not
            # all begin with the same instance.
            self._lines[spec.id] = Line(spec, -float(self._random.random()))
        else:
            line.spec = spec
            line.queue.short_share = spec.short_share
        self._rebuild()
        return True

    def remove(self, instance: InstanceId) -> bool:
        """Forget an instance and what is reserved there. False: it was not known."""
        line = self._lines.pop(instance, None)
        if line is None:
            return False
        line.slot = -1
        self._rebuild()
        return True

    def line(self, instance: InstanceId) -> Line:
        """KeyError for an instance that is not there."""
        return self._lines[instance]

    def with_role(self, role: Role, slots: Sequence[int]) -> list[int]:
        return [at for at in slots if self.lines[at].spec.role is role]

    def observe(self, instance: InstanceId, running: int, waiting: int) -> None:
        """What the instance itself counts. What exceeds the reservations comes from others,
        other gateways for example; what lacks is still on its way there."""
        line = self._lines.get(instance)
        if line is None:
            return
        prefills = len(line.prefills)
        line.other_prefills = max(0, waiting - prefills)
        line.other_running = max(0, running + min(waiting, prefills) - prefills - line.decoding)
        self._stale.add(line)

    # --- reservations -------------------------------------------------------------------

    def reserve(self, reservation: Reservation, now: float) -> None:
        """From now on its prompt and its answer count. Releases what the request held before."""
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
        """Its prompt is computed. Unknown requests, and a second time, are ignored."""
        reservation = self._reservations.get(request)
        if reservation is None or not reservation.computes.discard(request, now):
            return
        computes, answers = reservation.computes, reservation.answers
        for line in (computes,) if computes is answers else (computes, answers):
            line.residents.prefilled(request, now)
        answers.decoding += 1
        self._stale.update((computes, answers))

    def release(self, request: RequestId, now: float) -> Reservation | None:
        """The request ended, however. None: nothing is reserved for it (any more)."""
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
        """Requests that hold a reservation."""
        return len(self._reservations)

    # --- as decisions see it ------------------------------------------------------------

    def queues(self, now: float, prefill: Seconds) -> Queues:
        """What prompts of `prefill` [instances] seconds would meet there."""
        # Between events time is taken off all prompts alike: which is computed matters little
        # until one of them ends.
        gone = np.minimum(now - self.left_at, self.under_way)
        left = self.left * (1.0 - gone / np.maximum(self.left_total, _NOTHING))
        shorter = left <= prefill
        total = left.sum(axis=0)
        before: Seconds = np.where(shorter, left, 0.0).sum(axis=0)
        longer = total - before
        # With the shorter ones it gets its share; the oldest ones get theirs meanwhile.
        meanwhile = (before + prefill) * self.oldest_rate
        wait = before + np.minimum(meanwhile, longer)
        held_up = (len(left) - shorter.sum(axis=0)) * self.shares
        return Queues(wait, held_up * prefill, total)

    def memory_wait(self, slot: int, needed: float, step: float, now: float) -> float:
        """Until an instance has HBM for a sequence of `needed` tokens, if those there end as
        expected, with decode steps of `step` seconds."""
        excess = float(self.kv_tokens[slot]) + needed - float(self.kv_capacity[slot])
        queue = float(self.left_total[slot])
        return self.lines[slot].residents.wait(excess, queue, step, now)

    def shared_tokens(self, slot: int, namespace: Namespace, tokens: TokenArray) -> int:
        """How many of `tokens`, which are cached there, a sequence there holds in HBM too."""
        return self.lines[slot].residents.shared(namespace, tokens)

    def promised_tokens(self, slot: int, namespace: Namespace, tokens: TokenArray) -> int:
        """How many of `tokens` this instance has for certain, as far as unfinished prefills
        go: a tree counts a prompt as held as soon as it is routed."""
        held = len(tokens)
        prefills = self.lines[slot].prefills
        if not prefills:
            return held
        for waiting in prefills.values():
            if (
                waiting.cached_tokens < held <= len(waiting.tokens)
                and waiting.namespace == namespace
                and waiting.tokens[held - 1] == tokens[held - 1]  # spares most comparisons
                and np.array_equal(waiting.tokens[:held], tokens)
            ):
                held = waiting.cached_tokens
                tokens = tokens[:held]
                if not held:
                    break
        return held
