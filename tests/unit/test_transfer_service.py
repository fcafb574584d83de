"""Who may talk to a pool, and what becomes of what nobody should have said."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve import KVLayout, Medium, MemPool
from memserve.errors import (
    ConfigError,
    LayoutMismatch,
    PeerLost,
    PeerRefused,
    TransferError,
)
from memserve.secrets import SECRET_VARIABLE
from memserve.transfer import service, wire
from memserve.transfer.base import PoolRegions
from memserve.transfer.conversion import meaning
from memserve.transfer.destination_session import DestinationSession
from memserve.transfer.host import host_id, own_process
from memserve.transfer.receiver import Receiver
from memserve.transfer.secret import cluster_keys
from memserve.types import Epoch, InstanceId, Owner
from tests.transfer_harness import (
    LAYOUT,
    LOCAL,
    PATIENCE,
    eventually,
    filled,
    quiet,
    tokens_of,
)

# The thread of a pool must survive everything here.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

HEADER = wire.header(LAYOUT)


@contextlib.contextmanager
def stranger(address: str) -> Iterator[zmq.Socket[bytes]]:
    """A socket on a pool's port."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        cluster_keys().secure_client(socket)
        socket.linger = 1000
        socket.rcvtimeo = int(PATIENCE * 1000)
        socket.connect(address)
        yield socket


def test_another_layout_is_refused_with_both_fingerprints() -> None:
    other = dataclasses.replace(LAYOUT, layers=2)
    with MemPool(LAYOUT, 4, instance="b") as b, MemPool(other, 4, instance="a") as a:
        address = b.serve(LOCAL)
        with pytest.raises(LayoutMismatch) as error:
            a.connect("b", address)
        assert LAYOUT.fingerprint in str(error.value)
        assert other.fingerprint in str(error.value)
        assert b.peer_stats().mismatched > 0


def test_another_protocol_version_is_told_so_before_anything_is_decoded() -> None:
    with MemPool(LAYOUT, 4, instance="b") as b, stranger(b.serve(LOCAL)) as socket:
        later = bytearray(HEADER)
        later[5] = 99
        socket.send_multipart([bytes(later), b"\xc1 no msgpack"])
        answer = socket.recv_multipart()
        with pytest.raises(wire.Mismatch) as mismatch:
            wire.decode(answer, meaning(LAYOUT))
        assert mismatch.value.kind is wire.Kind.REFUSAL
        assert mismatch.value.version == wire.PROTOCOL_VERSION
        assert b.peer_stats().malformed == 0


def test_a_secret_is_needed_to_talk_and_the_same_one() -> None:
    with (
        MemPool(LAYOUT, 4, instance="b", secret="one") as b,
        MemPool(LAYOUT, 4, instance="friend", secret="one") as friend,
        MemPool(LAYOUT, 4, instance="liar", secret="two") as liar,
        MemPool(LAYOUT, 4, instance="open") as without,
    ):
        address = b.serve(LOCAL)
        for other in (liar, without):
            with pytest.raises(PeerRefused, match="secret"):
                other.connect("b", address)
        with stranger(address) as socket:
            socket.rcvtimeo = 300
            socket.send_multipart([HEADER, b""])
            with pytest.raises(zmq.Again):
                socket.recv_multipart()
        assert b.peer_stats().malformed == 0  # none of it came through
        friend.connect("b", address)
        friend.transfer_with_insert("b", tokens_of(2), filled(friend, 2)).result(PATIENCE)
        quiet(b)


def test_without_a_secret_only_this_host_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    here = MemPool(LAYOUT, 4, instance="a", path="shm")
    with here, pytest.raises(ConfigError, match=SECRET_VARIABLE):
        here.serve("tcp://0.0.0.0:0")
    monkeypatch.setenv(SECRET_VARIABLE, "the cluster's")
    with MemPool(LAYOUT, 4, instance="a", path="shm") as a:
        assert a.serve("tcp://0.0.0.0:0").startswith("tcp://0.0.0.0:")


