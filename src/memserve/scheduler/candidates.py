"""Candidates, all ways to run one request, and the predicted seconds of each.

This module collects the inputs of a prediction from `Load` and the cost models; `kernels` computes
it. Index of `[instances]` arrays: slot of `Load`; of `[candidates]` arrays: column of
`CandidateSet`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from memserve.scheduler import choosing
from memserve.scheduler import kernels as k
from memserve.scheduler.contract import PromptRequest, Seconds
from memserve.scheduler.load import Load
from memserve.types import IndexArray, InstanceId, Role

_NO_SLOTS: IndexArray = np.empty(0, dtype=np.int64)
_NO_SOURCES: IndexArray = np.empty((2, 0), dtype=np.int64)
_NO_MOVES: Seconds = np.empty((0, 2, 0, 0))


class CandidateSet:
    """The candidates of a set of instances: first single instances, then pairs of a prefill and a
    decode instance. Valid until members or their specs change."""

    def __init__(self, load: Load, among: Collection[InstanceId] | None = None) -> None:
        """`among`: the allowed instances (unknown ones are ignored); None: all."""
        slots = range(len(load.by_slot))
        self.allowed: list[int] = [
            at for at in slots if among is None or load.by_slot[at].spec.id in among
        ]
        self.prefill = load.with_role(Role.PREFILL, self.allowed)
        decode = load.with_role(Role.DECODE, self.allowed)
        colocated = load.with_role(Role.COLOCATED, self.allowed)
        # Roles are soft: without decode instances, prefill instances decode too.
        alone = colocated + (decode or self.prefill)
        partners = _partners(load, decode)
        pools = load.kinds[:, k.POOL].tolist()
        alike = [partners.get(pools[p], _NO_SLOTS) for p in self.prefill]
        counts = [len(each) for each in alike]
        singles = np.array(alone, dtype=np.int64)
        computes = np.repeat(np.array(self.prefill, dtype=np.int64), counts)
        pairs = np.stack((np.concatenate((*alike, _NO_SLOTS)), computes))
        self.table: IndexArray = np.concatenate((np.stack((singles, singles)), pairs), axis=1)
        self.answers, self.computes = self.table
        self.pairs = pairs.shape[1]
        # `usual`: candidates that follow the roles. A decode instance that computes a prompt does
        # not, if there are pairs.
        self.answering = colocated + (decode or self.prefill)
        self.usual: NDArray[np.bool_] = np.ones(len(self), dtype=np.bool_)
        if self.pairs:
            self.usual[len(colocated) : len(alone)] = False
        self.every: NDArray[np.bool_] = np.ones(len(self), dtype=np.bool_)
        self.parts: IndexArray = np.zeros((len(load.by_slot), k.PARTS), dtype=np.int64)
        self.parts[self.allowed, k.ALLOWED] = 1
        self.parts[self.computes, k.COMPUTING] = 1
        self.parts[self.answering, k.ANSWERING] = 1
        self.arrays: k.SetArrays = (self.parts, self.table)
        # Columns of candidates, by slot: `_alone`, of a single instance; `_firsts`, of a prefill
        # instance's first pair, followed by its pairs with the decode instances of its pool.
        self._alone = {slot: at for at, slot in enumerate(alone)}
        firsts: list[int] = (len(alone) + np.cumsum([0, *counts[:-1]])).tolist()
        self._firsts = dict(zip(self.prefill, firsts, strict=False))
        self._turns = {
            slot: (pool, at)
            for pool, slots in partners.items()
            for at, slot in enumerate(slots.tolist())
        }
        self._pools = pools

    def __len__(self) -> int:
        return len(self.answers)

    def find(self, answers: int, computes: int) -> int | None:
        """Return the column of the candidate with these slots; None if there is none."""
        if answers == computes:
            return self._alone.get(answers)
        first, turn = self._firsts.get(computes), self._turns.get(answers)
        if first is None or turn is None or turn[0] != self._pools[computes]:
            return None
        return first + turn[1]


def _partners(load: Load, decode: list[int]) -> dict[int, IndexArray]:
    """Return the slots of decode instances that can receive KV, by the number of their pool."""
    slots = np.array(decode, dtype=np.int64)
    pools = load.kinds[slots, k.POOL]
    return {pool: slots[pools == pool] for pool in np.unique(pools).tolist() if pool >= 0}


class Candidates:
    """The candidates of a set, and their predicted seconds for one request.

    `predict` overwrites the arrays for the next request: copy values that must last.
    """

    def __init__(self, load: Load, candidate_set: CandidateSet) -> None:
        self.load = load
        self.candidate_set = candidate_set
        self._lines = load.by_slot
        self.prompt_tokens = 0
        self.whole_prefill = 0.0  # seconds of the prompt with nothing cached, fastest instance
        n = len(load.by_slot)
        self._used: Seconds = load.stats[:, k.USED]
        self._held: IndexArray = np.empty(n, np.int64)
        self._asked: IndexArray = np.empty((2 + k.MAX_SOURCES, n), np.int64)
        self._moved: Seconds = np.empty((2, 1 + k.MAX_SOURCES, n))
        self._sequences: IndexArray = np.empty((3, n), np.int64)
        self._contexts: Seconds = np.empty((3, n))
        self._questions: k.Questions = (
            self._asked,
            self._moved,
            self._sequences,
            self._contexts,
        )
        self._found: IndexArray = np.empty((k.FOUND, k.MAX_SOURCES), np.int64)
        by_instance: Seconds = np.empty((k.PER_INSTANCE, n))
        pulled: IndexArray = np.empty((k.PULLED, n), np.int64)
        by_candidate: Seconds = np.empty((k.PER_CANDIDATE, len(candidate_set)))
        self._predictions: k.Predictions = (by_instance, pulled, by_candidate)
        # [instances]: cached tokens; slot of the fetch's source (-1: no fetch); fetched tokens.
        self.cached: IndexArray = self._asked[1]
        self.source: IndexArray = pulled[k.FROM]
        self.fetched: IndexArray = pulled[k.FETCHED]
        self.prefixes: choosing.Prefixes = (self.source, self.cached, self.fetched)
        # [instances]: seconds if the prompt is computed there.
        self.fetch: Seconds = by_instance[k.FETCH]
        self.prefill: Seconds = by_instance[k.PREFILL]
        self.delays: Seconds = by_instance[k.DELAYS]  # of other queued prompts, summed
        self.stalls: Seconds = by_instance[k.STALLS]  # of answers decoding there, summed
        self.work: Seconds = by_instance[k.WORK]  # queued prefills, without this prompt
        self.instance_terms: choosing.InstanceTerms = (
            self.fetch,
            self.prefill,
            self.delays,
            self.stalls,
            self.work,
        )
        # [candidates]
        self.transfer: Seconds = by_candidate[k.TRANSFER]
        self.decode: Seconds = by_candidate[k.DECODES]  # without `stalls`
        self.first_token: Seconds = by_candidate[k.FIRST_TOKEN]
        self.candidate_terms: choosing.CandidateTerms = (
            self.transfer,
            self.decode,
            self.first_token,
        )

    def predict(
        self,
        request: PromptRequest,
        output_tokens: int,
        matches: Mapping[InstanceId, int],
        in_host: Mapping[InstanceId, int],
        now: float,
        *,
        fetches: bool,
        overlapped: bool = False,
    ) -> None:
        """Fill the arrays with predictions for a request.

        `output_tokens`: expected, at least 1; `matches`: tokens of the prompt held, by instance;
        `in_host`: those of them that are only in host memory; `fetches`: plans may pull prefixes;
        `overlapped`: KV goes to the decode instance during the prefill. Raises RuntimeError if
        members have changed since the set was made.
        """
        load, candidate_set, asked, moved = self.load, self.candidate_set, self._asked, self._moved
        if load.by_slot is not self._lines:  # compiled code checks no array bounds
            raise RuntimeError("the members have changed since the set of candidates was made")
        load.refresh()
        prompt = self.prompt_tokens = len(request.tokens)
        needed = prompt + output_tokens
        self._hold(matches)
        k.survey.run(
            load.arrays,
            candidate_set.arrays,
            self._held,
            prompt,
            output_tokens,
            fetches,
            self._questions,
            self._found,
        )
        longest, slots, tokens, (least, short, *_) = self._found.tolist()
        sources = _NO_SOURCES
        if slots[0] >= 0:
            sources = _sure_sources(load, request, slots, tokens, least)
            k.survey_sources.run(load.kinds, sources, prompt, asked, moved)
        count = sources.shape[1]
        steps = _step_seconds(load, self._sequences, self._contexts)
        floor = load.unhindered
        if short:
            floor = _memory_wait(load, request, needed, self.cached, steps, now)
        if max(longest) >= 0:
            floor = _wait_for_promises(load, request, longest, self.cached, floor, now)
        if in_host:
            floor = floor + _load_seconds(load, in_host)
        prefills = _prefill_seconds(load, prompt, asked[: 2 + count])
        moves = _NO_MOVES
        if count or candidate_set.pairs:
            moves = _move_seconds(load, moved[:, : 1 + count])
        self.whole_prefill = k.predict.run(
            load.arrays,
            candidate_set.arrays,
            asked,
            (steps, prefills, moves),
            sources,
            floor,
            (now, prompt, output_tokens, overlapped),
            self._predictions,
        )

    def _hold(self, matches: Mapping[InstanceId, int]) -> None:
        held, slots = self._held, self.load.slots
        held.fill(0)
        for instance, tokens in matches.items():
            slot = slots.get(instance)
            if slot is not None:
                held[slot] = tokens

    def weigh(
        self,
        *,
        first_token: float = 0.0,
        decode: float = 0.0,
        delays: float = 0.0,
        stalls: float = 0.0,
        work: float = 0.0,
    ) -> Seconds:
        """Return the weighted sums of the predicted seconds [candidates]."""
        scores = np.empty(len(self.first_token))
        choosing.weigh.run(
            self.candidate_set.computes,
            self.instance_terms,
            self.candidate_terms,
            (first_token, decode, delays, stalls, work),
            scores,
        )
        return scores

    def least(self, scores: Seconds, allowed: NDArray[np.bool_] | None = None) -> int:
        """Return the candidate with the least score. Near ties: first a `usual` candidate
        without fetch, then the least recently chosen.

        `allowed` [candidates]: only these; the scores of the others become infinite.
        """
        candidate_set = self.candidate_set
        return choosing.least.run(
            candidate_set.answers,
            candidate_set.computes,
            candidate_set.usual,
            candidate_set.every if allowed is None else allowed,
            self.fetched,
            self._used,
            self.whole_prefill,
            scores,
        )


def whole_prefill_seconds(load: Load, prompt: int) -> Seconds:
    """Return exec(x, 0) of a prompt of `prompt` tokens, [instances], with learnt factors."""
    load.refresh()
    asked = np.zeros((1, len(load.by_slot)), dtype=np.int64)
    seconds: Seconds = _prefill_seconds(load, prompt, asked)[0]
    seconds *= load.stats[:, k.PREFILL_FACTOR]
    return seconds


def _sure_sources(
    load: Load, request: PromptRequest, slots: list[int], tokens: list[int], least: int
) -> IndexArray:
    """Return sources of fetches [2, sources]: slots, and tokens that do not depend on unfinished
    prefills. Only sources with more than `least` tokens. `slots` and `tokens`: from `survey`."""
    sources = []
    for slot, held in zip(slots, tokens, strict=True):
        if slot < 0:
            break
        sure = load.promised_tokens(slot, request.namespace, request.tokens, held)
        if sure > least:
            sources.append((slot, sure))
    if not sources:
        return _NO_SOURCES
    return np.ascontiguousarray(np.array(sources, dtype=np.int64).T)


# --- calls of cost models -----------------------------------------------------------------


def _step_seconds(load: Load, sequences: IndexArray, contexts: Seconds) -> Seconds:
    """Return the seconds of decode steps in the shape of `sequences` and `contexts`, [3,
    instances]."""
    if len(load.cost_groups) == 1:
        costs = load.cost_groups[0].costs
        return _filled(costs.decode_step_seconds(sequences, contexts), sequences)
    seconds = np.empty(sequences.shape)
    for group in load.cost_groups:
        at = group.slots
        seconds[:, at] = group.costs.decode_step_seconds(sequences[:, at], contexts[:, at])
    return seconds


def _prefill_seconds(load: Load, prompt: int, asked: IndexArray) -> Seconds:
    """Return exec(x, y) in the shape of `asked`, cached tokens [rows, instances]."""
    if len(load.cost_groups) == 1:
        return _filled(load.cost_groups[0].costs.prefill_seconds(prompt, asked), asked)
    seconds = np.empty(asked.shape)
    for group in load.cost_groups:
        at = group.slots
        seconds[:, at] = group.costs.prefill_seconds(prompt, asked[:, at])
    return seconds


def _filled(seconds: Seconds, asked: IndexArray) -> Seconds:
    """Return `seconds` as a contiguous array in the shape of `asked`, for compiled code: a cost
    model may return a smaller shape that broadcasts."""
    if seconds.shape != asked.shape:
        seconds = np.broadcast_to(seconds, asked.shape)
    return np.ascontiguousarray(seconds)


def _move_seconds(load: Load, moved: Seconds) -> Seconds:
    """Return the seconds of transfers [groups, 2 (far, near), rows, instances] from an instance of
    each group. `moved` [2, rows, instances]: tokens and blocks."""
    tokens, blocks = moved
    seconds = np.empty((len(load.cost_groups), 2, *tokens.shape))
    for number, group in enumerate(load.cost_groups):
        costs = group.costs
        num_bytes = tokens * costs.kv_bytes_per_token
        for near, path in load.paths:
            seconds[number, near] = costs.transfer_seconds(num_bytes, blocks, path)
    return seconds


def _load_seconds(load: Load, in_host: Mapping[InstanceId, int]) -> Seconds:
    """Return the seconds [instances] until `in_host` tokens of KV are in HBM."""
    seconds = np.zeros(len(load.by_slot))
    for instance, tokens in in_host.items():
        slot = load.slots.get(instance)
        if slot is not None:
            spec = load.by_slot[slot].spec
            blocks = -(-tokens // spec.block_tokens)
            num_bytes = tokens * spec.costs.kv_bytes_per_token
            seconds[slot] = float(spec.costs.transfer_seconds(num_bytes, blocks, "host"))
    return seconds


# --- waits of a prompt for HBM and for unfinished prefills --------------------------------


def _memory_wait(
    load: Load,
    request: PromptRequest,
    needed: int,
    cached: IndexArray,
    steps: Seconds,
    now: float,
) -> Seconds:
    """Return the seconds [instances] until there is HBM for a sequence of `needed` tokens. Of the
    `cached` tokens [instances], those that running sequences hold need no further memory."""
    stats = load.stats
    wait = np.zeros(len(cached))
    short = stats[:, k.KV_TOKENS] + needed > stats[:, k.KV_CAPACITY]
    for slot in short.nonzero()[0].tolist():
        tokens = request.tokens[: cached[slot]]
        own = needed - load.shared_tokens(slot, request.namespace, tokens)
        if stats[slot, k.KV_TOKENS] + own > stats[slot, k.KV_CAPACITY]:
            busy = stats[slot, k.BATCH] > 0
            step = float(steps[1, slot] * stats[slot, k.STEP_FACTOR]) if busy else 0.0
            wait[slot] = load.memory_wait(slot, own, step, now)
    return wait


def _wait_for_promises(
    load: Load,
    request: PromptRequest,
    longest: list[int],
    cached: IndexArray,
    wait: Seconds,
    now: float,
) -> Seconds:
    """Return `wait` [instances], raised to the seconds of the queue where the matched prefix
    depends on unfinished prefills. Only the `longest` prefixes (slots, -1: none) are checked:
    shorter ones, which many instances have, are finished or cheap."""
    waits = None
    for slot in longest:
        if slot < 0:
            continue
        tokens = int(cached[slot])
        sure = load.promised_tokens(slot, request.namespace, request.tokens, tokens)
        if sure < tokens:
            if waits is None:
                waits = wait.copy()
            waits[slot] = max(waits[slot], load.queue_seconds(slot, now))
    return wait if waits is None else waits
