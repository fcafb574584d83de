"""`DemandMeter`: what arrives, from one look at the schedulers to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memserve.planner.contract import LoadReport
from memserve.scheduler.arrivals import Arrival

# What came so long ago counts for 37 % of what comes now: some looks, and far less than loads last.
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
        self._before: list[tuple[float, int]] = []  # each scheduler's clock and count
        self._looks: list[_Look] = []
        self._at: float | None = None
        self._turned: tuple[float, int] | None = None  # when, and answers until then

    def look(self, now: float, reports: Sequence[LoadReport]) -> Traffic | None:
        """Take in one report of each scheduler; return what arrives, None if that is nothing.

        `now`: seconds of the caller's clock, which only grows. A scheduler that counts less than
        before was started again; what it counted until now is not known.
        """
        before, at = self._before, self._at
        self._before = [(one.now, one.requests) for one in reports]
        self._at = now
        if at is not None and now > at and len(before) == len(reports):
            newest = _look(now, now - at, before, reports)
            if self._turns(newest):
                self._looks.clear()
                self._turned = (now, _answers(reports))
            self._looks.append(newest)
        self._looks = [one for one in self._looks if one.at > now - FORGOTTEN]
        return self._traffic(now, reports)

    def _traffic(self, now: float, reports: Sequence[LoadReport]) -> Traffic | None:
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
        if not prompts or not came:
            return None
        lengths = [one.output_tokens for one in reports]
        settled = self._settled(now, reports)
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

    def _settled(self, now: float, reports: Sequence[LoadReport]) -> bool:
        if self._turned is None:
            return True
        at, answers = self._turned
        if now - at >= TURN_SECONDS or _answers(reports) - answers >= TURN_ANSWERS:
            self._turned = None
        return self._turned is None


def _answers(reports: Sequence[LoadReport]) -> int:
    return sum(one.answers for one in reports)


def _look(
    now: float, seconds: float, before: Sequence[tuple[float, int]], reports: Sequence[LoadReport]
) -> _Look:
    requests = 0
    fresh: list[Arrival] = []
    for (then, counted), report in zip(before, reports, strict=True):
        if report.requests >= counted and report.now >= then:
            requests += report.requests - counted
            fresh += [one for one in report.arrivals if one.at > then]
    step = -(-len(fresh) // SAMPLE) or 1
    return _Look(now, seconds, requests, tuple(fresh[::step]))