def test_nobody_there_or_somebody_else() -> None:
    with MemPool(LAYOUT, 4, instance="a") as a, MemPool(LAYOUT, 4, instance="b") as b:
        address = b.serve(LOCAL)
        with pytest.raises(PeerRefused, match="'b', not 'c'"):
            a.connect("c", address)
        with pytest.raises(TransferError):
            b.serve(address)
        with pytest.raises(TransferError):
            a.connect("b", "nonsense")
    with MemPool(LAYOUT, 4, instance="a") as a, pytest.raises(PeerLost, match="no pool"):
        a.connect("b", address)


ids = st.integers(-(2**63), 2**64 - 1)
values = st.recursive(
    st.none() | st.booleans() | ids | st.binary(max_size=20) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=12,
)
frames = st.lists(st.binary(max_size=60), max_size=4)
# Not Bye (34): nothing is heard of a life after that.
tags = st.sampled_from([*range(1, 11), 32, 33, 35, 36])
numbers = st.integers(0, 5)
nonsense = st.tuples(tags, numbers, values, values).map(list)
words = st.none() | st.binary(max_size=64)
prepares = st.tuples(
    st.just(1), numbers, st.integers(-1, 2**25), st.sampled_from([0, 1, 7]), st.text(), words, words
).map(list)


def test_noise_is_counted_and_does_not_stop_a_pool() -> None:
    """Random frames, and messages of a peer that has lost its mind."""
    mad = Owner(InstanceId("mad"), Epoch(1))
    hello = wire.Hello(False, own_process(), PoolRegions(LAYOUT, host_id(), ()), ())
    with MemPool(LAYOUT, 32, instance="b") as b, MemPool(LAYOUT, 32, instance="a") as a:
        address = b.serve(LOCAL)
        a.connect("b", address)
        with stranger(address) as socket:
            socket.send_multipart([HEADER, wire.encode(mad, Epoch(0), hello)])

            @settings(max_examples=400, deadline=None)
            @given(frames | nonsense | prepares)
            def shout(noise: list[object]) -> None:
                if noise and not all(isinstance(each, bytes) for each in noise):
                    body = [mad.instance, mad.epoch, b.owner.epoch, noise]
                    socket.send_multipart([HEADER, msgspec.msgpack.encode(body)])
                else:
                    socket.send_multipart(noise or [b""])

            shout()
            eventually(lambda: b.peer_stats().malformed > 20, "the noise")
            source = filled(a, 3)
            a.transfer_with_insert("b", tokens_of(3), source, medium=Medium.HBM).result(PATIENCE)
            socket.send_multipart([HEADER, wire.encode(mad, b.owner.epoch, wire.Bye())])
            eventually(lambda: b.stats().hbm.active == 0, "what the mad one held")
        quiet(b)


@given(st.lists(st.binary(max_size=80), max_size=4), st.binary(max_size=200))
def test_decoding_raises_nothing_but_what_it_says(noise: list[bytes], body: bytes) -> None:
    for attempt in (noise, [HEADER, body]):
        with contextlib.suppress(wire.Malformed, wire.Mismatch):
            wire.decode(attempt, meaning(LAYOUT))


def test_a_message_without_end_is_not_read() -> None:
    with MemPool(LAYOUT, 4, instance="b") as b, stranger(b.serve(LOCAL)) as socket:
        socket.send_multipart([HEADER, bytes(wire.MAX_MESSAGE_BYTES + 1)])
        socket.send_multipart([HEADER, b"short"])
        eventually(lambda: b.peer_stats().malformed == 1, "the short one, on a new connection")


def test_closing_a_pool_ends_the_wait_for_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("CONNECT_TIMEOUT", "CALL_TIMEOUT"):
        monkeypatch.setattr(service, limit, 10 * PATIENCE)
    with ThreadPoolExecutor(1) as thread, socket.create_server(("127.0.0.1", 0)) as silent:
        pool = MemPool(LAYOUT, 4, instance="a")
        pool.serve(LOCAL)
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        connecting = thread.submit(pool.connect, "b", address)
        silent.accept()[0].close()
        pool.close()
        with pytest.raises(PeerLost):
            connecting.result(PATIENCE)


