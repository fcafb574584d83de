"""Every way to run one request, and how long each should take.

Here is asked for what a prediction needs, of the load, of prompts that wait and of cost models;
`kernels` computes it. All arrays over `[instances]` go by slot of `Load`, those over
`[candidates]` by `CandidateSet`.
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

_NO_SOURCES: IndexArray = np.empty((2, 0), dtype=np.int64)
_NO_MOVES: Seconds = np.empty((0, 2, 0, 0))


class CandidateSet:
    """The candidates that a set of instances allows: first each that does all of it, then each
    prefill instance with each decode instance. Holds until members or their roles change."""

    def __init__(self, load: Load, among: Collection[InstanceId] | None = None) -> None:
        """`among`: only these, and of them those that `load` has; None: all."""
        slots = range(len(load.lines))
        self.allowed: list[int] = [
            at for at in slots if among is None or load.lines[at].spec.id in among
        ]
        self.prefill = load.with_role(Role.PREFILL, self.allowed)
        decode = load.with_role(Role.DECODE, self.allowed)
        colocated = load.with_role(Role.COLOCATED, self.allowed)
        # Roles are soft: where nobody decodes, a prefill instance answers.
        alone = colocated + (decode or self.prefill)
        pools = load.kinds[:, k.POOL].tolist()
        pairs = [
            (d, p) for p in self.prefill for d in decode if pools[p] == pools[d] and pools[p] >= 0
        ]
        whole = [(at, at) for at in alone]
        table = np.array(whole + pairs, dtype=np.int64).reshape(-1, 2).T
        self.table: IndexArray = np.ascontiguousarray(table)
        self.answers, self.computes = self.table
        self.pairs = len(pairs)
        # As roles are meant: a decode instance computes prompts only where nobody else does.
        self.answering = colocated + (decode or self.prefill)
        self.usual: NDArray[np.bool_] = np.ones(len(self), dtype=np.bool_)
        if pairs:
            self.usual[len(colocated) : len(alone)] = False
        self.every: NDArray[np.bool_] = np.ones(len(self), dtype=np.bool_)
        self.parts: IndexArray = np.zeros((len(load.lines), k.PARTS), dtype=np.int64)
        self.parts[self.allowed, k.ALLOWED] = 1
        self.parts[self.computes, k.COMPUTING] = 1
        self.parts[self.answering, k.ANSWERING] = 1
        self.arrays: k.SetArrays = (self.parts, self.table)
        self._find = {ways: at for at, ways in enumerate(whole + pairs)}

    def __len__(self) -> int:
        return len(self.answers)

    def find(self, answers: int, computes: int) -> int | None:
        """The candidate with these slots."""
        return self._find.get((answers, computes))


class Candidates:
    """Every candidate of a set, and its predicted seconds for one request.

    The arrays are made once, and `predict` fills them again for the next request: whoever wants
    to keep stats takes copies.
    """

    def __init__(self, load: Load, candidate_set: CandidateSet) -> None:
        self.load = load
        self.candidate_set = candidate_set
        self._lines = load.lines
        self.prompt_tokens = 0
        self.whole_prefill = 0.0  # seconds, the least, of the prompt with nothing cached
        n = len(load.lines)
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
        # [instances]: tokens, and of those that are pulled whose they are; -1: nobody's
        self.cached: IndexArray = self._asked[1]
        self.source: IndexArray = pulled[k.FROM]
        self.fetched: IndexArray = pulled[k.FETCHED]
        self.prefixes: choosing.Prefixes = (self.source, self.cached, self.fetched)
        # [instances]: of computing the prompt
        self.fetch: Seconds = by_instance[k.FETCH]
        self.prefill: Seconds = by_instance[k.PREFILL]
        self.delays: Seconds = by_instance[k.DELAYS]
        self.stalls: Seconds = by_instance[k.STALLS]  # that answers there see, together
        self.work: Seconds = by_instance[k.WORK]  # before it, whatever it takes itself
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
        now: float,
        *,
        fetches: bool,
        overlapped: bool = False,
    ) -> None:
        """Predict every candidate. `output_tokens` is what is expected, at least 1; `matches` what
        instances are known to hold of the prompt; `overlapped`: KV goes to the decode instance
        while the prompt is computed.

        RuntimeError: members have changed since the set was made.
        """
        load, candidate_set, asked, moved = self.load, self.candidate_set, self._asked, self._moved
        if load.lines is not self._lines:  # compiled code does not look where arrays end
            raise RuntimeError("a set of candidates of former members")
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
            floor = _wait_for_promises(load, request, longest, self.cached, floor)
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
        """Their weighted sum, [candidates]."""
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
        """The least score. Of those as good as equal: roles as they are meant and no copies of KV
        that are not needed, then what was used the longest ago.

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
    """exec(x, 0), [instances]."""
    load.refresh()
    asked = np.zeros((1, len(load.lines)), dtype=np.int64)
    seconds: Seconds = _prefill_seconds(load, prompt, asked)[0]
    seconds *= load.stats[:, k.PREFILL_FACTOR]
    return seconds


