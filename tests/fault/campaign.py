"""Faults drawn from a seed, one after the other, into a system under load; what is counted after
each, and the report.

Fault number `i` is a function of seed and `i` alone, so that one that failed can be had again:
`pytest tests/fault -k campaign --fault-seed S --fault-first i --faults 1`.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from evaluation.soak.vitals import Life, Vitals, vitals
from memserve.bench.environment import Environment, capture_environment
from memserve.pool.segment import start_time
from tests.fault.load import Load, Question, Seen, What
from tests.fault.processes import PATIENCE

# Right answers that prove that the system serves again.
PROOF = 6
# Until everything that was lost is back: restarts, models loaded, leases of transfers over.
WHOLE_SECONDS = 90.0
QUIET_SECONDS = 45.0
STUCK_SECONDS = 20.0  # where something is broken already
MB = 1e6


class World(Protocol):
    """A system into which faults are brought. Its methods raise `Broken`."""

    name: str
    url: str
    # By name: bring it about, and say what was done. Comes back when the cause is gone.
    kinds: Mapping[str, Callable[[random.Random], str]]
    # Kinds that leave clients without a gateway: connections end.
    cutting: frozenset[str]

    def start(self) -> None: ...
    def end(self, *, kill: bool = False) -> None:
        """`kill`: what is stuck need not be asked."""

    def questions(self) -> Sequence[Question]: ...
    def processes(self) -> dict[str, int]:
        """Pids by name, of those that should run."""

    def until_whole(self, seconds: float) -> None:
        """Until every process is there, ready, and known to every gateway."""

    def leaks(self, seconds: float) -> dict[str, int]:
        """What is still held when nothing runs, by process, after so many seconds at most."""


class Broken(Exception):
    """A system that does not come back."""


@dataclass(frozen=True)
class Draw:
    """Which fault, and what it draws from."""

    seed: int
    number: int
    kind: str

    @property
    def source(self) -> random.Random:
        return random.Random(f"{self.seed} {self.number} {self.kind}")


def draws(seed: int, first: int, kinds: Sequence[str]) -> Iterator[Draw]:
    """Every kind once, in a shuffled order, then every kind in another order, and so on."""
    number = first
    while True:
        turn, place = divmod(number, len(kinds))
        order = sorted(kinds)
        random.Random(f"{seed} {turn}").shuffle(order)
        yield Draw(seed, number, order[place])
        number += 1


class FaultRecord(msgspec.Struct):
    """What was seen from one fault until nothing ran."""

    world: str
    seed: int
    number: int
    kind: str
    happened: str = ""
    whole_seconds: float = 0.0  # until every process was back
    pause_seconds: float = 0.0  # the longest of any client
    right: int = 0
    errors: int = 0  # in the API's form
    cut: int = 0
    wrong: int = 0
    unanswered: int = 0
    leaked: int = 0
    dead_threads: int = 0
    problems: list[str] = []

    @property
    def replay(self) -> str:
        world = f"-k '{self.world} and campaign'"
        return (
            f"pytest tests/fault/test_campaign.py {world} "
            f"--fault-seed {self.seed} --fault-first {self.number} --faults 1"
        )


class LifeRecord(msgspec.Struct):
    """A process's first and last figures."""

    world: str
    name: str
    pid: int
    begin: Vitals
    end: Vitals
    looks: int = 1


@dataclass
class Report:
    """Written to a file by `write`."""

    faults: list[FaultRecord] = field(default_factory=list)
    lives: list[LifeRecord] = field(default_factory=list)

    def write(self, file: Path) -> None:
        """As JSON if the file is called so, or as Markdown."""
        environment = capture_environment()
        if file.suffix == ".json":
            found = _File(environment, self.faults, self.lives)
            file.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
        else:
            file.write_text(_markdown(environment, self), encoding="utf-8")


class _File(msgspec.Struct):
    environment: Environment
    faults: list[FaultRecord]
    lives: list[LifeRecord]