def test_whoever_owns_a_pool_hears_of_the_end_of_its_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[BaseException] = []
    with MemPool(LAYOUT, 4, instance="b") as b, MemPool(LAYOUT, 4, instance="a") as a:
        a.connect("b", b.serve(LOCAL))
        a.on_failure(heard.append)
        transfer = a.open_transfer("b", filled(a, 2))

        def broken(*_: object) -> None:
            raise RuntimeError("a mistake")

        monkeypatch.setattr(a._require_service()._sockets, "poll", broken)
        a._require_service()._sockets.wake()  # also where it is too late
        eventually(lambda: bool(heard), "the end of the thread")
        assert "a mistake" in str(heard[0])
        assert "a mistake" in caplog.text
        a.on_failure(heard.append)  # too late is at once
        assert len(heard) == 2
        with pytest.raises(TransferError):
            transfer.result(PATIENCE)
        with pytest.raises(TransferError):
            a.transfer("b", filled(a, 1))
    with MemPool(LAYOUT, 4, instance="c") as c:
        c.on_failure(heard.append)
        c.serve(LOCAL)
    assert len(heard) == 2  # it was told to end


def test_a_mistake_with_one_peer_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = Receiver.allocate

    def mistaken(
        receiver: Receiver, peer: Owner, session: DestinationSession, source: KVLayout
    ) -> tuple[int, bytes]:
        result = allocate(receiver, peer, session, source)
        if peer.instance == "unlucky" and not mistakes:
            mistakes.append(peer)
            raise KeyError("nobody expects this")
        return result

    mistakes: list[Owner] = []
    monkeypatch.setattr(Receiver, "allocate", mistaken)
    with (
        MemPool(LAYOUT, 32, instance="b") as b,
        MemPool(LAYOUT, 32, instance="a") as a,
        MemPool(LAYOUT, 32, instance="unlucky") as unlucky,
    ):
        address = b.serve(LOCAL)
        for pool in (a, unlucky):
            pool.connect("b", address)
        # Its Prepare is said again, once it has introduced itself anew.
        later = unlucky.transfer_with_insert("b", tokens_of(3), filled(unlucky, 3))
        a.transfer_with_insert("b", tokens_of(2), filled(a, 2)).result(PATIENCE)
        later.result(PATIENCE)
        assert mistakes == [unlucky.owner]
        assert b.peer_stats().failed == 1
        quiet(b)
        assert b.stats().hbm.active == 0


@pytest.mark.parametrize(
    "address",
    [
        "inproc://zeromq.zap.01",
        "ipc:///tmp/memserve-test",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:99999",
        "tcp://a b:1",
        "tcp://127.0.0.1:1;127.0.0.1:2",
        "tcp://127.0.0.1:1\0",
        "udp://127.0.0.1:1",
        "",
    ],
)
def test_only_tcp_is_dialled_and_served(address: str) -> None:
    with MemPool(LAYOUT, 4, instance="a", secret="known") as a:
        a.serve(LOCAL)
        with pytest.raises(TransferError, match="not tcp://host:port"):
            a.connect("b", address)
        with (
            MemPool(LAYOUT, 4, instance="b", secret="known") as b,
            pytest.raises(TransferError, match="not tcp://host:port"),
        ):
            b.serve(address)


def test_the_gate_answers_what_is_no_question() -> None:
    keys = cluster_keys("known")
    with zmq.Context() as context:
        gate = keys.open_gate(context)
        with context.socket(zmq.DEALER) as socket:
            socket.connect("inproc://zeromq.zap.01")
            for frames in (
                [b""],
                [b"", b"1.0"],
                [b"", b"1.0", b"1", b"memserve", b"", b"", b"CURVE", b"short"],
                [b"", b"1.0", b"1", b"memserve", b"", b"", b"CURVE", *[b"x" * 32] * 5],
                [b"", b"9", *[b""] * 20],
            ):
                socket.send_multipart(frames)
                assert not keys.answer(gate)
        gate.close(0)


def test_a_message_of_many_frames_is_dropped_as_it_comes() -> None:
    with MemPool(LAYOUT, 4, instance="b") as b, stranger(b.serve(LOCAL)) as socket:
        socket.send_multipart([HEADER] * 5000)
        eventually(lambda: b.peer_stats().malformed == 1, "it")
        socket.send_multipart([HEADER, b"short"])
        eventually(lambda: b.peer_stats().malformed == 2, "the next")
