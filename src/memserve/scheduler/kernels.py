"""The arithmetic of predictions, compiled: from what instances have to do to seconds.

Arrays over `[instances]` go by slot of `Load`, those over `[candidates]` by `CandidateSet`.
Their columns and rows are numbered here, because compiled code is kept until its own file changes.
Everything is written out one figure at a time: for a few instances an operation on a whole array
takes longer to begin than to do, and for many no array is written that is read only once.
"""

from __future__ import annotations

import numpy as np

from memserve.scheduler.compiled import compiled, inlined
from memserve.scheduler.contract import Seconds
from memserve.types import IndexArray

MAX_SOURCES = 4  # holders of longer prefixes that are looked at
# A second in which an answer stands still, beside one in which it is decoded.
STALL = 2.0
_INSTANT = 1e-9  # seconds, instead of none in a quotient

# Arguments that belong together are plain tuples: numba learns the type of each call's arguments,
# of a plain tuple in C (0.3 us), of a named one in Python (4 us).
LoadArrays = tuple[Seconds, Seconds, IndexArray]
"""Of `Load`: `stats`, `left` [instances, rows] (seconds of each prompt in the queue), `kinds`."""
SetArrays = tuple[IndexArray, IndexArray]
"""Of `CandidateSet`: `parts`, `table`."""
Questions = tuple[IndexArray, Seconds, IndexArray, Seconds]
"""What cost models are asked: cached tokens `asked` [2 + sources, instances] (nothing, what is
there, what it would be with each source); `moved` [2, 1 + sources, instances] (the tokens that each
lacks or pulls, and their blocks); `sequences` and `contexts` [3, instances] of decode steps as they
are now, with what is to come, and with this request."""
Answers = tuple[Seconds, Seconds, Seconds]
"""Seconds, as cost models answer: `steps` [3, instances], `prefills` [2 + sources, instances],
`moves` [groups, far or near, 1 + sources, instances]."""
Request = tuple[float, int, int, bool]
"""`now`, tokens of the prompt and of the answer, whether KV is sent while it is computed."""
Predictions = tuple[Seconds, IndexArray, Seconds]
"""`by_instance`, `pulled`, `by_candidate`."""

_LOAD = "Tuple((float64[:,::1], float64[:,::1], int64[:,::1]))"
_SET = "Tuple((int64[:,::1], int64[:,::1]))"
_QUESTIONS = "Tuple((int64[:,::1], float64[:,:,::1], int64[:,::1], float64[:,::1]))"
_ANSWERS = "Tuple((float64[:,::1], float64[:,::1], float64[:,:,:,::1]))"
_REQUEST = "Tuple((float64, int64, int64, boolean))"
_PREDICTIONS = "Tuple((float64[:,::1], int64[:,::1], float64[:,::1]))"

# `Load.stats` [instances, STATS], float64.
QUEUED = 0  # prompts that are told apart in `Load.left`
LEFT_AT = 1  # the time of the queue's stats
LEFT_TOTAL = 2  # seconds in the queue
UNDER_WAY = 3  # of them, before one of the prompts has ended
KV_TOKENS = 4  # reserved in HBM
RUNNING = 5  # sequences that decode now
BATCH = 6  # and those that will when their prompts are computed
CONTEXT = 7  # tokens of each of them
REMAINING = 8  # tokens of each of their answers to come, in the mean
WAIT_STEPS = 9  # until a full batch has room for one more
USED = 10  # turn in which it was last chosen, for ties
PREFILL_FACTOR = 11  # what was learnt beside the cost model
STEP_FACTOR = 12
TRANSFER_FACTOR = 13
KV_CAPACITY = 14  # from here on what only members change
SHORT_SHARE = 15
CHUNK_TOKENS = 16
MAX_RUNNING = 17
STATS = 18

# `Load.kinds` [instances, KINDS], int64.
BLOCK_TOKENS = 0
HOST = 1
GROUP = 2  # of instances with the same cost model
POOL = 3  # number of those between which KV can move; -1: to nobody
KINDS = 4

# `CandidateSet.parts` [instances, PARTS], int64: 1 or 0.
ALLOWED = 0
COMPUTING = 1
ANSWERING = 2  # as roles are meant
PARTS = 3

# `CandidateSet.table` [2, candidates], int64.
ANSWERS = 0  # slot
COMPUTES = 1  # slot

