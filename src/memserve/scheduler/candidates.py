"""Every way to run one request, and how long each should take.

All arrays over `[instances]` go by slot of `Load`, those over `[candidates]` by `Roster`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from memserve.scheduler.contract import Path, PromptRequest, Seconds
from memserve.scheduler.load import Load
from memserve.scheduler.steps import Steps
from memserve.types import IndexArray, InstanceId, Role

MAX_SOURCES = 4  # holders of longer prefixes that are looked at
_PATHS: tuple[Path, Path] = ("nixl", "shm")  # by `near`
_NEVER = np.inf


class Roster:
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
        pairs_p = np.repeat(np.array(self.prefill, dtype=np.int64), len(decode))
        pairs_d = np.tile(np.array(decode, dtype=np.int64), len(self.prefill))
        solo = np.array(alone, dtype=np.int64)
        self.answers: IndexArray = np.concatenate([solo, pairs_d])
        self.computes: IndexArray = np.concatenate([solo, pairs_p])
        self.solo = solo
        self.pairs = len(pairs_p)
        self.pair_answers = pairs_d
        self.pair_computes = pairs_p
        self.pair_group = load.group[pairs_p]
        self.pair_near = load.near[pairs_p, pairs_d].astype(np.int64)
        # Which predictions of transfers the pairs need.
        kinds = zip(self.pair_group.tolist(), self.pair_near.tolist(), strict=True)
        self.transfer_kinds = sorted(set(kinds))
        self.decode = np.array(decode, dtype=np.int64)
        self.computing = np.unique(self.computes)
        # As roles are meant: a decode instance computes prompts only where nobody else does.
        self.answering = colocated + (decode or self.prefill)
        self.is_answering = np.zeros(len(load.lines))
        self.is_answering[self.answering] = 1.0
        self.usual = np.ones(len(self.answers), dtype=bool)
        if self.pairs:
            self.usual[len(colocated) : len(solo)] = False
        self.is_allowed = np.zeros(len(load.lines), dtype=bool)
        self.is_allowed[self.allowed] = True
        self._find = {
            (a, c): at
            for at, (a, c) in enumerate(
                zip(self.answers.tolist(), self.computes.tolist(), strict=True)
            )
        }

    def __len__(self) -> int:
        return len(self.answers)

    def find(self, answers: int, computes: int) -> int | None:
        """The candidate with these slots."""
        return self._find.get((answers, computes))


@dataclass(frozen=True, slots=True)
class Candidates:
    """Predicted seconds of every candidate for one request."""

    load: Load
    roster: Roster
    prompt_tokens: int
    cached: IndexArray  # [instances]
    source: IndexArray  # [instances] whose longer prefix is pulled; -1: nobody's
    fetched: IndexArray  # [instances] tokens
    # Of computing the prompt, [instances].
    fetch: Seconds
    prefill: Seconds
    delays: Seconds
    stall: Seconds  # that answers there see of it, together
    work: Seconds  # before it, whatever it takes itself
    # [candidates]
    transfer: Seconds
    decode: Seconds  # without `stall`
    first_token: Seconds
    whole_prefill: float  # the least, of the prompt with nothing cached

    def terms(self, which: IndexArray) -> list[Seconds]:
        """Those of some candidates, in the order of `Terms`."""
        at = self.roster.computes[which]
        waits = self.first_token[which] - self.transfer[which]
        waits -= (self.fetch + self.prefill)[at]
        np.maximum(waits, 0.0, out=waits)  # what rounding left
        return [
            waits,
            self.fetch[at],
            self.prefill[at],
            self.transfer[which],
            self.decode[which] + self.stall[at],
            self.delays[at],
        ]


@dataclass(frozen=True, slots=True)
class Fetches:
    """The prefix that each instance would pull first, [instances]."""

    source: IndexArray  # slot; -1: nobody's
    tokens: IndexArray
    seconds: Seconds
    prefill: Seconds  # of what then remains


def cached_tokens(load: Load, matches: Mapping[InstanceId, int], prompt_tokens: int) -> IndexArray:
    """What each instance need not compute, [instances]: whole blocks, and never all of it,
    since the last token's logits are needed."""
    cached = [0] * len(load.lines)
    slots = load.slots
    for instance, tokens in matches.items():
        slot = slots.get(instance)
        if slot is not None:
            cached[slot] = tokens
    return _usable(np.array(cached, dtype=np.int64), load.block_tokens, prompt_tokens)


def _usable(tokens: IndexArray, block_tokens: IndexArray, prompt_tokens: int) -> IndexArray:
    most = np.minimum(tokens, max(prompt_tokens - 1, 0))
    usable: IndexArray = most - most % block_tokens
    return usable


