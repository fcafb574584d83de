"""Times between the tokens of a stream, as the gateway's histograms have them."""

from __future__ import annotations

import pytest

from memserve.api.chunks import DONE
from memserve.api.generate import CallKind, GenerateCall
from memserve.api.histogram import LATENCY_BOUNDS, Histogram
from memserve.clock import ManualClock
from memserve.gateway.pace import Pace
from memserve.gateway.stream import ClientStream
from memserve.tokens import from_ids
from tests.gateway_harness import Client


class Timed:
    """A stream of a manual clock, and the histograms of its times."""

    def __init__(self) -> None:
        call = GenerateCall(
            "c", CallKind.COMPLETION, "m", 1, (from_ids((1, 2)),), stream=True, include_usage=True
        )
        self.inter_token, self.per_token = Histogram(), Histogram()
        self.pace = Pace(self.inter_token, self.per_token)
        self.client, self.clock = Client(), ManualClock()
        self.stream = ClientStream(call, self.client.reply, (), self.clock)
        self.stream.pace = self.pace

    def receive(self, after: float, data: bytes, last: bool = False) -> None:
        self.clock.advance(after)
        self.stream.received(data, last)

    @property
    def gaps(self) -> dict[float, int]:
        """Observed times between tokens, by the upper bound of their bucket."""
        counts = zip(LATENCY_BOUNDS, self.inter_token.counts, strict=False)
        return {bound: count for bound, count in counts if count}


def test_times_are_of_tokens_as_the_client_gets_them() -> None:
    timed = Timed()
    timed.receive(7.0, b":0 1\ndata: a\n\n")  # before it: the time to the first token
    timed.receive(0.02, b":0 2\ndata: b\n\n")
    timed.receive(0.4, b":0 3,4\ndata: c\n\n")  # two share it
    assert timed.gaps == {0.025: 1, 0.25: 2}
    timed.receive(0.03, b":0 5\n\n")  # its text is held back
    timed.receive(0.03, b":0 6\ndata: d\n\n:0 7\ndata: e\n\n")
    assert timed.gaps == {0.025: 4, 0.25: 2}
    # An event without tokens is no token, nor are usage and the end.
    timed.receive(3.0, b":0 \ndata: f\n\n")
    timed.receive(3.0, b'data: {"choices":[],"usage":{}}\n\n' + DONE, last=True)
    assert timed.client.reply.ended
    assert sum(timed.gaps.values()) == 6
    assert timed.per_token.sum == 0
    timed.pace.ended()
    assert timed.per_token.sum == pytest.approx(0.48 / 6)
    assert sum(timed.per_token.counts) == 1


def test_a_pause_for_a_failover_is_a_time_between_tokens() -> None:
    timed = Timed()
    timed.receive(0.0, b":0 1\ndata: a\n\n")
    timed.receive(0.02, b":0 2\ndata")  # cut off
    timed.stream.begin_attempt()
    timed.receive(2.0, b":0 2\ndata: b\n\n")
    assert timed.gaps == {2.5: 1}


@pytest.mark.parametrize("data", [b"", b":0 1\ndata: a\n\n", b"data: plain\n\n" * 3])
def test_less_than_two_tokens_have_no_time_between(data: bytes) -> None:
    timed = Timed()
    timed.receive(0.1, data)
    timed.pace.ended()
    assert timed.gaps == {}
    assert timed.per_token == Histogram()


def test_tokens_that_come_with_the_first_one_are_behind_it() -> None:
    timed = Timed()
    timed.receive(0.1, b":0 1,2,3\ndata: a\n\n")
    timed.receive(0.3, b":0 4\ndata: b\n\n")
    timed.pace.ended()
    assert timed.per_token.sum == pytest.approx(0.1)
