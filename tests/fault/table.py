"""What the tests of faults found, as a table: `pytest tests/fault --fault-table FILE`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from memserve.bench.environment import Environment, capture_environment

_HEAD = """# Faults

Each row is a test with real processes (tiny model, CPU). *Whole*: seconds from the fault until
every survivor serves and nothing is held any more, neither for a sequence nor for a peer, with
the pool's integrity checked. *Pause*: the longest time that the client was without a token around
the fault; -: it had left, or its answer was over. Tokens are greedy, and equal to those of
Transformers' `generate` in every row.

`pytest tests/fault --fault-table benchmarks/faults.md` (`.json`: the same as JSON), {where}.

| case | what happened | whole, s | pause, s |
| --- | --- | --- | --- |
"""


@dataclass(frozen=True, slots=True)
class Row:
    case: str
    happened: str
    whole_seconds: float  # until the survivors were whole again
    pause_seconds: float | None  # without a token for the client; None: nobody waited


@dataclass(frozen=True, slots=True)
class _Found:
    environment: Environment
    rows: list[Row]


class FaultTable:
    """Collects rows in the order of the tests."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def note(self, case: str, happened: str, whole: float, pause: float | None = None) -> None:
        """Seconds."""
        self.rows.append(
            Row(case, happened, round(whole, 2), None if pause is None else round(pause, 2))
        )

    def write(self, file: Path) -> None:
        """As JSON if the file is called so, or as Markdown."""
        environment = capture_environment()
        if file.suffix == ".json":
            found = _Found(environment, self.rows)
            text = msgspec.json.format(msgspec.json.encode(found)).decode() + "\n"
        else:
            where = f"{environment.time}, {environment.cores} cores, {environment.cpu}, "
            where += f"commit {environment.commit}"
            text = _HEAD.format(where=where) + "".join(map(_line, self.rows))
        file.write_text(text, encoding="utf-8")


def _line(row: Row) -> str:
    pause = "-" if row.pause_seconds is None else f"{row.pause_seconds:.2f}"
    return f"| {row.case} | {row.happened} | {row.whole_seconds:.2f} | {pause} |\n"
