"""`DemandMeter`: what arrives, from one look at the schedulers to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memserve.planner.contract import LoadReport
from memserve.scheduler.arrivals import Arrival
from memserve.types import SchedulerId

# Arrivals of this age weigh 37 % of present ones: some looks, and far less than loads last.
MEMORY_SECONDS = 15.0
FORGOTTEN = 4 * MEMORY_SECONDS
# A load turns where one look counts so many standard deviations more or less than was expected (of
# a Poisson process), and by this factor. What was before is forgotten then.
TURN_DEVIATIONS = 8.0
TURN_FACTOR = 1.5
# Until so many answers of the new load have ended, or so many seconds passed, its answers' length
# is that of the former load: nothing can be decided by it.
TURN_ANSWERS = 32
TURN_SECONDS = 30.0
SAMPLE = 256  # prompts of one look that stand for all of it


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests per second, with prompts that stand for them. `weights`: of each prompt."""

    rate: float
    prompts: Sequence[Arrival]
    weights: Sequence[float]
    output_tokens: float  # of an answer, expected
    settled: bool = True  # False: the load has just turned, and answers are not known yet


@dataclass(frozen=True, slots=True)
class _Look:
    at: float
    seconds: float
    requests: int
    sample: tuple[Arrival, ...]


class DemandMeter:
    """Remembers the last looks, of which newer ones count more. Rate and prompts are weighted
    alike: where few long prompts follow many short ones, their product never counts long prompts
    at the short ones' rate."""

    def __init__(self) -> None:
        self._before: dict[SchedulerId, LoadReport] = {}  # of the last look
        self._looks: list[_Look] = []
        self._at: float | None = None
        # When the load turned, and the reports of then.
        self._turned: tuple[float, dict[SchedulerId, LoadReport]] | None = None

    def look(self, now: float, reports: Sequence[LoadReport]) -> Traffic | None:
        """Take in the reports of the schedulers that answer, in any order; return what arrives,
        None if that is nothing or not known.

        `now`: seconds of the caller's clock, which only grows. Between looks at which not the same
        schedulers answer nothing is counted: what the others got is not known.
        """
        before, at = self._before, self._at
        latest = {one.scheduler: one for one in reports}
        self._before, self._at = latest, now
        if at is not None and now > at and latest and before.keys() == latest.keys():
            newest = _look(now, now - at, before, latest)
            if self._turns(newest):
                self._looks.clear()
                self._turned = (now, latest)
            self._looks.append(newest)
        self._looks = [one for one in self._looks if one.at > now - FORGOTTEN]
        return self._traffic(now, latest)

    @property
    def quiet(self) -> bool:
        """Whether no request came, as far as the meter remembers; False if that is not known."""
        return bool(self._looks) and not any(one.requests for one in self._looks)

    def _traffic(self, now: float, latest: Mapping[SchedulerId, LoadReport]) -> Traffic | None:
        came = seconds = 0.0
        prompts: list[Arrival] = []
        weights: list[float] = []
        for one in self._looks:
            weight = math.exp((one.at - now) / MEMORY_SECONDS)
            seconds += weight * one.seconds
            if one.sample:
                came += weight * one.requests
                prompts += one.sample
                weights += [weight * one.requests / len(one.sample)] * len(one.sample)
        if not prompts or not came or not latest:
            return None
        lengths = [one.output_tokens for one in latest.values()]
        settled = self._settled(now, latest)
        return Traffic(came / seconds, prompts, weights, sum(lengths) / len(lengths), settled)

    def _turns(self, newest: _Look) -> bool:
        """Whether a look is of another load than those before it."""
        seconds = sum(one.seconds for one in self._looks)
        if not seconds:
            return False
        expected = newest.seconds * sum(one.requests for one in self._looks) / seconds
        came = newest.requests
        far = abs(came - expected) > TURN_DEVIATIONS * math.sqrt(max(expected, 1.0))
        return far and not expected / TURN_FACTOR <= came <= expected * TURN_FACTOR

    def _settled(self, now: float, latest: Mapping[SchedulerId, LoadReport]) -> bool:
        if self._turned is None:
            return True
        at, then = self._turned
        ended = sum(latest[one].answers - then[one].answers for one in latest.keys() & then.keys())
        if now - at >= TURN_SECONDS or ended >= TURN_ANSWERS:
            self._turned = None
        return self._turned is None


def _look(
    now: float,
    seconds: float,
    before: Mapping[SchedulerId, LoadReport],
    latest: Mapping[SchedulerId, LoadReport],
) -> _Look:
    """Arrivals between two looks. Both looks are of the same schedulers."""
    requests = 0
    fresh: list[Arrival] = []
    for scheduler, report in latest.items():
        then = before[scheduler]
        # Reports that overtook each other count for nothing, rather than less.
        if report.now >= then.now and report.requests >= then.requests:
            requests += report.requests - then.requests
            fresh += [one for one in report.arrivals if one.at > then.now]
    step = -(-len(fresh) // SAMPLE) or 1
    return _Look(now, seconds, requests, tuple(fresh[::step]))
