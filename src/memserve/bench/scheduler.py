"""`memserve bench scheduler`: times of decisions, with many instances and known prompts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
from rich.table import Table

from memserve.clock import ManualClock
from memserve.config import Positive, doc
from memserve.scheduler.contract import Costs, InstanceSpec, PromptRequest
from memserve.scheduler.hardware import cost_model
from memserve.scheduler.policies import POLICIES
from memserve.scheduler.prompt_tree import PromptTree
from memserve.scheduler.scheduler import Scheduler
from memserve.types import SHARED, InstanceId, Namespace, RequestId, Role, TokenArray

BLOCK_TOKENS = 16
VOCABULARY = 128_000
INSTANCES_PER_HOST = 8
# Most holders of a known prompt. A shared prefix has more: those of all prompts with it.
_MOST_HOLDERS = 4
_RUNNING_PER_INSTANCE = 8  # requests that run during the decisions
_WARM_UP = 200  # decisions that are not counted
_LOAD = 0.8  # share of the instances' prefill capacity that requests use

Layout = Literal["colocated", "prefill + decode"]


class SchedulerWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster, the known prompts and the requests."""

    instances: Annotated[Positive, doc("half of them prefill where roles are apart")] = 64
    prompts: Annotated[Positive, doc("known to the prompt trees")] = 10_000
    prompt_tokens: Annotated[Positive, doc("of each")] = 4096
    prefixes: Annotated[Positive, doc("that the prompts share")] = 50
    prefix_tokens: Annotated[Positive, doc("of each")] = 1024
    decisions: Annotated[Positive, doc("timed, with each policy")] = 3000
    few_instances: Annotated[Positive, doc("of the small cluster, measured too")] = 2
    few_tokens: Annotated[Positive, doc("of each prompt there")] = 400

    def small(self) -> SchedulerWorkload:
        """Return the workload of the small cluster, whose prompts share an equal part."""
        shared = self.prefix_tokens * self.few_tokens // self.prompt_tokens
        return msgspec.structs.replace(
            self,
            instances=self.few_instances,
            prompt_tokens=self.few_tokens,
            prefix_tokens=max(shared, 1),
        )


class Timing(msgspec.Struct, frozen=True):
    """Microseconds of one step."""

    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        p50, p99 = np.percentile(seconds, [50, 99])
        return cls(float(p50) * 1e6, float(p99) * 1e6)


class PolicyTiming(msgspec.Struct, frozen=True):
    """One policy on one layout. `decide`: wall time of a decision, with match, choice, reservation
    and expectation. `cpu`: its CPU time. `release`: report of a first token and of an end."""

    layout: Layout
    policy: str
    candidates: int
    decide: Timing
    cpu: Timing
    match: Timing
    expect: Timing
    fetches: int  # plans that pull a prefix from a third instance
    instances: int = SchedulerWorkload().instances
    prompt_tokens: int = SchedulerWorkload().prompt_tokens
    release: Timing | None = None  # None: not measured then


class SchedulerBenchReport(msgspec.Struct, frozen=True):
    """Timings of every policy on both layouts, with many instances and with few."""

    workload: SchedulerWorkload
    policies: tuple[PolicyTiming, ...]


class _TimedTree:
    """A prompt tree that records the seconds of each call."""

    def __init__(self, tree: PromptTree) -> None:
        self._tree = tree
        self.matches: list[float] = []
        self.expects: list[float] = []

    def match(self, namespace: Namespace, tokens: TokenArray) -> dict[InstanceId, int]:
        started = time.perf_counter()
        found = self._tree.match(namespace, tokens)
        self.matches.append(time.perf_counter() - started)
        return found

    def in_host(
        self, namespace: Namespace, tokens: TokenArray, matches: Mapping[InstanceId, int]
    ) -> dict[InstanceId, int]:
        started = time.perf_counter()
        found = self._tree.in_host(namespace, tokens, matches)
        self.matches[-1] += time.perf_counter() - started
        return found

    def expect(
        self, instance: InstanceId, namespace: Namespace, tokens: TokenArray, now: float
    ) -> None:
        started = time.perf_counter()
        self._tree.expect(instance, namespace, tokens, now)
        self.expects.append(time.perf_counter() - started)


class _Prompts:
    """Known prompts, and requests that share more, less or nothing with them."""

    def __init__(self, workload: SchedulerWorkload) -> None:
        self._workload = workload
        self._rng = np.random.default_rng(0)
        size = (workload.prefixes, min(workload.prefix_tokens, workload.prompt_tokens))
        self._prefixes = self._new(size)
        self._known: list[TokenArray] = []

    def _new(self, size: int | tuple[int, int]) -> TokenArray:
        return self._rng.integers(0, VOCABULARY, size, np.int32)

    def store(self, tree: PromptTree, holders: Sequence[InstanceId]) -> None:
        """Store every known prompt for 1 to _MOST_HOLDERS of `holders`, as KV events do."""
        workload, blocks = self._workload, self._workload.prompt_tokens // BLOCK_TOKENS
        rng = np.random.default_rng(1)
        self._known = []
        for number in range(workload.prompts):
            beginning = number % workload.prefixes
            tokens = self._behind(self._prefixes[beginning])
            self._known.append(tokens)
            shared = self._prefixes.shape[1] // BLOCK_TOKENS
            hashes = [beginning * shared + block for block in range(shared)]
            own = (1 + workload.prefixes + number) * blocks
            hashes += range(own, own + blocks - shared)
            chosen = rng.choice(len(holders), rng.integers(1, _MOST_HOLDERS + 1))
            for holder in set(chosen.tolist()):
                stored = tokens[: blocks * BLOCK_TOKENS]
                tree.stored(holders[holder], SHARED, None, hashes, stored)

    def requests(self) -> Iterator[PromptRequest]:
        """Yield requests: one half continue a part of a known prompt, a third have a shared
        prefix, the rest have random prompts."""
        rng, workload = self._rng, self._workload
        for number in range(_WARM_UP + workload.decisions):
            kind = rng.random()
            known = self._known[int(rng.integers(len(self._known)))]
            if kind < 1 / 2:
                tokens = self._behind(known[: int(rng.integers(len(known) + 1))])
            elif kind < 5 / 6:
                tokens = self._behind(known[: self._prefixes.shape[1]])
            else:
                tokens = self._new(workload.prompt_tokens)
            session = f"session-{int(rng.integers(workload.prompts))}"
            yield PromptRequest(RequestId(str(number)), tokens, session=session)

    def _behind(self, beginning: TokenArray) -> TokenArray:
        rest = self._new(self._workload.prompt_tokens - len(beginning))
        return np.concatenate((beginning, rest))


