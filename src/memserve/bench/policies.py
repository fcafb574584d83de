"""`memserve bench policies`: equal sessions with each policy, on clusters of each shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import msgspec
from rich.table import Table

from memserve.bench.measure import ServeRun, measure_cluster, nothing_else
from memserve.bench.report import Distribution
from memserve.bench.work import ServeBenchConfig, Work
from memserve.config import ClusterConfig, InstanceConfig, Policy
from memserve.errors import ConfigError
from memserve.models.resolve import Progress
from memserve.types import Role


@dataclass(frozen=True, slots=True)
class Shape:
    """A cluster of two instances."""

    name: str
    instances: tuple[InstanceConfig, ...]


def shapes(like: InstanceConfig) -> tuple[Shape, ...]:
    """Return two shapes of equal size: two colocated instances, or one prefill and one decode."""

    def instance(role: Role, count: int) -> InstanceConfig:
        return msgspec.structs.replace(like, role=role, count=count)

    return (
        Shape("2 colocated", (instance(Role.COLOCATED, 2),)),
        Shape("1P1D", (instance(Role.PREFILL, 1), instance(Role.DECODE, 1))),
    )


def chosen_policies(names: Sequence[str] | None) -> tuple[Policy, ...]:
    """Return all policies, or the named ones. Raises ConfigError for an unknown name."""
    known: tuple[Policy, ...] = get_args(Policy)
    if unknown := set(names or ()) - set(known):
        raise ConfigError(f"policy {', '.join(unknown)} is none of {', '.join(known)}")
    return tuple(policy for policy in known if not names or policy in names)


class PolicyRun(msgspec.Struct, frozen=True):
    """One policy on one shape."""

    shape: str
    policy: Policy
    run: ServeRun


class PoliciesBenchResult(msgspec.Struct, frozen=True):
    """Runs of one workload with each shape and policy."""

    runs: tuple[PolicyRun, ...]


async def compare_policies(
    config: ServeBenchConfig,
    cluster: ClusterConfig,
    policies: Sequence[Policy],
    sessions: Work,
    progress: Progress,
) -> PoliciesBenchResult:
    """Measure clusters that differ only in shape and policy, one after the other.

    Raises BenchmarkError, ClusterError.
    """
    found = []
    for shape in shapes(cluster.instance[0]):
        for policy in policies:
            gateway = msgspec.structs.replace(cluster.gateway, policy=policy)
            own = msgspec.structs.replace(cluster, gateway=gateway, instance=shape.instances)
            runs, _ = await measure_cluster(
                f"{shape.name}, {policy}", config, own, sessions, progress, nothing_else
            )
            found += [PolicyRun(shape.name, policy, run) for run in runs]
    return PoliciesBenchResult(tuple(found))


def policies_table(result: PoliciesBenchResult) -> Table:
    """Return a table with a row for each run: means and P99 in seconds."""
    table = Table()
    for name in ("instances", "policy"):
        table.add_column(name)
    for name in ("cached", "TTFT s", "P99", "TPOT ms", "P99", "JCT s", "P99", "failed"):
        table.add_column(name, justify="right")
    for one in result.runs:
        summary = one.run.summary
        table.add_row(
            one.shape,
            one.policy,
            f"{summary.cached_ratio:.1%}",
            *_pair(summary.ttft, 1.0),
            *_pair(summary.tpot, 1000.0),
            *_pair(summary.jct, 1.0),
            str(summary.failed + summary.unsent),
        )
    return table


def _pair(figure: Distribution | None, scale: float) -> tuple[str, str]:
    if figure is None:
        return ("-", "-")
    return (f"{figure.mean * scale:.3g}", f"{figure.p99 * scale:.3g}")
