"""Sockets between pools, used by the thread that polls them and by others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from memserve.clock import MonotonicClock
from memserve.transfer.mempool import MemPool
from memserve.transfer.peer_endpoint import PeerEndpoint
from memserve.transfer.service import Service
from memserve.transfer.sockets import Arrival, PoolSockets
from memserve.transfer.unix_socket import UnixAddress
from memserve.transfer.wire import HEADER_BYTES
from tests.transfer_harness import LAYOUT, LOCAL, PATIENCE

HEADER = b"h" * HEADER_BYTES


@pytest.fixture
def near() -> Iterator[PoolSockets]:
    links = PoolSockets(None)
    yield links
    links.close()


@pytest.fixture
def far() -> Iterator[PoolSockets]:
    links = PoolSockets(None)
    yield links
    links.close()


@pytest.fixture
def service() -> Iterator[Service]:
    with MemPool(LAYOUT, 4, instance="a") as pool:
        running = Service(pool, [], "auto", None, MonotonicClock())
        yield running
        running.close()


def elsewhere(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def heard(links: PoolSockets) -> list[Arrival]:
    """What arrives within a while; once there is something."""
    for _ in range(int(PATIENCE)):
        if arrivals := links.poll(1.0):
            return arrivals
    raise AssertionError("nothing has arrived")


def test_another_thread_sends_through_the_unix_socket_itself(
    near: PoolSockets, far: PoolSockets
) -> None:
    elsewhere(lambda: near.send(UnixAddress(far.unix_address), HEADER, b"said"))
    assert [each.frames for each in heard(far)] == [[HEADER, b"said"]]


def test_what_another_thread_says_over_the_network_is_sent_by_the_one_that_polls(
    near: PoolSockets, far: PoolSockets
) -> None:
    dealer = near.dial(far.listen(LOCAL))
    while not near.send(dealer, HEADER, b"connected"):
        near.poll(0.01)
    assert [each.frames for each in heard(far)] == [[HEADER, b"connected"]]
    elsewhere(lambda: near.send(dealer, HEADER, b"said"))
    assert far.poll(0.0) == []
    near.poll(PATIENCE)  # ends at once: it was woken
    assert [each.frames for each in heard(far)] == [[HEADER, b"said"]]


def test_a_task_runs_on_the_calling_thread_while_the_service_waits(service: Service) -> None:
    ran_on: list[int] = []

    def task(conversation: PeerEndpoint, now: float) -> None:
        ran_on.append(threading.get_ident())

    service.ask(lambda conversation, now: None)  # it has begun
    while threading.get_ident() not in ran_on:  # unless a heartbeat was just due
        service.run(task)
        service.ask(lambda conversation, now: None)


def test_tasks_keep_their_order_while_the_service_is_busy(service: Service) -> None:
    entered, go_on = threading.Event(), threading.Event()
    order: list[int] = []

    def occupy(conversation: PeerEndpoint, now: float) -> None:
        entered.set()
        assert go_on.wait(PATIENCE)

    service.submit(occupy)
    assert entered.wait(PATIENCE)
    for number in range(4):
        call = service.run if number % 2 else service.submit
        call(lambda conversation, now, number=number: order.append(number))  # type: ignore[misc]
    assert order == []
    go_on.set()
    service.ask(lambda conversation, now: None)
    assert order == [0, 1, 2, 3]
