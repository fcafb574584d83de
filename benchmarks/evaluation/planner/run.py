"""`run_planner_evaluation`: each split, and the planner, under each load; cell by cell."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from evaluation.planner.day import Day, Kind, Phase
from memserve.bench.report import append_lines
from memserve.config import NonNegative, PlannerConfig, Positive, doc
from memserve.models.resolve import Progress
from memserve.planner.contract import Action, Decision, Split
from memserve.sim.cluster import SimCluster
from memserve.sim.elastic import SimPlanner
from memserve.sim.inputs import Encode
from memserve.sim.prompt import SimRequest
from memserve.sim.run import SimConfig, latencies, simulated
from memserve.workloads.trace import BLOCK_TOKENS

Load = Literal["conversations", "agents", "day"]
LOADS: tuple[Load, ...] = ("conversations", "agents", "day")
PLANNER = -1  # instead of a number of prefill members
BUCKET_SECONDS = 5.0
_Rate = Annotated[float, Meta(gt=0)]
_Seconds = Annotated[float, Meta(ge=0)]


class PlannerEvalConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated. Rates: see docs/planner.md."""

    instances: Annotated[Positive, doc("of one device each, unless --tp says more")] = 16
    splits: Annotated[
        tuple[NonNegative, ...],
        doc("numbers of prefill members that are compared; 0: all colocated; default: dense"),
    ] = ()
    conversation_rate: Annotated[_Rate, doc("requests per second and instance")] = 0.25
    agent_rate: Annotated[_Rate, doc("requests per second and instance")] = 22.0
    phases: Annotated[Positive, doc("of the day: conversations and agents by turns")] = 4
    phase_seconds: Annotated[_Seconds, doc("until the mix changes")] = 600.0
    conversation_seconds: Annotated[_Seconds, doc("of conversations alone")] = 600.0
    agent_seconds: Annotated[_Seconds, doc("of agents alone")] = 600.0
    warm_seconds: Annotated[_Seconds, doc("of a steady load that do not count")] = 60.0
    model: Annotated[str, doc("an architecture")] = "llama2-13b"
    hardware: Annotated[str, doc("of each instance")] = "h800"
    tp: Annotated[Positive, doc("devices of an instance")] = 1
    ttft: Annotated[_Rate, doc("objective of each request, seconds")] = 5.0
    tpot: Annotated[_Rate, doc("objective of each request, seconds")] = 0.025
    percentile: Annotated[float, doc("that the planner holds to the objectives")] = 90.0
    interval: Annotated[_Rate, doc("seconds between the planner's looks")] = 2.0
    seed: Annotated[NonNegative, doc("of the agents' arrivals")] = 0


class PhaseFigures(msgspec.Struct, frozen=True):
    """Requests that arrived in a phase."""

    kind: Kind
    seconds: float
    requests: int
    served: int  # of these, inside both objectives
    ttft_mean: float
    tpot_mean: float

    @property
    def share(self) -> float:
        return self.served / self.requests if self.requests else 1.0


class Shape(msgspec.Struct, frozen=True):
    """The members' roles from a time on."""

    at: float
    split: Split


class Cell(msgspec.Struct, frozen=True):
    """One simulation."""

    load: Load
    prefill: int  # members; 0: all colocated; PLANNER: as the planner chose
    phases: tuple[PhaseFigures, ...]
    shapes: tuple[Shape, ...]  # the first one, and those that the planner made of it
    buckets: tuple[float, ...]  # share served of what arrived in each BUCKET_SECONDS; -1: none did
    took: float  # seconds of this machine, one core

    @property
    def share(self) -> float:
        """Share of the requests that were served, in the mean over phases."""
        return sum(one.share for one in self.phases) / len(self.phases)

    @property
    def goodput(self) -> float:
        """Requests served per second."""
        seconds = sum(one.seconds for one in self.phases)
        return sum(one.served for one in self.phases) / seconds

    @property
    def name(self) -> str:
        return "planner" if self.prefill == PLANNER else str(self.shapes[0].split)


class PlannerEvalResult(msgspec.Struct, frozen=True):
    """All cells, of one or more sizes."""

    instances: int
    refused: int  # conversations that fit no instance
    cells: tuple[Cell, ...]

    def of(self, load: Load) -> list[Cell]:
        return [cell for cell in self.cells if cell.load == load]


class _Kept(msgspec.Struct, frozen=True):
    config: PlannerEvalConfig
    result: Cell