def run_scheduler_bench(
    workload: SchedulerWorkload | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> SchedulerBenchReport:
    """Time every policy on both layouts, with many instances and with few, and the cost model of a
    13B model on two H800."""
    workload = workload or SchedulerWorkload()
    costs = cost_model("h800", "llama2-13b", tp=2)
    timings = []
    layouts: tuple[Layout, Layout] = ("colocated", "prefill + decode")
    for size in (workload, workload.small()):
        for layout in layouts:
            for policy in POLICIES:
                progress(f"{size.instances} instances, {layout}, {policy}")
                timings.append(time_policy(size, layout, policy, costs))
    return SchedulerBenchReport(workload, tuple(timings))


def _instances(workload: SchedulerWorkload, layout: Layout, costs: Costs) -> list[InstanceSpec]:
    specs = []
    for number in range(workload.instances):
        role = Role.COLOCATED
        if layout == "prefill + decode":
            role = Role.PREFILL if number % 2 else Role.DECODE
        host = f"host-{number // INSTANCES_PER_HOST}"
        specs.append(InstanceSpec(InstanceId(f"i{number}"), role, costs, BLOCK_TOKENS, host))
    return specs


def time_policy(
    workload: SchedulerWorkload, layout: Layout, policy: str, costs: Costs
) -> PolicyTiming:
    """Time one policy on one layout of the workload's instances, which all have these costs."""
    clock = ManualClock()
    tree = PromptTree()
    timed = _TimedTree(tree)
    scheduler = Scheduler(timed, clock, policy)
    specs = _instances(workload, layout, costs)
    for spec in specs:
        scheduler.put(spec)
        tree.join(spec.id, spec.block_tokens, spec.role)
    among = frozenset(spec.id for spec in specs)  # as a gateway passes its members
    holders = [spec.id for spec in specs if spec.role is not Role.DECODE]
    holders = holders or [spec.id for spec in specs]
    prompts = _Prompts(workload)
    prompts.store(tree, holders)
    whole = float(costs.prefill_seconds(workload.prompt_tokens, 0))
    pause = whole / (_LOAD * len(holders))
    wall, cpu, release, fetches, considered = [], [], [], 0, 0
    computing: deque[RequestId] = deque()
    decoding: deque[RequestId] = deque()
    for request in prompts.requests():
        cpu_started = time.thread_time()
        started = time.perf_counter()
        decision = scheduler.decide(request, among)
        wall.append(time.perf_counter() - started)
        cpu.append(time.thread_time() - cpu_started)
        assert decision is not None  # all instances are available
        fetches += decision.plan.fetch is not None
        considered = decision.considered
        clock.advance(pause)
        tree.expire(clock.now())
        computing.append(request.id)
        started = time.perf_counter()
        if len(computing) > len(holders):
            scheduler.prefilled(computing[0])
            decoding.append(computing.popleft())
        if len(decoding) > _RUNNING_PER_INSTANCE * len(specs):
            scheduler.finished(decoding.popleft(), request.output_tokens)
        release.append(time.perf_counter() - started)
    return PolicyTiming(
        layout=layout,
        policy=policy,
        candidates=considered,
        decide=Timing.of(wall[_WARM_UP:]),
        cpu=Timing.of(cpu[_WARM_UP:]),
        match=Timing.of(timed.matches[_WARM_UP:]),
        expect=Timing.of(timed.expects[_WARM_UP:]),
        fetches=fetches,
        instances=workload.instances,
        prompt_tokens=workload.prompt_tokens,
        release=Timing.of(release[_WARM_UP:]),
    )


def scheduler_bench_table(report: SchedulerBenchReport) -> Table:
    """Return the report as a table."""
    work = report.workload
    table = Table(title=f"{work.prompts} known prompts; microseconds, median / P99")
    names = ("", "policy", "plans", "decide", "CPU", "match", "expect", "release", "fetches")
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < 2 else "right")
    for row in report.policies:
        timings = (row.decide, row.cpu, row.match, row.expect, row.release)
        figures = [f"{each.p50:.0f} / {each.p99:.0f}" if each else "" for each in timings]
        size = f"{row.instances} {row.layout}, {row.prompt_tokens} tokens"
        table.add_row(size, row.policy, str(row.candidates), *figures, str(row.fetches))
    return table
