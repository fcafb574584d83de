"""Measuring the matrix: what has been measured is kept, and a second start goes on from there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from evaluation import with_evaluation
from evaluation.paper.matrix import Cell, CellRun, Group
from memserve.bench.measure import StartedCluster, started_cluster
from memserve.bench.report import append_lines
from memserve.bench.work import Work, load_sessions
from memserve.clock import Clock
from memserve.errors import ConfigError
from memserve.models.resolve import ModelDirectory, Progress
from memserve.workloads.session import Session

_LINES = "runs.jsonl"


class _Line(msgspec.Struct, frozen=True):
    """What we read of a line."""

    result: CellRun


class Kept:
    """The runs in a directory."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError for a file that is none of ours, or of another version."""
        self._path = directory / _LINES
        self._runs: dict[bytes, CellRun] = {}
        decoder = msgspec.json.Decoder(_Line)
        if self._path.exists():
            for number, line in enumerate(self._path.read_bytes().splitlines(), 1):
                try:
                    found = decoder.decode(line).result
                except msgspec.DecodeError as error:
                    raise ConfigError(
                        f"{self._path}:{number}: {error}; another version wrote it: "
                        "move it away to measure again"
                    ) from error
                self._runs[_key(found.cell)] = found

    def has(self, cell: Cell) -> bool:
        return _key(cell) in self._runs

    def add(self, run: CellRun) -> None:
        append_lines(self._path, run.cell, [run])
        self._runs[_key(run.cell)] = run

    def of(self, cells: Iterable[Cell]) -> tuple[CellRun, ...]:
        """Those that there are, in order."""
        return tuple(self._runs[_key(cell)] for cell in cells if self.has(cell))


def _key(cell: Cell) -> bytes:
    return msgspec.json.encode(cell)


class TimeIsUp(Exception):
    """Nothing more is to be begun."""


class Budget:
    """Time from now on."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        self._clock = clock
        self._end = clock.now() + seconds

    def check(self) -> None:
        """Raises TimeIsUp."""
        if self._clock.now() >= self._end:
            raise TimeIsUp


async def measure_groups(
    groups: Sequence[Group],
    kept: Kept,
    model: ModelDirectory,
    budget: Budget,
    progress: Progress,
) -> None:
    """Measure what is not kept. Raises TimeIsUp, BenchmarkError, ClusterError, ConfigError."""
    total = sum(len(group.cells) for group in groups)
    done = 0
    for group in groups:
        missing = [cell for cell in group.cells if not kept.has(cell)]
        done += len(group.cells) - len(missing)
        if not missing:
            continue
        budget.check()
        # Before the cluster starts: counting tokens must not take its cores.
        work = {_key(cell): load_sessions(cell.config, model, _quiet) for cell in missing}
        async with started_cluster(group.topology.cluster(missing[0].model), progress) as cluster:
            await _warm_up(cluster, missing[0], work[_key(missing[0])])
            for cell in missing:
                budget.check()
                done += 1
                name = f"{cell.topology}, {cell.config.workload}, {cell.rate:g}/s"
                progress(f"run {done} of {total}: {name}, repeat {cell.repeat + 1}")
                run = await cluster.run(
                    name, cell.config, work[_key(cell)], _failures(progress), cell.repeat
                )
                kept.add(CellRun(cell, run))


async def _warm_up(cluster: StartedCluster, cell: Cell, work: Work) -> None:
    """A prompt as long as the measured ones at both instances, which costs more the first time."""
    first = [item for item in work if isinstance(item, Session)][:1]
    twice = [Session(f"warm-up {n}", one.turns[:1], one.chat) for one in first for n in range(2)]
    config = msgspec.structs.replace(cell.config, concurrency=2)
    await cluster.run("warm-up", config, twice, _quiet)


def _failures(progress: Progress) -> Progress:
    """Only what went wrong: runs are short."""

    def failed(line: str) -> None:
        if not line.endswith(" requests"):
            progress(line)

    return failed


def _quiet(_: str) -> None:
    pass


def run_command(arguments: Sequence[str], destination: Path, progress: Progress) -> bool:
    """Run a module that writes JSON to `destination`, if that is not there yet; `arguments`
    begin with its name.

    False where it fails; what it says then is shown. A process of its own, so that one
    benchmark's threads and memory are not the next one's.
    """
    if destination.exists():
        return True
    destination.parent.mkdir(parents=True, exist_ok=True)
    progress(" ".join(arguments))
    command = (sys.executable, "-P", "-m", *arguments, "--json", str(destination))
    done = subprocess.run(
        command,
        env=with_evaluation(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        progress(done.stderr.decode(errors="replace").strip())
    return done.returncode == 0