@dataclass
class Campaign:
    """Runs faults in one world. A world that does not come back is ended, and started anew."""

    world: World
    report: Report
    seed: int
    say: Callable[[str], None] = print
    _lives: dict[Life, LifeRecord] = field(default_factory=dict)

    def run(self, first: int, count: int, seconds: float = math.inf) -> None:
        """So many faults, or as many as there is time for."""
        end = time.monotonic() + seconds
        kinds = draws(self.seed, first, list(self.world.kinds))
        begun = False
        load: Load | None = None
        try:
            for draw, _ in zip(kinds, range(count), strict=False):
                if time.monotonic() > end:
                    break
                if not begun:
                    self.world.start()
                    load = Load(self.world, self.world.questions(), seed=self.seed)
                    begun = True
                    self._settle(load)
                assert load is not None
                record = self._one(load, draw)
                self.report.faults.append(record)
                self.say(_line(record))
                if record.problems:  # what comes next is not to suffer from it
                    self.world.end(kill=True)
                    load.end()
                    begun = False
        finally:
            if begun and load is not None:
                load.end()
            if begun:
                self.world.end()

    def _settle(self, load: Load) -> None:
        """What is made late is made, and threads are counted."""
        self.world.until_whole(WHOLE_SECONDS)
        load.resume()
        assert load.right(3 * PROOF, WHOLE_SECONDS), "it does not serve from the start"
        load.pause(2 * PATIENCE)
        load.take()
        self._look()

    def _one(self, load: Load, draw: Draw) -> FaultRecord:
        record = FaultRecord(self.world.name, draw.seed, draw.number, draw.kind, problems=[])
        load.resume()
        if not load.right(PROOF, WHOLE_SECONDS):
            record.problems.append("it did not serve before the fault")
        begin = time.monotonic()
        try:
            record.happened = self.world.kinds[draw.kind](draw.source)
            self.world.until_whole(WHOLE_SECONDS)
            record.whole_seconds = round(time.monotonic() - begin, 2)
            if not load.right(PROOF, WHOLE_SECONDS):
                record.problems.append("no right answers behind the fault")
        except (Broken, AssertionError, OSError) as error:  # what a fault waits for, too
            record.problems.append(f"not whole: {error}")
        stuck = load.pause(STUCK_SECONDS if record.problems else 2 * PATIENCE)
        self._count(record, load.take(), stuck)
        if not record.problems:
            self._inspect(record)
        return record

    def _count(self, record: FaultRecord, seen: Sequence[Seen], stuck: int) -> None:
        def of(what: What) -> list[Seen]:
            return [each for each in seen if each.what is what]

        record.pause_seconds = round(max((each.pause for each in seen), default=0.0), 2)
        record.right, record.errors = len(of(What.RIGHT)), len(of(What.ERROR))
        record.cut, record.wrong = len(of(What.CUT)), len(of(What.WRONG))
        unanswered = of(What.UNANSWERED)
        if record.kind not in self.world.cutting:
            unanswered += of(What.CUT)
        record.unanswered = len(unanswered) + stuck
        for each in (*of(What.WRONG)[:3], *unanswered[:3]):
            record.problems.append(f"{each.what}: {each.detail}")
        if stuck:
            record.problems.append(f"{stuck} requests never ended")

    def _inspect(self, record: FaultRecord) -> None:
        """When nothing runs."""
        try:
            leaks = self.world.leaks(QUIET_SECONDS)
        except (Broken, AssertionError, OSError) as error:
            record.problems.append(f"at rest: {error}")
            return
        record.leaked = sum(leaks.values())
        record.problems += [f"{name} holds {count}" for name, count in leaks.items() if count]
        for name, before, now in self._look():
            record.dead_threads += before - now
            record.problems.append(f"{name} has {now} threads, and had {before}")

    def _look(self) -> list[tuple[str, int, int]]:
        """Figures of all processes; those that have lost threads, with how many they had."""
        lost = []
        for name, pid in self.world.processes().items():
            started, now = start_time(pid), vitals(pid)
            if started is None or now is None:
                continue
            known = self._lives.get(life := Life(name, pid, started))
            if known is None:
                self._lives[life] = LifeRecord(self.world.name, name, pid, now, now)
                self.report.lives.append(self._lives[life])
                continue
            if now.threads < known.end.threads:
                lost.append((name, known.end.threads, now.threads))
            known.end = now
            known.looks += 1
        return lost


