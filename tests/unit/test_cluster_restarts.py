"""When a crashed process is started again."""

from __future__ import annotations

import socket

import pytest

from memserve.api.serving import bind
from memserve.clock import ManualClock
from memserve.cluster.port import ReservedPort
from memserve.cluster.restarts import RestartLimits, Restarts
from memserve.errors import ClusterError

LIMITS = RestartLimits(first_pause=1, longest_pause=5, max_crashes=5, window=100)


def test_pauses_double_up_to_the_longest_and_then_it_is_given_up() -> None:
    restarts = Restarts(LIMITS, ManualClock())
    assert [restarts.crashed() for _ in range(5)] == [1, 2, 4, 5, None]


def test_crashes_of_long_ago_do_not_count() -> None:
    clock = ManualClock()
    restarts = Restarts(LIMITS, clock)
    for _ in range(20):
        assert restarts.crashed() == 1
        clock.advance(101)
    for pause in (1, 2, 4, 5):
        assert restarts.crashed() == pause
        clock.advance(10)
    clock.advance(70)  # the first of these has been forgotten, the others not
    assert restarts.crashed() == 5


def test_a_reserved_port_can_be_listened_on_again_and_again_and_by_nobody_else() -> None:
    port = ReservedPort("127.0.0.1", 0)
    try:
        for _ in range(2):
            with bind("127.0.0.1", port.number, shared=True):
                with socket.create_connection(("127.0.0.1", port.number)):
                    pass
                with pytest.raises(ClusterError, match=f"{port.number}: Address already in use"):
                    ReservedPort("127.0.0.1", port.number)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port.number))
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port.number))
    finally:
        port.close()


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:")]
)
def test_its_url_is_how_processes_here_reach_it(host: str, url: str) -> None:
    port = ReservedPort(host, 0)
    port.close()
    assert port.url == f"{url}{port.number}"