# `found` of `survey` [FOUND, MAX_SOURCES], int64; -1: nobody.
LONGEST = 0  # slots of the longest prefixes where prompts wait
SOURCE = 1  # slots of prefixes that may be worth pulling, one of each length, host and pool
SOURCE_TOKENS = 2
SUMMARY = 3  # the least that is cached where prompts are computed; instances short of HBM
FOUND = 4

# `by_instance` [PER_INSTANCE, instances], float64: seconds, of computing the prompt there.
FETCH = 0
PREFILL = 1
DELAYS = 2
STALLS = 3  # that answers there see of it, together
WORK = 4  # before it, whatever it takes itself
COMPUTED = 5  # until it is
BUSY = 6  # until somebody else's prompt could be answered there
ROOM = 7  # until a full batch has room
DECODE = 8  # of the answer, without STALLS
PER_INSTANCE = 9

# `pulled` [PULLED, instances], int64.
FROM = 0  # slot whose longer prefix is pulled; -1: nobody's
FETCHED = 1  # tokens
PULLED = 2

# `by_candidate` [PER_CANDIDATE, candidates], float64: seconds.
TRANSFER = 0
DECODES = 1  # without STALLS
FIRST_TOKEN = 2
PER_CANDIDATE = 3


@inlined
def _usable(tokens: int, block_tokens: int, prompt: int) -> int:
    """Whole blocks, and never all of a prompt, since the last token's logits are needed."""
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
    """Fill `questions`, but for what sources would bring, and `found`, for a prompt of `prompt`
    tokens, of which instances have `held` [instances], and an answer of `output` tokens."""
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
        # Beyond what fits into a batch, sequences wait and do not slow it down.
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
    """Ties: the lowest slot."""
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
    """What each of `sources` [2, sources] (slots, tokens) would give each instance: adds to
    `asked`, from row 2 on, what it then has, and to `moved`, from row 1 on, what it would pull."""
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
    """Which of `sources` is worth pulling from, -1: none, and seconds of that: it costs no more
    than it saves of `alone`, the prefill without. `factor`: of predicted prefills there."""
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
        moving = moves[kinds[slot, GROUP], near, 1 + s, i] * stats[slot, TRANSFER_FACTOR]
        total = moving + prefills[2 + s, i] * stats[i, PREFILL_FACTOR] * factor
        if total <= alone and total < least:
            best, least, pulling = s, total, moving
    return best, pulling


@inlined
def _queue(
    stats: Seconds, left: Seconds, i: int, now: float, prefill: float
) -> tuple[float, float, float]:
    """What a prompt of `prefill` seconds would meet: how much later it would be computed, how
    much later the others would be, together, and all that is there."""
    # Between events time is taken off all prompts alike: which is computed matters little
    # until one of them ends.
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
    # With the shorter ones it gets its share; the oldest ones get theirs meanwhile.
    meanwhile = (before + prefill) * ((1 - share) / share)
    return before + min(meanwhile, total - before), longer * prefill, total


@inlined
def _usually_running(stats: Seconds, parts: IndexArray) -> float:
    """Sequences that decode on an instance that answers, in the mean."""
    running, answering = 0.0, 0
    for i in range(len(stats)):
        if parts[i, ANSWERING]:
            running += stats[i, RUNNING]
            answering += 1
    return running / answering


@inlined
def _steps(stats: Seconds, steps: Seconds, i: int) -> tuple[float, float, float]:
    """Seconds of a decode step as it is now, with what is to come, and with this request."""
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
    """Fill `predictions`; returns the least prefill of the prompt with nothing cached, seconds.

    `asked` and `answers`: the questions to cost models, and theirs; `sources` [2, sources] slots
    and tokens; `floor` [instances] seconds that the prompt waits at least.
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
        # Each chunk of the prompt takes as long as a step of decoding does besides.
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
        # The answer, and what it costs those beside it.
        slower = max(after - before, 0.0) * batch * min(stats[i, REMAINING], float(output))
        # If fewer are decoded than on the others, more will come before the prefill ends, or
        # crowd elsewhere.
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
            move = moves[kinds[c, GROUP], near, 0, a] * stats[c, TRANSFER_FACTOR]
            if overlapped:
                move = max(move - by_instance[PREFILL, c], 0.0)
            ready += move
            # A full batch, or prompts that the decode instance computes itself, hold it up.
            decode += max(by_instance[BUSY, a] - ready, 0.0)
        by_candidate[TRANSFER, at] = move
        by_candidate[DECODES, at] = decode
        by_candidate[FIRST_TOKEN, at] = ready