def _line(record: FaultRecord) -> str:
    verdict = "; ".join(record.problems) or "whole"
    return (
        f"{record.world} {record.number} {record.kind}: {record.happened}: {verdict} after "
        f"{record.whole_seconds:.1f} s, {record.right} right, {record.errors} errors, "
        f"{record.cut} cut, pause {record.pause_seconds:.1f} s"
    )


_HEAD = """# Campaign of faults

Faults drawn from a seed, one after the other, under a load of streams, whole answers and
hang-ups. *members*: instances with a tiny model and a gateway, each a process. *up*: `memserve up`
with two gateway workers, its instances without a model. Behind each fault: every process back and
ready, right answers, then no load, and nothing held. *Whole*: seconds until then; *pause*: the
longest time that any client was without a token. *Errors* are in the API's form; *cut* are
connections that a killed gateway or worker took with it.

{count} faults, seeds {seeds}; {where}.

"""
_KINDS = (
    "| where | fault | count | right | errors | cut | wrong tokens | unanswered | leaked blocks "
    "| dead threads | whole P50, s | whole max, s | pause P50, s | pause max, s |\n"
    "| --- | --- |" + " ---: |" * 12 + "\n"
)
_LIVES = (
    "\n## Processes, from the first look to the last\n\nLives of ten looks or more; MB of memory "
    "of their own (anonymous).\n\n"
    "| where | process | looks | MB first | MB last | fds first | fds last | threads first "
    "| threads last |\n| --- | --- |" + " ---: |" * 7 + "\n"
)
_LONG = 10  # looks


def _markdown(environment: Environment, report: Report) -> str:
    where = f"{environment.time}, {environment.cores} cores, {environment.cpu}, "
    where += f"commit {environment.commit}"
    seeds = ", ".join(map(str, sorted({fault.seed for fault in report.faults})))
    parts = [_HEAD.format(count=len(report.faults), seeds=seeds, where=where), _KINDS]
    for key in sorted({(fault.world, fault.kind) for fault in report.faults}):
        own = [fault for fault in report.faults if (fault.world, fault.kind) == key]
        names = ("right", "errors", "cut", "wrong", "unanswered", "leaked", "dead_threads")
        sums = [str(sum(getattr(fault, name) for fault in own)) for name in names]
        times = []
        for values in ([f.whole_seconds for f in own], [f.pause_seconds for f in own]):
            times += [f"{statistics.median(values):.2f}", f"{max(values):.2f}"]
        parts.append(f"| {' | '.join((*key, str(len(own)), *sums, *times))} |\n")
    parts.append(_LIVES)
    for life in sorted(report.lives, key=lambda each: (each.world, each.name)):
        if life.looks >= _LONG:
            begin, end = life.begin, life.end
            cells = (
                *(life.world, life.name, str(life.looks)),
                *(f"{begin.private / MB:.0f}", f"{end.private / MB:.0f}"),
                *map(str, (begin.fds, end.fds, begin.threads, end.threads)),
            )
            parts.append(f"| {' | '.join(cells)} |\n")
    failed = [fault for fault in report.faults if fault.problems]
    if failed:
        parts.append("\n## What failed\n\n")
    for fault in failed:
        said = "; ".join(fault.problems).replace("\n", " ")
        parts.append(f"- {fault.kind}, {fault.happened}: {said}\n  `{fault.replay}`\n")
    return "".join(parts)