def evaluate(
    load: Load,
    roster: Roster,
    request: PromptRequest,
    matches: Mapping[InstanceId, int],
    now: float,
    *,
    fetches: bool,
    overlapped: bool = False,
) -> Candidates:
    """Predict every candidate. `request.output_tokens` is what is expected; `overlapped`: KV
    goes to the decode instance while the prompt is computed."""
    load.refresh()
    prompt, output = len(request.tokens), max(request.output_tokens, 1)
    cached = cached_tokens(load, matches, prompt)
    steps = Steps.predict(load, prompt + output / 2)
    sources = _sources(load, roster, request, cached) if fetches else []
    asked = _asked(load, prompt, cached, sources)
    seconds = _prefill_seconds(load, prompt, asked)
    whole = seconds[0]
    seconds[1:] *= steps.prefill_slowdown(load, prompt, whole)
    pulled = _best_fetches(load, sources, asked[1:], seconds[1:])
    prefill = pulled.prefill
    answering, slot_wait = steps.decode_seconds(load, output)
    queues = load.queues(now, prefill)
    queue = np.maximum(queues.wait, _memory_wait(load, request, cached, steps, now))
    _wait_for_promises(load, request, cached, queue)
    stall = steps.stall_seconds(load, roster.is_answering, prefill)

    alone = len(roster.solo)
    computed = queue + pulled.seconds
    computed += prefill
    first_token = computed[roster.computes]
    first_token[:alone] += slot_wait[roster.solo]
    decode = answering[roster.answers]
    transfer = np.zeros(len(roster))
    if roster.pairs:
        moved = transfer[alone:]
        moved += _transfer_seconds(load, roster, prompt, cached)
        if overlapped:
            moved -= prefill[roster.pair_computes]
            np.maximum(moved, 0.0, out=moved)
        _hand_over(roster, moved, slot_wait + queue, first_token, decode)
    return Candidates(
        load=load,
        roster=roster,
        prompt_tokens=prompt,
        cached=cached,
        source=pulled.source,
        fetched=pulled.tokens,
        fetch=pulled.seconds,
        prefill=prefill,
        delays=queues.delays,
        stall=stall,
        work=queues.work,
        transfer=transfer,
        decode=decode,
        first_token=first_token,
        whole_prefill=float(whole.min()),
    )


def _hand_over(
    roster: Roster, moved: Seconds, busy: Seconds, first_token: Seconds, decode: Seconds
) -> None:
    """Add to pairs that KV moves for `moved` [pairs] seconds, to instances that have no time for
    `busy` [instances] seconds: to `first_token` and `decode`, [candidates]."""
    alone = len(roster.solo)
    ready = first_token[alone:]
    ready += moved
    # A full batch, or prompts that the decode instance computes itself, hold it up.
    held_up = busy[roster.pair_answers]
    held_up -= ready
    decode[alone:] += np.maximum(held_up, 0.0, out=held_up)


def whole_prefill_seconds(load: Load, prompt: int) -> Seconds:
    """exec(x, 0), [instances]."""
    load.refresh()
    asked = np.zeros((1, len(load.lines)), dtype=np.int64)
    seconds: Seconds = _prefill_seconds(load, prompt, asked)[0]
    return seconds


def _asked(
    load: Load, prompt: int, cached: IndexArray, sources: list[tuple[int, int]]
) -> IndexArray:
    """Cached tokens with which prefills are predicted, [2 + sources, instances]: none, those
    that are there, and those of each source."""
    asked = np.zeros((2 + len(sources), len(cached)), dtype=np.int64)
    asked[1] = cached
    if sources:
        held = np.array([[tokens] for _, tokens in sources])
        asked[2:] = _usable(held, load.block_tokens, prompt)
    return asked


def _prefill_seconds(load: Load, prompt: int, asked: IndexArray) -> Seconds:
    """exec(x, y), [rows, instances] as asked."""
    seconds = np.empty(asked.shape)
    for group in load.cost_groups:
        at = group.slots
        seconds[:, at] = group.costs.prefill_seconds(prompt, asked[:, at])
    seconds *= load.prefill_factor
    return seconds


def _memory_wait(
    load: Load, request: PromptRequest, cached: IndexArray, steps: Steps, now: float
) -> Seconds:
    """Until there is HBM for the sequence, [instances]."""
    wait = np.zeros(len(cached))
    needed = len(request.tokens) + request.output_tokens
    short = load.kv_tokens + needed > load.kv_capacity
    for slot in short.nonzero()[0].tolist():
        tokens = request.tokens[: cached[slot]]
        own = needed - load.shared_tokens(slot, request.namespace, tokens)
        if load.kv_tokens[slot] + own > load.kv_capacity[slot]:
            wait[slot] = load.memory_wait(slot, own, float(steps.before[slot]), now)
    return wait