def dense_splits(instances: int) -> tuple[int, ...]:
    """All colocated, and from an eighth to five eighths of prefill members, in 16ths: beyond them
    every load here is far worse."""
    return (0, *sorted({max(1, instances * part // 16) for part in range(2, 11)}))


def run_planner_evaluation(
    config: PlannerEvalConfig,
    data: Path,
    loads: Sequence[Load],
    encode: Encode,
    progress: Progress,
    kept: Path | None = None,
    minutes: float | None = None,
) -> PlannerEvalResult:
    """Simulate each cell once. `kept`: a file of lines with the cells that are done; those of the
    same settings are not simulated again. After `minutes` nothing more is begun. Raises
    ConfigError."""
    shapes, _ = simulated(_sim(config, 0), BLOCK_TOKENS)
    progress("reading the conversations and the agents' runs")
    day = Day(data, shapes[0].hbm_blocks * BLOCK_TOKENS, encode)
    done = {(one.load, one.prefill): one for one in _read(kept, config)}
    started = time.monotonic()
    wanted = list(_cells(config, loads))
    for load, prefill in wanted:
        if (load, prefill) in done:
            continue
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            progress("the minutes are over; the same command goes on from here")
            break
        cell = run_cell(config, day, load, prefill)
        progress(f"{load}, {cell.name}: {cell.share:.1%} served, {cell.took:.0f} s")
        done[load, prefill] = cell
        if kept is not None:
            append_lines(kept, config, [cell])
    cells = tuple(done[one] for one in wanted if one in done)
    return PlannerEvalResult(config.instances, day.refused, cells)


def run_cell(config: PlannerEvalConfig, day: Day, load: Load, prefill: int) -> Cell:
    """Simulate one load on one split; the planner begins with as many prefill as decode members."""
    plan = phases_of(config, load)
    wanted = config.instances // 2 if prefill == PLANNER else prefill
    shapes, network = simulated(_sim(config, wanted), BLOCK_TOKENS)
    cluster = SimCluster(shapes, "prompt-tree", "full", network)
    made = [Shape(0.0, Split.of([one.role for one in shapes]))]

    def decided(decision: Decision) -> None:
        if decision.action is Action.ROLES:
            made.append(Shape(decision.at, decision.considered[0].split))

    if prefill == PLANNER:
        SimPlanner(cluster, objectives(config), shapes[0], decided=decided).start()
    ended: list[SimRequest] = []
    started = time.monotonic()
    cluster.run(day.sessions(plan, config.seed), ended.append)
    took = time.monotonic() - started
    counted = 0.0 if load == "day" else config.warm_seconds
    return Cell(
        load,
        prefill,
        tuple(_figures(config, plan, ended, counted)),
        tuple(made),
        tuple(_buckets(config, plan, ended)),
        took,
    )


def objectives(config: PlannerEvalConfig) -> PlannerConfig:
    return PlannerConfig(
        enabled=True,
        ttft=config.ttft,
        tpot=config.tpot,
        percentile=config.percentile,
        interval=config.interval,
    )


def phases_of(config: PlannerEvalConfig, load: Load) -> list[Phase]:
    rates: dict[Kind, float] = {
        "conversations": config.conversation_rate * config.instances,
        "agents": config.agent_rate * config.instances,
    }
    if load == "conversations":
        return [Phase(load, config.conversation_seconds, rates[load])]
    if load == "agents":
        return [Phase(load, config.agent_seconds, rates[load])]
    kinds: list[Kind] = ["conversations", "agents"]
    turns = [kinds[number % 2] for number in range(config.phases)]
    return [Phase(kind, config.phase_seconds, rates[kind]) for kind in turns]


def _cells(config: PlannerEvalConfig, loads: Sequence[Load]) -> Iterator[tuple[Load, int]]:
    for load in loads:
        for prefill in (PLANNER, *(config.splits or dense_splits(config.instances))):
            yield load, prefill


def _sim(config: PlannerEvalConfig, prefill: int) -> SimConfig:
    return SimConfig(
        model=config.model,
        hardware=config.hardware,
        tp=config.tp,
        colocated=0 if prefill else config.instances,
        prefill=prefill,
        decode=config.instances - prefill if prefill else 0,
    )


def _figures(
    config: PlannerEvalConfig, plan: Sequence[Phase], ended: Sequence[SimRequest], counted: float
) -> Iterator[PhaseFigures]:
    begins = 0.0
    for phase in plan:
        ends = begins + phase.seconds
        own = [one for one in ended if max(begins, counted) <= one.arrival < ends]
        took = [latencies(one) for one in own]
        served = sum(_served(config, *each) for each in took)
        count = max(len(own), 1)
        yield PhaseFigures(
            phase.kind,
            ends - max(begins, counted),
            len(own),
            served,
            sum(first for first, _ in took) / count,
            sum(each for _, each in took) / count,
        )
        begins = ends


def _buckets(
    config: PlannerEvalConfig, plan: Sequence[Phase], ended: Sequence[SimRequest]
) -> Iterator[float]:
    count = int(sum(one.seconds for one in plan) // BUCKET_SECONDS)
    arrived, served = [0] * count, [0] * count
    for one in ended:
        at = int(one.arrival // BUCKET_SECONDS)
        if at < count:  # an agent's later turns may come after the last phase
            arrived[at] += 1
            served[at] += _served(config, *latencies(one))
    for whole, part in zip(arrived, served, strict=True):
        yield round(part / whole, 4) if whole else -1.0


def _served(config: PlannerEvalConfig, ttft: float, tpot: float) -> bool:
    return ttft <= config.ttft and tpot <= config.tpot


def _read(kept: Path | None, config: PlannerEvalConfig) -> list[Cell]:
    if kept is None or not kept.exists():
        return []
    wanted = msgspec.structs.replace(config, splits=())
    lines = [msgspec.json.decode(line, type=_Kept) for line in kept.read_bytes().splitlines()]
    return [one.result for one in lines if msgspec.structs.replace(one.config, splits=()) == wanted]
