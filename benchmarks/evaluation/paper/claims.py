"""What the paper reports, and the same changes in what was measured or simulated here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from rich.table import Table

from memserve.bench.statistics import Estimate, relative_change

Change = Literal["disaggregation", "caching"]
Figure = Literal["TTFT mean", "TTFT P99", "JCT mean", "JCT P99"]
Verdict = Literal["agrees", "agrees, other size", "contradicts", "not clear", "not measured"]

# Before and after, as topologies.
CHANGES: dict[Change, tuple[str, str]] = {
    "disaggregation": ("PD", "1P1D"),
    "caching": ("1P1D", "1P1D-CC"),
}
_FACTOR = 2.0  # sizes this much apart are the same finding


class Claim(msgspec.Struct, frozen=True):
    """A figure of the paper: by how much a change changes it, as -0.3 for 30 % less."""

    workload: str
    change: Change
    figure: Figure
    paper: float | None  # None: readers disagree on the sign


def _claims(workload: str, change: Change, **figures: float | None) -> list[Claim]:
    names: dict[str, Figure] = {
        "jct_mean": "JCT mean",
        "jct_p99": "JCT P99",
        "ttft_mean": "TTFT mean",
        "ttft_p99": "TTFT P99",
    }
    return [Claim(workload, change, names[name], value) for name, value in figures.items()]


# arXiv 2406.17565: 8 x H800, NVLink, Llama2-13B with TP=2, against vLLM 0.4.0.
CLAIMS: tuple[Claim, ...] = (
    *_claims("sharegpt", "disaggregation", jct_mean=-0.30, jct_p99=-0.42),
    *_claims(
        *("sharegpt", "caching"), jct_mean=-0.17, jct_p99=-0.29, ttft_mean=-0.58, ttft_p99=-0.45
    ),
    *_claims("loogle", "disaggregation", jct_mean=-0.103, jct_p99=-0.108),
    *_claims(
        *("loogle", "caching"), jct_mean=-0.269, jct_p99=-0.225, ttft_mean=-0.562, ttft_p99=-0.452
    ),
    *_claims("react", "disaggregation", jct_mean=None, jct_p99=None),
    *_claims(
        *("react", "caching"), jct_mean=-0.267, jct_p99=-0.214, ttft_mean=-0.785, ttft_p99=-0.849
    ),
)


class Finding(msgspec.Struct, frozen=True):
    """A claim, and what was found here."""

    claim: Claim
    ours: Estimate | None

    @property
    def verdict(self) -> Verdict | None:
        """None where the paper says nothing to compare with."""
        if self.ours is None:
            return "not measured"
        if self.claim.paper is None:
            return None
        # Both signs are in the interval, and it is one: this many runs do not tell.
        if self.ours.runs > 1 and self.ours.low < 0 < self.ours.high:
            return "not clear"
        if self.ours.mean * self.claim.paper <= 0:
            return "contradicts"
        size = self.ours.mean / self.claim.paper
        return "agrees" if 1 / _FACTOR <= size <= _FACTOR else "agrees, other size"


# Values of one figure of one topology under one workload, run by run; the same runs (arrivals,
# rates) in the same order for every topology.
Values = Callable[[str, str, Figure], Sequence[float]]


def findings(values: Values) -> tuple[Finding, ...]:
    """Every claim beside ours; changes are taken over all rates and repeats, pair by pair."""
    found = []
    for claim in CLAIMS:
        before, after = (values(claim.workload, t, claim.figure) for t in CHANGES[claim.change])
        same = bool(before) and len(before) == len(after)
        found.append(Finding(claim, relative_change(before, after) if same else None))
    return tuple(found)


def findings_table(found: Sequence[Finding], title: str | None = None) -> Table:
    """A line for each claim."""
    shown = Table("workload", "change", "figure", title=title)
    for name in ("paper", "here", "95 %"):
        shown.add_column(name, justify="right")
    shown.add_column("verdict")
    for one in found:
        claim, ours = one.claim, one.ours
        before, after = CHANGES[claim.change]
        interval = "" if ours is None or ours.runs == 1 else f"{ours.low:+.0%} to {ours.high:+.0%}"
        shown.add_row(
            claim.workload,
            f"{before} to {after}",
            claim.figure,
            "sign unclear" if claim.paper is None else f"{claim.paper:+.0%}",
            "-" if ours is None else f"{ours.mean:+.0%}",
            interval,
            one.verdict or "",
        )
    return shown
