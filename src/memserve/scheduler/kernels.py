"""Compiled arithmetic of predictions: from the instances' loads to seconds of each candidate.

Index of `[instances]` arrays: slot of `Load`; of `[candidates]` arrays: column of `CandidateSet`.
Rows and columns are numbered in this file, because numba's cache of compiled code is only
invalidated by changes of the compiled file. Loops instead of numpy operations: for few instances
the call overhead of numpy dominates, and for many instances loops need no temporary arrays.
"""

from __future__ import annotations

import numpy as np

from memserve.scheduler.compiled import compiled, inlined
from memserve.scheduler.contract import Seconds
from memserve.types import IndexArray

MAX_SOURCES = 4  # holders of longer prefixes that are considered
STALL = 2.0  # weight of a second in which an answer stalls; a second of its decoding has weight 1
_INSTANT = 1e-9  # seconds; lower bound of divisors

# Related arguments are grouped in plain tuples: numba dispatches on the argument types of each
# call, which takes 0.3 us for a plain tuple (in C) and 4 us for a named tuple (in Python).
LoadArrays = tuple[Seconds, Seconds, IndexArray]
"""Arrays of `Load`: `stats`, `left` [instances, rows] (seconds left of each queued prompt),
`kinds`."""
SetArrays = tuple[IndexArray, IndexArray]
"""Arrays of `CandidateSet`: `parts`, `table`."""
Questions = tuple[IndexArray, Seconds, IndexArray, Seconds]
"""Arguments for cost models:

- `asked` [2 + sources, instances]: cached tokens; row 0: none, row 1: as the instance has now,
  from row 2 on: as it would have after a fetch from each source;
- `moved` [2, 1 + sources, instances]: tokens and blocks to transfer; row 0: the part of the prompt
  that the instance lacks, from row 1 on: a fetch from each source;
- `sequences`, `contexts` [3, instances]: decode batches and their context tokens; now, with all
  reserved answers, and with this request too.
"""
Answers = tuple[Seconds, Seconds, Seconds]
"""Seconds from cost models for these: `steps` [3, instances], `prefills` [2 + sources, instances],
`moves` [groups, 2 (far, near), 1 + sources, instances]."""
Request = tuple[float, int, int, bool]
"""`now`, prompt tokens, output tokens, `overlapped` (KV is sent during the prefill)."""
Predictions = tuple[Seconds, IndexArray, Seconds]
"""`by_instance`, `pulled`, `by_candidate`."""

_LOAD = "Tuple((float64[:,::1], float64[:,::1], int64[:,::1]))"
_SET = "Tuple((int64[:,::1], int64[:,::1]))"
_QUESTIONS = "Tuple((int64[:,::1], float64[:,:,::1], int64[:,::1], float64[:,::1]))"
_ANSWERS = "Tuple((float64[:,::1], float64[:,::1], float64[:,:,:,::1]))"
_REQUEST = "Tuple((float64, int64, int64, boolean))"
_PREDICTIONS = "Tuple((float64[:,::1], int64[:,::1], float64[:,::1]))"

# Columns of `Load.stats` [instances, STATS], float64.
QUEUED = 0  # prompts in `Load.left`
LEFT_AT = 1  # time of the queue's figures, seconds of the scheduler's clock
LEFT_TOTAL = 2  # seconds of prefill in the queue
UNDER_WAY = 3  # of LEFT_TOTAL: of the prompts in prefill
KV_TOKENS = 4  # reserved in HBM
RUNNING = 5  # sequences that decode now
BATCH = 6  # RUNNING, and sequences that will decode after their prefill
CONTEXT = 7  # tokens per sequence of BATCH, mean
REMAINING = 8  # tokens still to decode per sequence of BATCH, mean
WAIT_STEPS = 9  # decode steps until a full batch has room for one more
USED = 10  # turn of the last choice, for ties
PREFILL_FACTOR = 11  # learnt factors on the cost model's seconds
STEP_FACTOR = 12
FAR_FACTOR = 13  # of transfers to other hosts
NEAR_FACTOR = 14  # of transfers within a host: FAR_FACTOR + near
KV_CAPACITY = 15  # tokens of HBM; this and the columns after it are from `InstanceSpec`
SHORT_SHARE = 16
CHUNK_TOKENS = 17
MAX_RUNNING = 18
STATS = 19

# Columns of `Load.kinds` [instances, KINDS], int64.
BLOCK_TOKENS = 0
HOST = 1
GROUP = 2  # number of the `CostGroup`
POOL = 3  # KV moves between instances with equal numbers; -1: never
KINDS = 4

