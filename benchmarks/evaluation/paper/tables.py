"""What `python -m evaluation paper` found, reduced to tables and to sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
from rich.console import Group
from rich.table import Table

from evaluation.paper.claims import CHANGES, Figure, Finding, findings, findings_table
from evaluation.paper.matrix import CellRun
from memserve.bench.measure import GENERATOR
from memserve.bench.processes import ProcessStats
from memserve.bench.report import Distribution, ServingSummary
from memserve.bench.serving_page import FIGURES
from memserve.bench.statistics import Estimate, relative_change
from memserve.types import Role

# Bars that the system sets itself, beside what the paper found.
_TTFT_CUT = -0.40
# Of a core: an instance that is less busy has computed no prompt.
_IDLE = 0.02


class PaperRow(msgspec.Struct, frozen=True):
    """All repeats of one workload at one rate on one topology."""

    workload: str
    topology: str
    rate: float
    figures: tuple[Estimate | None, ...]  # as `serving_page.FIGURES`, unscaled
    requests: int
    failed: int
    busy: tuple[tuple[str, float], ...]  # CPU seconds per second, by process
    peak_bytes: tuple[tuple[str, int], ...]


class TargetRow(msgspec.Struct, frozen=True):
    """A bar, and where we are."""

    text: str
    found: Estimate | None
    limit: float

    @property
    def met(self) -> bool | None:
        return None if self.found is None else self.found.mean <= self.limit


class PaperResult(msgspec.Struct, frozen=True):
    """Everything but the single runs, which are in `runs.jsonl`."""

    rows: tuple[PaperRow, ...]
    findings: tuple[Finding, ...]
    simulated: tuple[Finding, ...]
    targets: tuple[TargetRow, ...]
    simulated_notes: tuple[str, ...]  # why some of these are not the paper's
    missing: tuple[str, ...]  # what was not measured, and why


def reduce_runs(
    runs: Sequence[CellRun],
    simulated: Sequence[Finding],
    simulated_notes: Sequence[str],
    missing: Sequence[str],
) -> PaperResult:
    """What is not there is left out."""
    keys = dict.fromkeys((r.cell.config.workload, r.cell.topology, r.cell.rate) for r in runs)
    rows = [
        _row(*key, [r for r in runs if _key(r) == key])
        for key in sorted(keys, key=lambda k: (list(_order(runs)).index(k[0]), k[2]))
    ]
    return PaperResult(
        tuple(rows),
        measured_findings(runs),
        tuple(simulated),
        tuple(_targets(runs)),
        tuple(simulated_notes),
        tuple(missing),
    )


def measured_findings(runs: Sequence[CellRun]) -> tuple[Finding, ...]:
    """The paper's figures beside the measured ones."""

    def values(workload: str, topology: str, figure: Figure) -> Sequence[float]:
        return figures_of(runs, workload, topology, figure)

    return findings(values)


def figures_of(
    runs: Sequence[CellRun], workload: str, topology: str, figure: Figure
) -> list[float]:
    """Of all rates and repeats, in order of these."""
    own = [r for r in runs if _key(r)[:2] == (workload, topology)]
    own.sort(key=lambda r: (r.cell.rate, r.cell.repeat))
    found = [_figure(r.run.summary, figure) for r in own]
    return [value for value in found if value is not None]


def paper_tables(result: PaperResult) -> Group:
    """All tables, one below the other."""
    return Group(
        findings_table(result.findings, "The paper's figures and those measured here"),
        findings_table(
            result.simulated,
            "The same on 8 x H800 with Llama2-13B, TP=2, simulated",
        ),
        targets_table(result.targets),
        *(
            rows_table([row for row in result.rows if row.workload == name], name)
            for name in dict.fromkeys(row.workload for row in result.rows)
        ),
        *(f"not measured: {reason}" for reason in result.missing),
    )


def rows_table(rows: Sequence[PaperRow], title: str | None = None) -> Table:
    """A line for each topology at each rate; means of repeats with 95 % intervals."""
    shown = Table("sessions/s", "topology", title=title)
    for label, _, _ in FIGURES:
        shown.add_column(label, justify="right")
    shown.add_column("failed", justify="right")
    for row in rows:
        cells = [
            "-" if value is None else value.shown(scale)
            for value, (_, scale, _) in zip(row.figures, FIGURES, strict=True)
        ]
        shown.add_row(f"{row.rate:g}", row.topology, *cells, f"{row.failed}/{row.requests}")
    return shown


def targets_table(targets: Sequence[TargetRow]) -> Table:
    shown = Table("target", title="Targets")
    for name in ("found", "95 %"):
        shown.add_column(name, justify="right")
    shown.add_column("met")
    for target in targets:
        found = target.found
        interval = (
            "" if found is None or found.runs == 1 else f"{found.low:+.0%} to {found.high:+.0%}"
        )
        met = {None: "not measured", True: "yes", False: "no"}[target.met]
        shown.add_row(target.text, "-" if found is None else f"{found.mean:+.0%}", interval, met)
    return shown


def busy_table(rows: Sequence[PaperRow]) -> Table:
    """What the processes of each topology used: CPU as cores, peak memory."""
    names = list(dict.fromkeys(name for row in rows for name, _ in row.busy))
    shown = Table("workload", "sessions/s", "topology", title="CPU (cores) and peak memory (MB)")
    for name in names:
        shown.add_column(name, justify="right")
    for row in rows:
        busy, peak = dict(row.busy), dict(row.peak_bytes)
        cells = [f"{busy[n]:.2f}, {peak[n] / 1e6:.0f}" if n in busy else "" for n in names]
        shown.add_row(row.workload, f"{row.rate:g}", row.topology, *cells)
    return shown


