"""Who a pool takes a message from for. Protects: nobody speaks in another's name, a name belongs to
the life that is heard of, and which life is later does not hang on anybody's clock."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import zmq

from memserve import MemPool
from memserve.clock import ManualClock
from memserve.errors import PeerRefused, TransferError
from memserve.pool.segment import pid_namespace
from memserve.transfer import peers as peers_module
from memserve.transfer import service as service_module
from memserve.transfer import table as table_module
from memserve.transfer import wire
from memserve.transfer.base import PoolRegions
from memserve.transfer.conversion import meaning
from memserve.transfer.host import ProcessTag, host_id, own_process
from memserve.transfer.messages import Prepare, Prepared, Refused
from memserve.transfer.peer_endpoint import PeerEndpoint
from memserve.transfer.secret import cluster_keys
from memserve.transfer.session import LEASE
from memserve.transfer.sockets import Arrival
from memserve.transfer.table import GONE
from memserve.types import (
    MAX_OWNERS,
    Epoch,
    InstanceId,
    Medium,
    Owner,
    intern_owner,
    owner_of,
    retire_owner,
)
from tests.transfer_harness import (
    LAYOUT,
    LOCAL,
    PATIENCE,
    eventually,
    filled,
    kv_blocks,
    quiet,
    tokens_of,
)

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

HEADER = wire.header(LAYOUT)
MEMORY = PoolRegions(LAYOUT, host_id(), ())
ELSEWHERE = ProcessTag("another kernel", 0, 1, 1)


def body(owner: Owner, pool: MemPool, message: wire.Message) -> bytes:
    return wire.encode(owner, pool.owner.epoch, message)


def hello(process: ProcessTag | None = None) -> wire.Hello:
    return wire.Hello(True, process or own_process(), MEMORY, ())


def owner(name: str, epoch: int) -> Owner:
    return Owner(InstanceId(name), Epoch(epoch))


@contextlib.contextmanager
def line(address: str) -> Iterator[zmq.Socket[bytes]]:
    """A connection to a pool."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        cluster_keys().secure_client(socket)
        socket.linger = 1000
        socket.rcvtimeo = int(PATIENCE * 1000)
        socket.connect(address)
        yield socket


def answer(socket: zmq.Socket[bytes]) -> wire.Message:
    while True:
        message = wire.decode(socket.recv_multipart(), meaning(LAYOUT)).message
        if not isinstance(message, wire.Beat):
            return message


def test_nobody_says_bye_for_another() -> None:
    with (
        MemPool(LAYOUT, 8, instance="b") as b,
        MemPool(LAYOUT, 8, instance="a") as a,
    ):
        address = b.serve(LOCAL)
        a.connect("b", address)
        refs = a.transfer("b", filled(a, 2)).result(PATIENCE)
        with line(address) as socket:
            socket.send_multipart([HEADER, body(a.owner, b, wire.Bye())])
            socket.send_multipart([HEADER, body(a.owner, b, Prepare(99, 2, Medium.HBM))])
            assert isinstance(answer(socket), wire.Hello)  # it does not know who this is
            assert isinstance(answer(socket), wire.Hello)
        assert b.stats().hbm.active == 2
        assert torch.equal(b.read(refs), kv_blocks(2))
        a.free_mem(refs)
        quiet(b)


def test_a_name_is_taken_while_its_life_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the epochs, and whoever asks; when it has gone silent another one may have it."""
    monkeypatch.setattr(service_module, "CONNECT_TIMEOUT", 0.3)
    clock = ManualClock()
    with (
        MemPool(LAYOUT, 8, instance="b", clock=clock) as b,
        MemPool(LAYOUT, 8, instance="a", epoch=5) as impostor,
    ):
        address = b.serve(LOCAL)
        with line(address) as socket:
            socket.send_multipart([HEADER, body(owner("a", 7), b, hello(ELSEWHERE))])
            assert isinstance(answer(socket), wire.Hello)
            for epoch in (6, 8, 2**63 - 1):
                with line(address) as other:
                    other.send_multipart([HEADER, body(owner("a", epoch), b, hello())])
                    refusal = answer(other)
                    assert isinstance(refusal, wire.NotWelcome)
                    assert "another life of 'a'" in refusal.reason.message
            with pytest.raises(PeerRefused, match="another life of 'a'"):
                impostor.connect("b", address)
            clock.advance(LEASE)
            impostor.connect("b", address)
            impostor.transfer_with_insert("b", tokens_of(2), filled(impostor, 2)).result(PATIENCE)
            # The former one is a stranger now, and is told who has its name.
            socket.send_multipart([HEADER, body(owner("a", 7), b, wire.Bye())])
            assert isinstance(answer(socket), wire.Hello)
            socket.send_multipart([HEADER, body(owner("a", 7), b, hello(ELSEWHERE))])
            assert isinstance(answer(socket), wire.NotWelcome)
        impostor.transfer_with_insert("b", tokens_of(3), filled(impostor, 3)).result(PATIENCE)


def test_a_life_whose_process_has_ended_is_replaced_at_once_by_an_earlier_epoch() -> None:
    """Its host's clock was ahead."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    tag = ProcessTag(host_id().boot, pid_namespace(), ended.pid, 1)
    with MemPool(LAYOUT, 8, instance="b") as b:
        address = b.serve(LOCAL)
        with line(address) as socket:
            socket.send_multipart([HEADER, body(owner("a", 2**62), b, hello(tag))])
            assert isinstance(answer(socket), wire.Hello)
            with MemPool(LAYOUT, 8, instance="a", epoch=1) as a:
                a.connect("b", address)
                a.transfer_with_insert("b", tokens_of(2), filled(a, 2)).result(PATIENCE)