# Columns of `CandidateSet.parts` [instances, PARTS], int64: 1 or 0.
ALLOWED = 0
COMPUTING = 1
ANSWERING = 2  # regularly, by its role
PARTS = 3

# Rows of `CandidateSet.table` [2, candidates], int64.
ANSWERS = 0  # slot
COMPUTES = 1  # slot

# Rows of `found` in `survey` [FOUND, MAX_SOURCES], int64; -1: none.
LONGEST = 0  # of the longest prefixes, the slots whose queue is not empty
SOURCE = 1  # slots of prefixes that may be worth a fetch, one per (length, host, pool)
SOURCE_TOKENS = 2
SUMMARY = 3  # [0]: least cached tokens of COMPUTING instances; [1]: instances short of HBM
FOUND = 4

# Rows of `by_instance` [PER_INSTANCE, instances], float64: seconds if the prompt is computed there.
FETCH = 0
PREFILL = 1
DELAYS = 2  # of other queued prompts, summed
STALLS = 3  # of answers decoding there, summed, times STALL
WORK = 4  # prefill seconds in the queue, without this prompt
COMPUTED = 5  # from now until the prompt is computed
BUSY = 6  # from now until the instance could decode a prompt computed elsewhere
ROOM = 7  # until a full batch has room
DECODE = 8  # of the answer, and the slowdown of others by it; without STALLS
PER_INSTANCE = 9

# Rows of `pulled` [PULLED, instances], int64.
FROM = 0  # slot of the fetch's source; -1: no fetch
FETCHED = 1  # tokens
PULLED = 2

# Rows of `by_candidate` [PER_CANDIDATE, candidates], float64: seconds.
TRANSFER = 0
DECODES = 1  # without STALLS
FIRST_TOKEN = 2
PER_CANDIDATE = 3


@inlined
def _usable(tokens: int, block_tokens: int, prompt: int) -> int:
    """Reusable tokens of a cached prefix: whole blocks, and less than the prompt, whose last
    token must be computed for its logits."""
    most = min(tokens, max(prompt - 1, 0))
    return most - most % block_tokens


