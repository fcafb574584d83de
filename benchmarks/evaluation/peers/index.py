"""Indexes of prefixes beside each other: the same prompts, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import msgspec
from rich.table import Table

from evaluation.peers.process import PeerFailed
from memserve.bench.vllm_engine import ROOT, python_of, why_missing

# Run by the Pythons of peers: nothing of ours is needed by it.
SCRIPT = Path(__file__).with_name("index_process.py")
_SECONDS = 120.0  # for one index
_TOLD_LINES = 3


class IndexShape(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts that begin with one of a few prefixes."""

    count: int = 1000
    tokens: int = 4096
    prefixes: int = 50
    prefix_tokens: int = 1024
    samples: int = 200  # matches that are timed


QUICK = IndexShape(count=200, tokens=2048, prefixes=10, prefix_tokens=512, samples=100)


class _Measured(msgspec.Struct, frozen=True):
    insert_us: float
    match_us: float
    bytes_per_prompt: float


class IndexFigures(msgspec.Struct, frozen=True):
    """Medians over the repeats."""

    name: str
    knows: str  # of whom it knows prefixes
    insert_us: float
    match_us: float
    bytes_per_prompt: float


class IndexReport(msgspec.Struct, frozen=True):
    shape: IndexShape
    repeats: int
    figures: tuple[IndexFigures, ...]
    skipped: dict[str, str]


class _Index(msgspec.Struct, frozen=True):
    name: str
    knows: str
    key: str  # of `index_process`
    peer: str | None  # whose environment; None: ours


_ONE, _ALL = "one instance", "all instances"
_INDEXES = (
    _Index("memserve pool", _ONE, "pool", None),
    _Index("SGLang RadixCache", _ONE, "sglang", "sglang"),
    _Index("vLLM block hashes", _ONE, "vllm", "vllm"),
    _Index("memserve prompt trees", _ALL, "prompt-trees", None),
    _Index("Dynamo RadixTree", _ALL, "dynamo", "dynamo"),
)


def run_index_bench(
    shape: IndexShape, repeats: int, progress: Callable[[str], None], root: Path = ROOT
) -> IndexReport:
    """Measure each, in turns. Raises PeerFailed if one of ours fails; peers are skipped."""
    skipped: dict[str, str] = {}
    measured: dict[str, list[_Measured]] = {one.name: [] for one in _INDEXES}
    for repeat in range(repeats):
        order = _INDEXES if repeat % 2 == 0 else _INDEXES[::-1]
        for one in order:
            if one.name in skipped:
                continue
            if one.peer is not None and (why := why_missing(one.peer, root)) is not None:
                skipped[one.name] = why
                continue
            progress(f"{one.name}, {repeat + 1} of {repeats}")
            try:
                measured[one.name].append(_measure(one, shape, root))
            except PeerFailed as error:
                if one.peer is None:
                    raise
                skipped[one.name] = str(error)
    figures = [_figures(one, measured[one.name]) for one in _INDEXES if measured[one.name]]
    return IndexReport(shape, repeats, tuple(figures), skipped)


def index_table(report: IndexReport) -> Table:
    shape = report.shape
    table = Table(
        title=f"Indexes: {shape.count} prompts of {shape.tokens} tokens, {shape.prefixes} shared "
        f"prefixes of {shape.prefix_tokens}, blocks of 16; ratios are peer / ours"
    )
    for column in ("index", "knows", "insert us", "ratio", "match us", "ratio", "KB/prompt"):
        table.add_column(column, justify="left" if column in ("index", "knows") else "right")
    table.add_column("ratio", justify="right")
    ours = {f.knows: f for f in report.figures if f.name.startswith("memserve")}
    for f in report.figures:
        own = ours[f.knows]
        pairs = (
            (f.insert_us, own.insert_us, 1.0),
            (f.match_us, own.match_us, 1.0),
            (f.bytes_per_prompt, own.bytes_per_prompt, 1e-3),
        )
        cells = []
        for value, base, scale in pairs:
            cells += [f"{value * scale:.1f}", f"{value / base:.2f}" if base > 0 else "-"]
        table.add_row(f.name, f.knows, *cells)
    return table


def _figures(one: _Index, runs: list[_Measured]) -> IndexFigures:
    return IndexFigures(
        one.name,
        one.knows,
        median(run.insert_us for run in runs),
        median(run.match_us for run in runs),
        median(run.bytes_per_prompt for run in runs),
    )


def _measure(one: _Index, shape: IndexShape, root: Path) -> _Measured:
    python = sys.executable if one.peer is None else str(python_of(one.peer, root))
    # -P: the script's folder is none to import from.
    command = [python, "-P", "-W", "ignore", str(SCRIPT), one.key]
    try:
        done = subprocess.run(
            [*command, msgspec.json.encode(shape).decode()],
            capture_output=True,
            check=False,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerFailed(f"{one.name}: {error}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()[-_TOLD_LINES:]
        raise PeerFailed(f"{one.name}: {' | '.join(lines)}")
    try:
        # Some libraries greet on standard output.
        return msgspec.json.decode(done.stdout.splitlines()[-1], type=_Measured)
    except (IndexError, msgspec.DecodeError) as error:
        raise PeerFailed(f"{one.name}: no result: {error}") from error
