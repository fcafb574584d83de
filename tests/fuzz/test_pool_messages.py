"""Messages of real conversations, mutated, to a pool that talks to others meanwhile. Protects: no
message ends its thread, nothing unexpected is raised, no block is lost, and what a peer transfers
behind all of it arrives whole.

MEMSERVE_FUZZ_EXAMPLES: how many mutants; the seed is fixed, so that a failure comes again."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import msgspec
import pytest
import torch
import zmq

from memserve import Medium, MemPool
from memserve.transfer import wire
from memserve.transfer.peer_endpoint import PeerEndpoint
from memserve.transfer.secret import cluster_keys
from memserve.transfer.sockets import Arrival, PoolSockets, Way
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

EXAMPLES = int(os.environ.get("MEMSERVE_FUZZ_EXAMPLES", "2000"))
LIFE = 50  # mutants that one life says
HEADER = wire.header(LAYOUT)

Value = object
NUMBERS = [0, 1, 2, 3, 5, -1, 2**24 - 1, 2**24, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1]
SCALARS: list[Value] = [
    *NUMBERS,
    -(2**63),
    None,
    True,
    0.5,
    float("nan"),
    "",
    "x" * 5000,
    "memserve-1-2-3-4\0",
    "memserve-../../etc/passwd",
    "/dev/shm/memserve-1-2-3-4",
    "/dev/shm/memserve-\udcff".encode(errors="surrogateescape"),
    b"",
    b"\0" * 8,
    b"\xff" * 24,
    b"\1" * 7,
    b"a" * 48,
    [],
    {},
    {"layers": 0},
    [[[[]]]],
]


@pytest.fixture(scope="module")
def recorded() -> list[list[Value]]:
    """What pools say to each other about all that there is, as plain values, each kind once or
    more: [instance, epoch, receiver, [tag, ...]]."""
    bodies: list[bytes] = []
    send = PoolSockets.send

    def record(links: PoolSockets, path: Way, header: bytes, body: bytes) -> bool:
        bodies.append(body)
        return send(links, path, header, body)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PoolSockets, "send", record)
        with MemPool(LAYOUT, 32, 8, instance="a") as a, MemPool(LAYOUT, 32, 8, instance="b") as b:
            a.connect("b", b.serve(LOCAL))
            a.transfer_with_insert("b", tokens_of(2), filled(a, 2)).result(PATIENCE)
            a.transfer_with_insert("b", tokens_of(2), filled(a, 2)).result(PATIENCE)
            a.transfer_with_insert("b", tokens_of(3), filled(a, 3), b.alloc_mem(3)).result(PATIENCE)
            a.free_mem(a.transfer("b", filled(a, 2), medium=Medium.DRAM).result(PATIENCE))
            a.open_transfer("b", filled(a, 2), tokens=tokens_of(2), namespace="x").cancel()
            with pytest.raises(Exception, match="blocks asked"):
                a.alloc_mem(100, instance="b")
            eventually(lambda: any(_tag(body) == 33 for body in bodies), "a heartbeat")
    kinds = {_tag(body): body for body in bodies}
    assert {1, 2, 3, 4, 5, 6, 7, 8, 32, 33, 34, 35, 36} <= kinds.keys()
    hand_made = [
        wire.encode(a.owner, b.owner.epoch, message)
        for message in (
            msgspec.convert([9, 1, 1, True], wire.SessionMessage),
            msgspec.convert([10, 1, 1], wire.SessionMessage),
            wire.NotWelcome(wire.Failure("PeerRefused", "no")),
        )
    ]
    return [msgspec.msgpack.decode(body) for body in (*bodies[:200], *kinds.values(), *hand_made)]


def _tag(body: bytes) -> int:
    tag: int = msgspec.msgpack.decode(body)[3][0]
    return tag


def mutated(rng: random.Random, value: Value, depth: int = 0) -> Value:
    """A copy of which something is another value, missing, twice, or of another type."""
    if rng.random() < 0.15 or not isinstance(value, list | dict) or not value:
        if isinstance(value, bytes | str) and value and rng.random() < 0.6:
            return _damaged(rng, value)
        if isinstance(value, int) and rng.random() < 0.5:
            return value + rng.choice((-1, 1, 7, 2**24, 2**26, 2**40))
        return rng.choice(SCALARS)
    if isinstance(value, dict):
        changed = dict(value)
        key = rng.choice(list(changed))
        changed[key] = mutated(rng, changed[key], depth + 1)
        if rng.random() < 0.1:
            del changed[key]
        return changed
    items = list(value)
    at = rng.randrange(len(items))
    match rng.randrange(10):
        case 0:
            del items[at]
        case 1:
            items.insert(at, items[at])
        case 2:
            items.append(rng.choice(SCALARS))
        case 3:
            items[at], items[-1] = items[-1], items[at]
        case _:
            items[at] = mutated(rng, items[at], depth + 1)
    return items


def _damaged(rng: random.Random, value: bytes | str) -> Value:
    if isinstance(value, str):
        return rng.choice((value[1:], value + "\0", value * 40, "/" + value, value.encode()))
    at = rng.randrange(len(value))
    return rng.choice(
        (value[:at], value + value, value[:at] + b"\xff" + value[at + 1 :], value[at:] + b"\0" * 8)
    )


def bodies(
    rng: random.Random, recorded: list[list[Value]], name: str, b: MemPool
) -> Iterator[bytes]:
    """Mutants that a life of this name says to `b`."""
    for _ in range(LIFE):
        instance, epoch, _, message = rng.choice(recorded)
        assert isinstance(message, list)
        if message[0] == 32 or rng.random() < 0.9:
            instance, epoch = name, 1  # in another's name it only gets to say what is no Hello
        if message[0] == 34 and rng.random() < 0.9:
            continue  # nothing is heard of a life after its Bye
        envelope = [instance, epoch, b.owner.epoch, message]
        dice = rng.random()
        if dice < 0.75:
            envelope[3] = mutated(rng, message)
        elif dice < 0.85:
            envelope = mutated(rng, envelope)  # type: ignore[assignment]
        try:
            body = msgspec.msgpack.encode(envelope)
        except (OverflowError, ValueError, UnicodeEncodeError):
            continue
        if dice > 0.85:
            damaged = bytearray(body)
            for _ in range(rng.randrange(1, 4)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            body = bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))])
        yield body if rng.random() > 0.01 else b"\x91" * 100_000


def hello_of(name: str, recorded: list[list[Value]], b: MemPool) -> bytes:
    hello = next(each[3] for each in recorded if isinstance(each[3], list) and each[3][0] == 32)
    return msgspec.msgpack.encode([name, 1, b.owner.epoch, hello])


@pytest.mark.parametrize("seed", range(2))
def test_mutants_of_valid_messages(recorded: list[list[Value]], seed: int) -> None:
    rng = random.Random(seed)
    with (
        MemPool(LAYOUT, 32, 8, instance="b") as b,
        MemPool(LAYOUT, 32, instance="a") as a,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as socket,
    ):
        address = b.serve(LOCAL)
        a.connect("b", address)
        socket.linger = 1000
        socket.sndtimeo = int(PATIENCE * 1000)
        cluster_keys().secure_client(socket)
        socket.connect(address)
        service = b._require_service()
        for number in range(max(1, EXAMPLES // 2 // LIFE)):
            name = f"mad{number}"
            bye = wire.encode(
                wire.Envelope(name, 1, 0, wire.Bye()).sender, b.owner.epoch, wire.Bye()
            )
            said = [hello_of(name, recorded, b), *bodies(rng, recorded, name, b), bye]
            if number % 2:
                for body in said:
                    socket.send_multipart([HEADER, body])
            else:
                route = rng.randbytes(5)

                def deliver(
                    endpoint: PeerEndpoint, now: float, said: list[bytes], route: bytes
                ) -> None:
                    for body in said:
                        endpoint.on_arrival(Arrival([HEADER, body], route), now)

                service.ask(
                    lambda endpoint, now, said=said, route=route: deliver(  # type: ignore[misc]
                        endpoint, now, said, route
                    )
                )
            if number % 20 == 0:
                source = filled(a, 3, number)
                tokens = [token + number for token in tokens_of(3)]
                refs = a.transfer_with_insert("b", tokens, source).result(PATIENCE)
                with b.match(tokens) as match:
                    assert torch.equal(b.read(match.refs), kv_blocks(3, number))
                assert len(refs) == 3
                a.free_mem(source)
                while _unread(socket):
                    pass
        stats = b.peer_stats()

        def bury(endpoint: PeerEndpoint, now: float) -> None:
            """All lives but one are over, also those whose names are mutants."""
            lives = {peer for peer, _ in endpoint.table._destinations}
            for owner in (lives | endpoint.peers.known()) - {a.owner}:
                endpoint.on_over(owner, now)

        service.ask(bury)
        assert stats.failed == 0, "something unexpected was raised; it is in the log"
        assert stats.malformed > EXAMPLES // 40
        eventually(lambda: b.stats().hbm.active + b.stats().dram.active == 0, "what they held")
        quiet(b)
        quiet(a)


def _unread(socket: zmq.Socket[bytes]) -> list[bytes]:
    """One of the answers, which nobody wants."""
    try:
        return socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return []
