"""The paper's end-to-end comparison: which clusters are compared, on what, and how fast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from memserve.bench.measure import ServeRun
from memserve.bench.work import ServeBenchConfig, Workload
from memserve.config import (
    CacheConfig,
    Caching,
    ClusterConfig,
    GatewayConfig,
    InstanceConfig,
    ModelConfig,
    Policy,
)
from memserve.types import Role

TopologyName = Literal["PD", "PD-CC", "1P1D", "1P1D-CC", "1P1D p", "1P1D pd", "1P1D full"]
# What the paper compares; the others are steps between the last two, prompt by prompt handed over.
COMPARED: tuple[TopologyName, ...] = ("PD", "PD-CC", "1P1D", "1P1D-CC")

_BLOCKS = 2048  # of device memory: what one run leaves behind, several times
# Sessions begin for so long; those that are late go on behind it.
_ARRIVAL_SECONDS = 4.0
_QUICK_SECONDS = 3.0
_QUICK_TURNS = 3


@dataclass(frozen=True, slots=True)
class Topology:
    """A cluster of two instances with one core each.

    `policy`: with prompt-tree as it would run, where the scheduler may let a decode instance
    compute a prompt itself; with round-robin every prompt is handed over.
    """

    name: TopologyName
    roles: tuple[Role, Role]
    caching: Caching
    policy: Policy

    def cluster(self, model: ModelConfig) -> ClusterConfig:
        instances = tuple(
            InstanceConfig(role=role, threads=1, hbm_blocks=_BLOCKS, dram_blocks=0)
            for role in self.roles
        )
        return ClusterConfig(
            model=model,
            gateway=GatewayConfig(port=0, policy=self.policy),
            cache=CacheConfig(caching=self.caching),
            instance=instances,
        )


_BOTH = (Role.COLOCATED, Role.COLOCATED)
_APART = (Role.PREFILL, Role.DECODE)
TOPOLOGIES: dict[TopologyName, Topology] = {
    one.name: one
    for one in (
        Topology("PD", _BOTH, "off", "round-robin"),
        Topology("PD-CC", _BOTH, "full", "prompt-tree"),
        Topology("1P1D", _APART, "off", "round-robin"),
        Topology("1P1D-CC", _APART, "full", "prompt-tree"),
        Topology("1P1D p", _APART, "p", "round-robin"),
        Topology("1P1D pd", _APART, "pd", "round-robin"),
        Topology("1P1D full", _APART, "full", "round-robin"),
    )
}


@dataclass(frozen=True, slots=True)
class PaperWorkload:
    """A workload cut to what a small model on two cores can do, with its shape kept."""

    name: Workload
    data: str | None  # folder under --data
    min_turns: int
    max_turns: int
    max_output_tokens: int
    max_context_tokens: int
    rates: tuple[float, float, float]  # sessions per second: little, much, more than can be done


# Chats have short prompts, the longest answers and a history that grows with each of many turns;
# readers of documents long prompts and short answers; agents a long prompt that all share, and
# short answers.
WORKLOADS: tuple[PaperWorkload, ...] = (
    PaperWorkload("sharegpt", None, 3, 6, 24, 2048, (0.8, 1.6, 3.2)),
    PaperWorkload("loogle", "loogle", 2, 2, 8, 1024, (0.6, 1.2, 2.4)),
    PaperWorkload("react", "react", 2, 2, 12, 1400, (0.6, 1.2, 2.4)),
)


class PaperConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How much of it is measured."""

    data: str  # folder with the workloads' data
    quick: bool = False
    repeats: int = 3
    seed: int = 0
    minutes: float = 29.0  # nothing is begun after them


class Cell(msgspec.Struct, frozen=True):
    """One run of the matrix."""

    topology: TopologyName
    rate: float
    repeat: int
    config: ServeBenchConfig
    model: ModelConfig


class CellRun(msgspec.Struct, frozen=True):
    """What it gave."""

    cell: Cell
    run: ServeRun


@dataclass(frozen=True, slots=True)
class Group:
    """Cells that are measured one after the other on one cluster."""

    topology: Topology
    cells: tuple[Cell, ...]


def groups(config: PaperConfig, model: ModelConfig) -> Iterator[Group]:
    """What the paper compares, each on one cluster, as starting them takes a good part of the
    time. A quick matrix has one rate and one run of each."""
    for name in COMPARED:
        yield _group(config, name, config.quick, model)


def step_groups(config: PaperConfig, model: ModelConfig) -> Iterator[Group]:
    """The steps of caching between the last two, at one rate."""
    for name in TOPOLOGIES:
        if name not in COMPARED and not config.quick:
            yield _group(config, name, True, model)


def _group(
    config: PaperConfig, topology: TopologyName, one_rate: bool, model: ModelConfig
) -> Group:
    cells = (
        cell
        for workload in WORKLOADS
        for cell in _cells(config, workload, topology, one_rate, model)
    )
    return Group(TOPOLOGIES[topology], tuple(cells))


def _cells(
    config: PaperConfig,
    workload: PaperWorkload,
    topology: TopologyName,
    one_rate: bool,
    model: ModelConfig,
) -> Iterator[Cell]:
    seconds = _QUICK_SECONDS if config.quick else _ARRIVAL_SECONDS
    turns = min(workload.max_turns, _QUICK_TURNS) if config.quick else workload.max_turns
    repeats = 1 if config.quick else config.repeats
    rates = workload.rates[1:2] if one_rate else workload.rates
    for repeat in range(repeats):
        for rate in rates:
            sent = ServeBenchConfig(
                workload=workload.name,
                data=None if workload.data is None else str(Path(config.data, workload.data)),
                rate=rate,
                sessions=max(2, round(rate * seconds)),
                seed=config.seed,
                min_turns=workload.min_turns,
                max_turns=turns,
                max_output_tokens=workload.max_output_tokens,
                max_context_tokens=workload.max_context_tokens,
                repeats=repeats,
                warm_up=1,
            )
            yield Cell(topology, rate, repeat, sent, model)