def _wait_for_promises(
    load: Load, request: PromptRequest, cached: IndexArray, queue: Seconds
) -> None:
    """A prefix that others' prompts have yet to bring is there when they are computed. Looks at
    the longest prefixes alone: what many instances have is there, or costs little."""
    longest = (-cached).argsort(kind="stable")[:MAX_SOURCES]
    for slot in longest.tolist():
        tokens = int(cached[slot])
        if not tokens or load.left_total[slot] <= queue[slot]:
            continue
        sure = load.promised_tokens(slot, request.namespace, request.tokens[:tokens])
        if sure < tokens:
            queue[slot] = load.left_total[slot]


def _transfer_seconds(load: Load, roster: Roster, prompt: int, cached: IndexArray) -> Seconds:
    """From P to D what D lacks, [pairs]."""
    slots = roster.decode
    lacking = prompt - cached[slots]
    pieces = -(-lacking // load.block_tokens[slots])
    seconds = np.zeros((len(load.cost_groups), 2, len(cached)))
    for number, near in roster.transfer_kinds:
        costs = load.cost_groups[number].costs
        num_bytes = lacking * costs.kv_bytes_per_token
        seconds[number, near, slots] = costs.transfer_seconds(num_bytes, pieces, _PATHS[near])
    moves: Seconds = seconds[roster.pair_group, roster.pair_near, roster.pair_answers]
    moves *= load.transfer_factor[roster.pair_computes]
    return moves


def _no_fetches(prefill: Seconds) -> Fetches:
    n = len(prefill)
    nobody = np.full(n, -1, dtype=np.int64)
    return Fetches(nobody, np.zeros(n, dtype=np.int64), np.zeros(n), prefill)


def _best_fetches(
    load: Load, sources: list[tuple[int, int]], held: IndexArray, prefill: Seconds
) -> Fetches:
    """For each instance the prefix worth pulling: it costs no more than it saves.

    `held` and `prefill` [1 + sources, instances]: tokens and seconds without, and with each.
    """
    alone = prefill[0]
    if not sources:
        return _no_fetches(alone)
    slots = np.array([slot for slot, _ in sources])
    extra = np.maximum(held[1:] - held[0], 0)
    moved = _pull_seconds(load, slots, extra)
    total = moved + prefill[1:]
    total[(extra == 0) | (total > alone)] = _NEVER
    best = total.argmin(axis=0)
    at = best, load.every
    pays = total[at] < _NEVER
    if not pays.any():
        return _no_fetches(alone)
    return Fetches(
        source=np.where(pays, slots[best], -1),
        tokens=extra[at] * pays,
        seconds=moved[at] * pays,
        prefill=np.where(pays, prefill[1:][at], alone),
    )


def _sources(
    load: Load, roster: Roster, request: PromptRequest, cached: IndexArray
) -> list[tuple[int, int]]:
    """(slot, tokens) of the longest prefixes, one of each length and host."""
    worth = np.where(roster.is_allowed, cached, 0)
    least = int(worth[roster.computing].min())
    if worth.max(initial=0) <= least:
        return []
    found: dict[tuple[int, int], int] = {}  # by host and length in the tree
    for slot in (-worth).argsort(kind="stable").tolist():
        tokens = int(worth[slot])
        if tokens <= least or len(found) == MAX_SOURCES:
            break
        found.setdefault((int(load.host[slot]), tokens), slot)
    sources = []
    for (_, tokens), slot in found.items():
        sure = load.promised_tokens(slot, request.namespace, request.tokens[:tokens])
        if sure > least:
            sources.append((slot, sure))
    return sources


def _pull_seconds(load: Load, slots: IndexArray, extra: IndexArray) -> Seconds:
    """Pulling `extra` [sources, instances] tokens from `slots` [sources]."""
    pieces = -(-extra // load.block_tokens[slots, None])
    near = load.near[slots]
    seconds = np.empty(extra.shape)
    groups = load.group[slots]
    for number, group in enumerate(load.cost_groups):
        # A slice copies nothing, and most often there is one group.
        rows = slice(None) if len(load.cost_groups) == 1 else groups == number
        num_bytes = extra[rows] * group.costs.kv_bytes_per_token
        shm, nixl = (
            group.costs.transfer_seconds(num_bytes, pieces[rows], path) for path in ("shm", "nixl")
        )
        seconds[rows] = np.where(near[rows], shm, nixl)
    seconds *= load.transfer_factor[slots, None]
    return seconds
