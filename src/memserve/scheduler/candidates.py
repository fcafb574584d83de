"""Every way to run one request, and how long each should take.

All arrays over `[instances]` go by slot of `Load`, those over `[candidates]` by `Roster`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from memserve.scheduler.contract import Path, PromptRequest, Seconds
from memserve.scheduler.load import Load
from memserve.types import IndexArray, InstanceId, Role

MAX_SOURCES = 4  # holders of longer prefixes that are looked at
_PATHS: tuple[Path, Path] = ("nixl", "shm")  # by `near`
_NEVER = np.inf
_INSTANT = 1e-9  # no prefill is faster


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
    queue: Seconds  # [candidates], as the rest
    fetch: Seconds
    prefill: Seconds
    transfer: Seconds
    decode: Seconds
    whole_prefill: float  # the least, of the prompt with nothing cached

    @property
    def first_token(self) -> Seconds:
        total: Seconds = self.queue + self.fetch
        total += self.prefill
        total += self.transfer
        return total


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
    cached = np.zeros(len(load.lines), dtype=np.int64)
    slots = load.slots
    for instance, tokens in matches.items():
        slot = slots.get(instance)
        if slot is not None:
            cached[slot] = tokens
    return _usable(cached, load.block_tokens, prompt_tokens)


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
    prompt, output = len(request.tokens), max(request.output_tokens, 1)
    cached = cached_tokens(load, matches, prompt)
    steps = _Steps.predict(load, prompt + output / 2)
    sources = _sources(load, roster, request, cached) if fetches else []
    asked = _asked(load, prompt, cached, sources)
    seconds = _prefill_seconds(load, prompt, asked)
    whole = seconds[0]
    seconds[1:] *= steps.prefill_slowdown(load, prompt, whole)
    pulled = _best_fetches(load, sources, asked[1:], seconds[1:])
    prefill = pulled.prefill
    answering, slot_wait = steps.decode_seconds(load, output)
    queue = load.queue_seconds(now)
    stall = steps.stall_seconds(load, prefill)

    computes, answers, alone = roster.computes, roster.answers, len(roster.solo)
    all_queue, all_prefill = queue[computes], prefill[computes]
    decode = answering[answers]
    decode += stall[computes]
    all_queue[:alone] += slot_wait[roster.solo]
    transfer = np.zeros(len(roster))
    if roster.pairs:
        moved = _transfer_seconds(load, roster, prompt, cached)
        if overlapped:
            moved = np.maximum(moved - all_prefill[alone:], 0.0)
        transfer[alone:] = moved
        # A full batch, or prompts that the decode instance computes itself, hold it up.
        ready = all_queue[alone:] + all_prefill[alone:] + moved
        held_up = slot_wait + queue
        decode[alone:] += np.maximum(held_up[roster.pair_answers] - ready, 0.0)
    return Candidates(
        load=load,
        roster=roster,
        prompt_tokens=prompt,
        cached=cached,
        source=pulled.source,
        fetched=pulled.tokens,
        queue=all_queue,
        fetch=pulled.seconds[computes],
        prefill=all_prefill,
        transfer=transfer,
        decode=decode,
        whole_prefill=float(whole.min()),
    )


def whole_prefill_seconds(load: Load, prompt: int) -> Seconds:
    """exec(x, 0), [instances]."""
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


@dataclass(frozen=True, slots=True)
class _Steps:
    """Decode steps, [instances]: as they are now, with what is to come, with this request."""

    now: Seconds
    before: Seconds
    after: Seconds

    @classmethod
    def predict(cls, load: Load, context_tokens: float) -> _Steps:
        contexts = load.step_contexts.copy()
        contexts[2] += context_tokens
        seconds = np.empty(contexts.shape)
        for group in load.cost_groups:
            at = group.slots
            seconds[:, at] = group.costs.decode_step_seconds(
                load.step_sequences[:, at], contexts[:, at]
            )
        seconds *= load.step_factor
        return cls(seconds[0], seconds[1], seconds[2])

    def prefill_slowdown(self, load: Load, prompt: int, whole: Seconds) -> Seconds:
        """How many times longer a prefill takes because each chunk's step decodes too."""
        slowed: Seconds = self.now * (prompt / load.chunk_tokens)
        slowed /= np.maximum(whole, _INSTANT)
        slowed += 1.0
        return slowed

    def decode_seconds(self, load: Load, output: int) -> tuple[Seconds, Seconds]:
        """Of the answer, with what it costs the answers beside it; and the time until a full
        batch has room."""
        decode = (output - 1) * self.after
        slower = np.maximum(self.after - self.before, 0.0)
        slower *= load.batch
        slower *= np.minimum(load.remaining, output)
        decode += slower
        return decode, load.wait_steps * self.before

    def stall_seconds(self, load: Load, prefill: Seconds) -> Seconds:
        """What a prefill costs the answers that are decoded beside it, together."""
        stall: Seconds = load.running * prefill
        return stall


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
