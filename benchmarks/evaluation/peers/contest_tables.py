"""Tables of contests: servers below each other, ours against each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import geometric_mean

from rich.table import Table

from evaluation.peers.serving import LOADS, OURS, Contest, PeerRun
from memserve.bench.report import Distribution, ServingSummary

Figure = Callable[[ServingSummary], Distribution | None]
_RATIOS = ("mean", "P99")
_FIGURES: tuple[tuple[str, Figure], ...] = (
    ("TTFT ms", lambda s: s.ttft),
    ("TPOT ms", lambda s: s.tpot),
    ("JCT ms", lambda s: s.jct),
)


def contest_tables(contest: Contest) -> Iterator[Table]:
    """One for each load that there was."""
    for load in LOADS:
        if runs := [run for run in contest.runs if run.load == load]:
            yield _contest_table(contest, f"{contest.name}, {load} loop", runs)


def _contest_table(contest: Contest, title: str, runs: Sequence[PeerRun]) -> Table:
    table = Table(
        title=f"{title}; means over the rounds, then ours / theirs of the same round: geometric "
        "mean (lowest-highest), below 1 where ours is faster"
    )
    figures = _FIGURES if contest.tiers else _FIGURES[:2]
    columns = ("mean", "P99") if contest.tiers else ("mean", "P50", "P99")
    table.add_column("server")
    for label, _ in figures:
        for column in columns:
            table.add_column(f"{label} {column}", justify="right")
        table.add_column("ratio of means", justify="right")
        table.add_column("of P99", justify="right")
    table.add_column("output tokens/s", justify="right")
    table.add_column("rounds", justify="right")
    table.add_column("cached", justify="right")
    if contest.tiers:
        table.add_column("MB handed over", justify="right")
    own = [run for run in runs if OURS in run.server]
    for name in dict.fromkeys(run.server for run in runs):
        mine = [run for run in runs if run.server == name]
        cells = [cell for _, figure in figures for cell in _cells(own, mine, figure, columns)]
        rate = sum(run.summary.output_tokens_per_second for run in mine) / len(mine)
        cells += [f"{rate:.1f}", str(len(mine))]
        cells += [_cached(mine, contest.tiers)]
        cells += [_handed_over(mine)] if contest.tiers else []
        table.add_row(name, *cells)
    return table


def _cells(
    own: Sequence[PeerRun], mine: Sequence[PeerRun], figure: Figure, columns: Sequence[str]
) -> Iterator[str]:
    for column in columns:
        values = list(_values(mine, figure, column))
        yield f"{1000 * sum(values) / len(values):.0f}" if values else "-"
    for column in _RATIOS:
        yield "" if mine == own else _ratio(own, mine, figure, column)


def _values(
    runs: Sequence[PeerRun],
    figure: Figure,
    column: str,
) -> Iterator[float]:
    for run in runs:
        if (found := figure(run.summary)) is not None:
            yield {"mean": found.mean, "P50": found.p50, "P99": found.p99}[column]


def _ratio(
    own: Sequence[PeerRun],
    theirs: Sequence[PeerRun],
    figure: Figure,
    column: str,
) -> str:
    """Of rounds that both were in."""
    by_round = {run.repeat: run for run in own}
    pairs = [(by_round[run.repeat], run) for run in theirs if run.repeat in by_round]
    ratios = [
        ours / other
        for a, b in pairs
        for ours, other in zip(
            _values([a], figure, column), _values([b], figure, column), strict=False
        )
        if ours > 0 and other > 0
    ]
    if not ratios:
        return "-"
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def _cached(runs: Sequence[PeerRun], spread: bool) -> str:
    ratios = [run.summary.cached_ratio for run in runs]
    mean = f"{sum(ratios) / len(ratios):.0%}"
    return f"{mean} ({min(ratios):.0%}-{max(ratios):.0%})" if spread else mean


def _handed_over(runs: Sequence[PeerRun]) -> str:
    """Of a round; servers that are not ours do not tell."""
    moved = [run.summary.moved_bytes for run in runs if run.summary.moved_bytes is not None]
    return f"{sum(moved) / len(moved) / 1e6:.1f}" if moved else "-"