def test_a_restart_behind_its_address_with_a_clock_that_is_behind() -> None:
    with MemPool(LAYOUT, 8, instance="a") as a:
        with MemPool(LAYOUT, 8, instance="b", epoch=100) as first:
            address = first.serve(LOCAL)
            a.connect("b", address)
        with MemPool(LAYOUT, 8, instance="b", epoch=1) as second:
            second.serve(address)
            eventually(lambda: _sent(a), "the new life")
            with second.match(tokens_of(2)) as match:
                assert torch.equal(second.read(match.refs), kv_blocks(2))


def _sent(pool: MemPool) -> bool:
    source = filled(pool, 2)
    try:
        pool.transfer_with_insert("b", tokens_of(2), source).result(PATIENCE)
    except TransferError:
        return False
    finally:
        pool.free_mem(source)
    return True


def test_lives_come_and_go_without_an_end() -> None:
    """20,000 of them leave nothing that grows."""
    with MemPool(LAYOUT, 8, instance="b") as b:
        b.serve(LOCAL)

        def live(endpoint: PeerEndpoint, now: float) -> None:
            for number in range(20_000):
                life, route = owner(f"p{number % 7000}", number + 1), number.to_bytes(5)
                said: list[wire.Message] = [wire.Hello(False, own_process(), MEMORY, ())]
                if not number % 20:
                    said += [Prepare(1, 1, Medium.HBM), wire.FreeBlocks(1, b"")]
                for message in said:
                    frames = [HEADER, body(life, b, message)]
                    endpoint.on_arrival(Arrival(frames, route), now)
                intern_owner(*life)
                endpoint.on_arrival(Arrival([HEADER, body(life, b, wire.Bye())], route), now)
            endpoint.counters.misdirected += 1

        b._require_service().submit(live)
        eventually(lambda: b._require_service().counters.misdirected > 0, "the last of them")
        gone, leases, peers, answers = _lives_of(b)
        assert gone <= GONE
        assert leases == peers == answers == 0
        assert b.stats().hbm.active == 0
        assert b.peer_stats().failed == 0


def _lives_of(pool: MemPool) -> tuple[int, int, int, int]:
    def look(endpoint: PeerEndpoint, now: float) -> tuple[int, int, int, int]:
        table = endpoint.table
        peers = len(list(endpoint.peers))
        return len(table._gone), len(table._leases), peers, len(endpoint.frees._answers)

    return pool._require_service().ask(look)


def test_numbers_of_lives_that_are_over_are_used_again() -> None:
    alive = owner("alive", 1)
    number = intern_owner(*alive)
    for epoch in range(1, 20_001):
        passing = owner("passing", epoch)
        assert owner_of(intern_owner(*passing)) == passing
        assert intern_owner(*passing) < MAX_OWNERS
        retire_owner(passing)
    assert intern_owner(*alive) == number
    assert owner_of(number) == alive
    # The last ones are still what they were.
    recent = intern_owner(*owner("passing", 20_000))
    assert owner_of(recent) == owner("passing", 20_000)
    retire_owner(alive)


def test_what_a_peer_can_have_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "MAX_PEERS", 2)
    monkeypatch.setattr(table_module, "MAX_OPEN", 3)
    with MemPool(LAYOUT, 8, instance="b") as b:
        address = b.serve(LOCAL)
        with line(address) as socket, line(address) as third:
            for name in ("one", "two"):
                socket.send_multipart([HEADER, body(owner(name, 1), b, hello())])
                assert isinstance(answer(socket), wire.Hello)
            third.send_multipart([HEADER, body(owner("three", 1), b, hello())])
            assert isinstance(answer(third), wire.NotWelcome)
            for number in range(4):
                prepare = Prepare(number, 1, Medium.HBM)
                socket.send_multipart([HEADER, body(owner("one", 1), b, prepare)])
            answers = [answer(socket) for _ in range(4)]
            assert [type(each) for each in answers] == [Prepared, Prepared, Prepared, Refused]
            # One that leaves makes room for another.
            for name in ("one", "two"):
                socket.send_multipart([HEADER, body(owner(name, 1), b, wire.Bye())])
            eventually(lambda: _lives_of(b)[2] == 0, "that they have left")
            third.send_multipart([HEADER, body(owner("three", 1), b, hello())])
            assert isinstance(answer(third), wire.Hello)
        assert b.stats().hbm.active == 0
        assert b.peer_stats().failed == 0