def reasons(result: PaperResult) -> list[str]:
    """Why findings contradict the paper, with what the processes did meanwhile."""
    said = []
    for found in result.findings:
        claim, ours = found.claim, found.ours
        if found.verdict == "contradicts" and ours is not None and claim.paper is not None:
            before, after = CHANGES[claim.change]
            said.append(
                f"{claim.workload}, {before} to {after}, {claim.figure}: the paper has "
                f"{claim.paper:+.0%}, here it is {ours.mean:+.0%}. "
                f"{_because(result, claim.workload, before, after)}"
            )
    return said


def _because(result: PaperResult, workload: str, before: str, after: str) -> str:
    """Figures first; then what is known of this machine."""
    shares = []
    for name in (before, after):
        busy = ", ".join(f"{who} {share:.0%}" for who, share in _busy(result, workload, name))
        shares.append(f"{name} {_tpot(result, workload, name)}, cores busy: {busy or 'not known'}")
    told = "; ".join(shares)
    if before == "PD":
        why = (
            "Supposed, not measured: one core decodes here where two did, both share one memory "
            "bus, and the prompts of a 270M model cost too little for their absence from the "
            "decoding core to pay for it"
        )
    elif _idle(result, workload, after):
        why = (
            "The scheduler had the decode instance compute the prompts itself and left the "
            "prefill instance idle, so that this is one core against two"
        )
    else:
        ttft, jct = (_mean(result, workload, before, f) for f in ("TTFT mean s", "JCT mean s"))
        why = (
            f"Of a request's {jct:.2f} s in {before}, {ttft:.2f} s are before its first token, and "
            "caching saves of nothing else"
        )
    return f"{why}. {told}."


def _tpot(result: PaperResult, workload: str, topology: str) -> str:
    mean = _mean(result, workload, topology, "TPOT mean ms")
    return "without TPOT" if math.isnan(mean) else f"TPOT {mean * 1e3:.0f} ms"


def _mean(result: PaperResult, workload: str, topology: str, label: str) -> float:
    """Of all rates, seconds; NaN where there is none."""
    index = [name for name, _, _ in FIGURES].index(label)
    own = [row for row in result.rows if (row.workload, row.topology) == (workload, topology)]
    means = [value.mean for row in own if (value := row.figures[index]) is not None]
    return sum(means) / len(means) if means else math.nan


def _idle(result: PaperResult, workload: str, topology: str) -> bool:
    busy = _busy(result, workload, topology)
    return any(name.startswith(Role.PREFILL) and share < _IDLE for name, share in busy)


def _busy(result: PaperResult, workload: str, topology: str) -> list[tuple[str, float]]:
    """Mean over the rates, of the instances."""
    own = [row for row in result.rows if (row.workload, row.topology) == (workload, topology)]
    shares: dict[str, list[float]] = {}
    for row in own:
        for name, share in row.busy:
            if name not in (GENERATOR, "gateway"):
                shares.setdefault(name, []).append(share)
    return [(name, sum(values) / len(values)) for name, values in shares.items()]


def _targets(runs: Sequence[CellRun]) -> list[TargetRow]:
    targets = []
    for workload in _order(runs):
        pairs = [figures_of(runs, workload, t, "TTFT mean") for t in ("1P1D", "1P1D-CC")]
        text = f"{workload}: mean TTFT of 1P1D-CC at least 40 % below 1P1D's"
        targets.append(TargetRow(text, _change(*pairs), _TTFT_CUT))
    for workload in _order(runs):
        gaps = [_gaps(runs, workload, topology) for topology in ("PD-CC", "1P1D-CC")]
        text = f"{workload}: P99 inter-token time of 1P1D-CC not above PD-CC's"
        targets.append(TargetRow(text, _change(*gaps), 0.0))
    return targets


def _change(before: Sequence[float], after: Sequence[float]) -> Estimate | None:
    return relative_change(before, after) if len(before) == len(after) else None


def _gaps(runs: Sequence[CellRun], workload: str, topology: str) -> list[float]:
    own = [r for r in runs if _key(r)[:2] == (workload, topology)]
    own.sort(key=lambda r: (r.cell.rate, r.cell.repeat))
    return [gap.p99 for r in own if (gap := r.run.summary.inter_token) is not None]


def _order(runs: Sequence[CellRun]) -> list[str]:
    return list(dict.fromkeys(str(r.cell.config.workload) for r in runs))


def _key(run: CellRun) -> tuple[str, str, float]:
    return run.cell.config.workload, run.cell.topology, run.cell.rate


def _row(workload: str, topology: str, rate: float, runs: Sequence[CellRun]) -> PaperRow:
    summaries = [r.run.summary for r in runs]
    processes = [one for r in runs for one in r.run.processes]
    seconds = sum(summary.duration for summary in summaries)
    names = dict.fromkeys(one.name for one in processes)
    return PaperRow(
        workload=workload,
        topology=topology,
        rate=rate,
        figures=tuple(
            Estimate.of([v for s in summaries if (v := value(s)) is not None])
            for _, _, value in FIGURES
        ),
        requests=sum(summary.requests for summary in summaries),
        failed=sum(summary.failed for summary in summaries),
        busy=tuple((name, _cpu(processes, name) / seconds) for name in names if seconds),
        peak_bytes=tuple(
            (name, max(one.peak_bytes for one in processes if one.name == name)) for name in names
        ),
    )


def _cpu(processes: Sequence[ProcessStats], name: str) -> float:
    return sum(one.cpu_seconds for one in processes if one.name == name)


def _figure(summary: ServingSummary, figure: Figure) -> float | None:
    name, kind = figure.split()
    of: Distribution | None = {"TTFT": summary.ttft, "JCT": summary.jct}[name]
    if of is None:
        return None
    return {"mean": of.mean, "P99": of.p99}[kind]