def _sure_sources(
    load: Load, request: PromptRequest, slots: list[int], tokens: list[int], least: int
) -> IndexArray:
    """Slots and tokens [2, sources] of prefixes that are there for certain, and longer than what
    every instance has. `slots` and `tokens` as `survey` found them."""
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


# --- what cost models are asked -----------------------------------------------------------


def _step_seconds(load: Load, sequences: IndexArray, contexts: Seconds) -> Seconds:
    """Of decode steps, in the shape of the batches."""
    if len(load.cost_groups) == 1:
        costs = load.cost_groups[0].costs
        return _filled(costs.decode_step_seconds(sequences, contexts), sequences)
    seconds = np.empty(sequences.shape)
    for group in load.cost_groups:
        at = group.slots
        seconds[:, at] = group.costs.decode_step_seconds(sequences[:, at], contexts[:, at])
    return seconds


def _prefill_seconds(load: Load, prompt: int, asked: IndexArray) -> Seconds:
    """exec(x, y), [rows, instances] as asked."""
    if len(load.cost_groups) == 1:
        return _filled(load.cost_groups[0].costs.prefill_seconds(prompt, asked), asked)
    seconds = np.empty(asked.shape)
    for group in load.cost_groups:
        at = group.slots
        seconds[:, at] = group.costs.prefill_seconds(prompt, asked[:, at])
    return seconds


def _filled(seconds: Seconds, asked: IndexArray) -> Seconds:
    """For each that was asked for, as compiled code reads it, also if they are all the same."""
    if seconds.shape != asked.shape:
        seconds = np.broadcast_to(seconds, asked.shape)
    return np.ascontiguousarray(seconds)


def _move_seconds(load: Load, moved: Seconds) -> Seconds:
    """From an instance of each group, far and near: [groups, 2, rows, instances], with `moved`
    [2, rows, instances] tokens and blocks."""
    tokens, blocks = moved
    seconds = np.empty((len(load.cost_groups), 2, *tokens.shape))
    for number, group in enumerate(load.cost_groups):
        costs = group.costs
        num_bytes = tokens * costs.kv_bytes_per_token
        for near, path in load.paths:
            seconds[number, near] = costs.transfer_seconds(num_bytes, blocks, path)
    return seconds


# --- what a prompt waits for, besides others' turns ---------------------------------------


def _memory_wait(
    load: Load,
    request: PromptRequest,
    needed: int,
    cached: IndexArray,
    steps: Seconds,
    now: float,
) -> Seconds:
    """Until there is HBM for a sequence of `needed` tokens, [instances]."""
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
    load: Load, request: PromptRequest, longest: list[int], cached: IndexArray, wait: Seconds
) -> Seconds:
    """`wait` [instances], and where a prefix counts that others' prompts have yet to bring, until
    they are computed. Looks at the `longest` prefixes alone (slots, -1: none): what many instances
    have is there, or costs little."""
    waits = None
    for slot in longest:
        if slot < 0:
            continue
        tokens = int(cached[slot])
        sure = load.promised_tokens(slot, request.namespace, request.tokens, tokens)
        if sure < tokens:
            if waits is None:
                waits = wait.copy()
            waits[slot] = max(waits[slot], load.stats[slot, k.LEFT_TOTAL])
    return wait if waits is None else waits