@compiled(f"void({_LOAD}, {_SET}, int64[::1], int64, int64, boolean, {_QUESTIONS}, int64[:,::1])")
def survey(
    load: LoadArrays,
    candidates: SetArrays,
    held: IndexArray,
    prompt: int,
    output: int,
    fetches: bool,
    questions: Questions,
    found: IndexArray,
) -> None:
    """Fill `found`, and `questions` except the rows of sources, for a prompt of `prompt` tokens
    and an answer of `output` tokens. `held` [instances]: cached tokens of the prompt."""
    stats, _, kinds = load
    parts, _ = candidates
    asked, moved, sequences, contexts = questions
    n, needed, half = len(stats), prompt + output, prompt + output / 2
    short, least = 0, prompt
    for i in range(n):
        block = kinds[i, BLOCK_TOKENS]
        cached = _usable(held[i], block, prompt)
        asked[0, i], asked[1, i] = 0, cached
        moved[0, 0, i] = prompt - cached
        moved[1, 0, i] = -(-(prompt - cached) // block)
        if parts[i, COMPUTING]:
            least = min(least, cached)
        short += stats[i, KV_TOKENS] + needed > stats[i, KV_CAPACITY]
        running, batch = stats[i, RUNNING], stats[i, BATCH]
        most, each = stats[i, MAX_RUNNING], stats[i, CONTEXT]
        # Sequences beyond MAX_RUNNING wait, and do not slow the batch.
        now, before, after = min(running, most), min(batch, most), min(batch + 1, most)
        sequences[0, i], sequences[1, i], sequences[2, i] = int(now), int(before), int(after)
        contexts[0, i] = each * min(now, batch)
        contexts[1, i] = each * before
        contexts[2, i] = each * min(after, batch) + half
    found[:] = -1
    found[SUMMARY, 0], found[SUMMARY, 1] = least, short
    _find_longest(stats, asked[1], found)
    if fetches:
        _find_sources(kinds, parts, asked[1], least, found)


@inlined
def _find_longest(stats: Seconds, cached: IndexArray, found: IndexArray) -> None:
    """Fill `found[LONGEST]`: of the MAX_SOURCES longest prefixes the slots with a queue. Ties: the
    lowest slot."""
    below, behind = np.iinfo(np.int64).max, -1
    for at in range(MAX_SOURCES):
        best = -1
        for i in range(len(cached)):
            follows = cached[i] < below or (cached[i] == below and i > behind)
            if follows and cached[i] > 0 and (best < 0 or cached[i] > cached[best]):
                best = i
        if best < 0:
            return
        below, behind = cached[best], best
        if stats[best, LEFT_TOTAL] > 0:
            found[LONGEST, at] = best


@inlined
def _find_sources(
    kinds: IndexArray, parts: IndexArray, cached: IndexArray, least: int, found: IndexArray
) -> None:
    for at in range(MAX_SOURCES):
        best = -1
        for i in range(len(cached)):
            if not parts[i, ALLOWED] or cached[i] <= least or kinds[i, POOL] < 0:
                continue
            if best >= 0 and cached[i] <= cached[best]:
                continue
            new = True
            for k in range(at):
                other = found[SOURCE, k]
                alike = (
                    kinds[other, HOST] == kinds[i, HOST] and kinds[other, POOL] == kinds[i, POOL]
                )
                if alike and found[SOURCE_TOKENS, k] == cached[i]:
                    new = False
            if new:
                best = i
        if best < 0:
            return
        found[SOURCE, at], found[SOURCE_TOKENS, at] = best, cached[best]


@compiled("void(int64[:,::1], int64[:,::1], int64, int64[:,::1], float64[:,:,::1])")
def survey_sources(
    kinds: IndexArray, sources: IndexArray, prompt: int, asked: IndexArray, moved: Seconds
) -> None:
    """Fill the rows of `sources` [2, sources] (slots, tokens): in `asked`, from row 2 on, cached
    tokens after a fetch; in `moved`, from row 1 on, fetched tokens and blocks."""
    for s in range(sources.shape[1]):
        block = kinds[sources[0, s], BLOCK_TOKENS]
        for i in range(len(kinds)):
            has = _usable(sources[1, s], kinds[i, BLOCK_TOKENS], prompt)
            extra = max(has - asked[1, i], 0)
            asked[2 + s, i] = has
            moved[0, 1 + s, i] = extra
            moved[1, 1 + s, i] = -(-extra // block)


@inlined
def _best_source(
    load: LoadArrays,
    asked: IndexArray,
    answers: Answers,
    sources: IndexArray,
    i: int,
    alone: float,
    factor: float,
) -> tuple[int, float]:
    """Best of `sources` to fetch from on instance `i`, and seconds of that fetch; -1 if fetch and
    shorter prefill take longer than `alone`, the prefill without a fetch, with every source.
    `factor`: slowdown of prefills by decode steps."""
    stats, _, kinds = load
    _, prefills, moves = answers
    best, least, pulling = -1, np.inf, 0.0
    for s in range(sources.shape[1]):
        if asked[2 + s, i] <= asked[1, i]:
            continue
        slot = sources[0, s]
        if kinds[slot, POOL] != kinds[i, POOL]:
            continue
        near = int(kinds[slot, HOST] == kinds[i, HOST])
        moving = moves[kinds[slot, GROUP], near, 1 + s, i] * stats[slot, FAR_FACTOR + near]
        total = moving + prefills[2 + s, i] * stats[i, PREFILL_FACTOR] * factor
        if total <= alone and total < least:
            best, least, pulling = s, total, moving
    return best, pulling


@inlined
def _queue(
    stats: Seconds, left: Seconds, i: int, now: float, prefill: float
) -> tuple[float, float, float]:
    """Seconds for a prompt of `prefill` seconds: its wait, the delay of the other queued prompts,
    summed, and all work in the queue."""
    # Since LEFT_AT the elapsed time is taken off all prompts in proportion: which of them is
    # computed matters little until one ends.
    gone = min(now - stats[i, LEFT_AT], stats[i, UNDER_WAY])
    rest = 1.0 - gone / max(stats[i, LEFT_TOTAL], _INSTANT)
    total, before, longer = 0.0, 0.0, 0
    for row in range(int(stats[i, QUEUED])):
        seconds = left[i, row] * rest
        total += seconds
        if seconds <= prefill:
            before += seconds
        else:
            longer += 1
    share = stats[i, SHORT_SHARE]
    if share <= 0:
        return total, 0.0, total
    # Shorter prompts and this one get `share` of each step; meanwhile the oldest get the rest.
    meanwhile = (before + prefill) * ((1 - share) / share)
    return before + min(meanwhile, total - before), longer * prefill, total


@inlined
def _usually_running(stats: Seconds, parts: IndexArray) -> float:
    """Mean number of decoding sequences per ANSWERING instance."""
    running, answering = 0.0, 0
    for i in range(len(stats)):
        if parts[i, ANSWERING]:
            running += stats[i, RUNNING]
            answering += 1
    return running / answering


@inlined
def _steps(stats: Seconds, steps: Seconds, i: int) -> tuple[float, float, float]:
    """Seconds of a decode step: now, with all reserved answers, and with this request too."""
    factor = stats[i, STEP_FACTOR]
    now = steps[0, i] * factor if stats[i, RUNNING] > 0 else 0.0
    before = steps[1, i] * factor if stats[i, BATCH] > 0 else 0.0
    return now, before, steps[2, i] * factor


@compiled(
    f"float64({_LOAD}, {_SET}, int64[:,::1], {_ANSWERS}, int64[:,::1], float64[::1], {_REQUEST}, "
    f"{_PREDICTIONS})"
)
def predict(
    load: LoadArrays,
    candidates: SetArrays,
    asked: IndexArray,
    answers: Answers,
    sources: IndexArray,
    floor: Seconds,
    request: Request,
    predictions: Predictions,
) -> float:
    """Fill `predictions`; returns seconds of the prefill with nothing cached, the least of all
    instances.

    `asked`: of `Questions`; `answers`: seconds from cost models; `sources` [2, sources]: slots and
    tokens; `floor` [instances]: least seconds that the prompt waits.
    """
    stats, left, kinds = load
    parts, table = candidates
    steps, prefills, moves = answers
    now, prompt, output, overlapped = request
    by_instance, pulled, by_candidate = predictions
    usual, least = _usually_running(stats, parts), np.inf
    for i in range(len(stats)):
        running, batch = stats[i, RUNNING], stats[i, BATCH]
        step, before, after = _steps(stats, steps, i)
        whole = prefills[0, i] * stats[i, PREFILL_FACTOR]
        least = min(least, whole)
        # Each chunk of the prompt is computed in a step that also decodes, and takes that longer.
        slowed = step * (prompt / stats[i, CHUNK_TOKENS]) / max(whole, _INSTANT) + 1.0
        alone = prefills[1, i] * stats[i, PREFILL_FACTOR] * slowed
        prefill, fetch, pulled[FROM, i], pulled[FETCHED, i] = alone, 0.0, -1, 0
        if sources.shape[1]:
            best, pulling = _best_source(load, asked, answers, sources, i, alone, slowed)
            if best >= 0:
                prefill = prefills[2 + best, i] * stats[i, PREFILL_FACTOR] * slowed
                fetch = pulling
                pulled[FROM, i] = sources[0, best]
                pulled[FETCHED, i] = asked[2 + best, i] - asked[1, i]
        wait, delays, work = _queue(stats, left, i, now, prefill)
        queue, room = max(wait, floor[i]), stats[i, WAIT_STEPS] * before
        # Slowdown of the batch's other answers by this one, summed.
        slower = max(after - before, 0.0) * batch * min(stats[i, REMAINING], float(output))
        # At least the mean number of sequences: an instance with fewer will get more before the
        # prefill ends, or else the other instances will.
        stalled = max(running, usual * parts[i, ANSWERING])
        by_instance[FETCH, i], by_instance[PREFILL, i] = fetch, prefill
        by_instance[DELAYS, i], by_instance[WORK, i] = delays, work
        by_instance[STALLS, i] = stalled * STALL * prefill
        by_instance[COMPUTED, i] = queue + fetch + prefill
        by_instance[ROOM, i], by_instance[BUSY, i] = room, room + queue
        by_instance[DECODE, i] = (output - 1) * after + slower
    _candidates(stats, kinds, table, moves, overlapped, by_instance, by_candidate)
    return least


@inlined
def _candidates(
    stats: Seconds,
    kinds: IndexArray,
    table: IndexArray,
    moves: Seconds,
    overlapped: bool,
    by_instance: Seconds,
    by_candidate: Seconds,
) -> None:
    for at in range(table.shape[1]):
        a, c = table[ANSWERS, at], table[COMPUTES, at]
        move, ready, decode = 0.0, by_instance[COMPUTED, c], by_instance[DECODE, a]
        if a == c:
            ready += by_instance[ROOM, c]
        else:
            near = int(kinds[c, HOST] == kinds[a, HOST])
            move = moves[kinds[c, GROUP], near, 0, a] * stats[c, FAR_FACTOR + near]
            if overlapped:
                move = max(move - by_instance[PREFILL, c], 0.0)
            ready += move
            # A full batch, or prompts that the decode instance computes itself, delay the answer.
            decode += max(by_instance[BUSY, a] - ready, 0.0)
        by_candidate[TRANSFER, at] = move
        by_candidate[DECODES, at] = decode
        by_candidate[FIRST_TOKEN, at] = ready
