"""What a scheduler should predict, stated once more: slowly, one instance after the other, from the
lines of a load and not from its arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from memserve.scheduler.contract import PromptRequest
from memserve.scheduler.instance_load import InstanceLoad
from memserve.scheduler.load import MAX_ROWS, Load
from memserve.types import InstanceId

MAX_SOURCES = 4
STALL = 2.0
NEAR_TIE = 0.01
INSTANT = 1e-9


@dataclass
class Here:
    """Of computing or answering the prompt on one instance."""

    cached: int
    source: int = -1
    fetched: int = 0
    fetch: float = 0.0
    prefill: float = 0.0
    queue: float = 0.0
    delays: float = 0.0
    work: float = 0.0
    stalls: float = 0.0
    room: float = 0.0
    answer: float = 0.0
    whole: float = 0.0


@dataclass
class Oracle:
    """Predictions for one request, by slot."""

    load: Load
    request: PromptRequest
    output: int
    matches: Mapping[InstanceId, int]
    in_host: Mapping[InstanceId, int]
    now: float
    allowed: list[int]
    computing: list[int]
    answering: list[int]
    fetches: bool
    overlapped: bool
    here: list[Here] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = len(self.request.tokens)
        cached = [
            self.usable(self.matches.get(line.spec.id, 0), line) for line in self.load.by_slot
        ]
        self.here = [Here(tokens) for tokens in cached]
        sources = self.sources() if self.fetches else []
        for at in range(len(self.here)):
            self.predict(at, sources)

    def usable(self, tokens: int, line: InstanceLoad) -> int:
        most = min(tokens, max(self.prompt - 1, 0))
        return most - most % line.spec.block_tokens

    def sure(self, line: InstanceLoad, held: int) -> int:
        for waiting in line.prefills.values():
            if waiting.cached_tokens < held <= len(waiting.tokens):
                same = np.array_equal(waiting.tokens[:held], self.request.tokens[:held])
                if same and waiting.namespace == self.request.namespace:
                    held = waiting.cached_tokens
        return held

    def sources(self) -> list[tuple[int, int]]:
        least = min(self.here[at].cached for at in self.computing)
        found: dict[tuple[str, str, int], int] = {}
        for at in sorted(self.allowed, key=lambda at: (-self.here[at].cached, at)):
            tokens, spec = self.here[at].cached, self.load.by_slot[at].spec
            if tokens > least and len(found) < MAX_SOURCES and spec.kv is not None:
                found.setdefault((spec.host, spec.kv, tokens), at)
        sure = [(at, self.sure(self.load.by_slot[at], n)) for (*_, n), at in found.items()]
        return [(at, n) for at, n in sure if n > least]

    def moving(self, source: int, to: int, tokens: int, block_tokens: int) -> float:
        spec = self.load.by_slot[source].spec
        near = spec.host == self.load.by_slot[to].spec.host
        num_bytes = tokens * spec.costs.kv_bytes_per_token
        path = "shm" if near else "nixl"
        return float(spec.costs.transfer_seconds(num_bytes, -(-tokens // block_tokens), path))

    def batch(self, line: InstanceLoad) -> tuple[int, int, float, float]:
        """Sequences that decode, and that will; tokens of each, and of each to come."""
        others = line.other_running
        running, batch = line.decoding + others, line.answers + others
        if not batch:
            return 0, 0, 0.0, 0.0
        context = line.context_tokens + others * self.load._typical_context
        output = line.output_tokens + others * self.load._typical_output
        return running, batch, context / batch, output / (2 * batch)

    def step(self, line: InstanceLoad, sequences: int, more: float) -> float:
        _, batch, each, _ = self.batch(line)
        fitting = min(sequences, line.spec.max_running)
        context = each * min(fitting, batch) + more
        return float(line.spec.costs.decode_step_seconds(fitting, context))

    def left(self, line: InstanceLoad) -> list[float]:
        left = [*line.queue.left(), *[self.load._typical_prefill] * line.other_prefills]
        if len(left) > MAX_ROWS:
            left[MAX_ROWS - 1 :] = [sum(left[MAX_ROWS - 1 :])]
        gone = min(self.now - line.queue.updated, line.queue.under_way())
        return [seconds * (1 - gone / max(sum(left), INSTANT)) for seconds in left]

    def predict(self, at: int, sources: list[tuple[int, int]]) -> None:
        line, here = self.load.by_slot[at], self.here[at]
        spec, costs = line.spec, line.spec.costs
        running, batch, _, remaining = self.batch(line)
        now = self.step(line, running, 0.0) if running else 0.0
        before = self.step(line, batch, 0.0) if batch else 0.0
        after = self.step(line, batch + 1, self.prompt + self.output / 2)
        here.whole = float(costs.prefill_seconds(self.prompt, 0))
        slowed = now * (self.prompt / spec.chunk_tokens) / max(here.whole, INSTANT) + 1.0
        alone = float(costs.prefill_seconds(self.prompt, here.cached)) * slowed
        here.prefill, best = alone, np.inf
        for source, held in sources:
            has = self.usable(held, line)
            extra = has - here.cached
            if extra <= 0 or self.load.by_slot[source].spec.kv != spec.kv:
                continue
            block = self.load.by_slot[source].spec.block_tokens
            fetch = self.moving(source, at, extra, block)
            prefill = float(costs.prefill_seconds(self.prompt, has)) * slowed
            if fetch + prefill <= alone and fetch + prefill < best:
                best = fetch + prefill
                here.source, here.fetched, here.fetch, here.prefill = source, extra, fetch, prefill
        self.wait(at, before)
        here.room = max(batch + 1 - spec.max_running, 0) / spec.max_running * remaining * before
        here.answer = (self.output - 1) * after
        here.answer += max(after - before, 0.0) * batch * min(remaining, self.output)
        usual = sum(self.batch(self.load.by_slot[i])[0] for i in self.answering)
        usual /= len(self.answering)
        beside = max(running, usual if at in self.answering else 0.0)
        here.stalls = beside * STALL * here.prefill

    def wait(self, at: int, step: float) -> None:
        line, here = self.load.by_slot[at], self.here[at]
        left, share = self.left(line), line.spec.short_share
        shorter = sum(seconds for seconds in left if seconds <= here.prefill)
        here.work = sum(left)
        if share:
            longer = here.work - shorter
            here.queue = shorter + min((shorter + here.prefill) * (1 - share) / share, longer)
            here.delays = here.prefill * sum(seconds > here.prefill for seconds in left)
        else:
            here.queue = here.work
        longest = sorted(range(len(self.here)), key=lambda i: (-self.here[i].cached, i))
        floor = 0.0
        if at in longest[:MAX_SOURCES] and self.sure(line, here.cached) < here.cached:
            floor = here.work
        if line.spec.kv_tokens is not None:
            own = self.prompt + self.output
            reserved = line.residents.kv_tokens + line.other_running * self.load._typical_context
            if reserved + own > line.spec.kv_tokens:
                cached = self.request.tokens[: here.cached]
                own -= line.residents.shared(self.request.namespace, cached)
            excess = reserved + own - line.spec.kv_tokens
            if excess > 0:
                until = line.residents.wait(excess, here.work, step, self.now)
                floor = max(floor, until)
        here.queue = max(here.queue, floor + self.loading(line))

    def loading(self, line: InstanceLoad) -> float:
        """Seconds until the part of the prefix that is in host memory is in HBM."""
        tokens, costs = self.in_host.get(line.spec.id, 0), line.spec.costs
        num_bytes, blocks = tokens * costs.kv_bytes_per_token, -(-tokens // line.spec.block_tokens)
        return float(costs.transfer_seconds(num_bytes, blocks, "host")) if tokens else 0.0

    # --- of candidates --------------------------------------------------------------------

    def transfer(self, answers: int, computes: int) -> float:
        if answers == computes:
            return 0.0
        lacking = self.prompt - self.here[answers].cached
        block = self.load.by_slot[answers].spec.block_tokens
        moving = self.moving(computes, answers, lacking, block)
        return max(moving - self.here[computes].prefill, 0.0) if self.overlapped else moving

    def first_token(self, answers: int, computes: int) -> float:
        here = self.here[computes]
        first = here.queue + here.fetch + here.prefill
        return first + (here.room if answers == computes else self.transfer(answers, computes))

    def decode(self, answers: int, computes: int) -> float:
        there = self.here[answers]
        if answers == computes:
            return there.answer
        ready = self.first_token(answers, computes)
        return there.answer + max(there.room + there.queue - ready, 0.0)
