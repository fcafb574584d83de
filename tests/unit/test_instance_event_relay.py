"""vLLM's KV events, passed on: as they are, in order, and with what was missed said to be so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq
from msgspec import msgpack

from memserve.api.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    KVSnapshot,
    decode_frames,
    topic_of,
)
from memserve.errors import ConfigError, TransferError
from memserve.instance.event_relay import EventRelay
from memserve.instance.server_cache import stored_event
from memserve.types import Epoch, InstanceId
from tests.fakes import until

OWNER = InstanceId("v0"), Epoch(7)


class Vllm:
    """Its publisher."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._socket = context.socket(zmq.XPUB)  # says who subscribes
        self._socket.bind(endpoint)

    def until_heard(self) -> None:
        self._socket.recv()

    def say(self, sequence: int, payload: bytes) -> None:
        self._socket.send_multipart((b"kv-events", sequence.to_bytes(8, "big"), payload))

    def close(self) -> None:
        self._socket.close(linger=0)


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context[zmq.Socket[bytes]]() as context:
        yield context


@contextmanager
def relayed(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> Iterator[tuple[Vllm, EventRelay, zmq.Socket[bytes]]]:
    """A vLLM, a relay that hears it, and a subscriber that hears the relay."""
    source = f"ipc://{tmp_path}/e"
    vllm = Vllm(context, source)
    relay = EventRelay(source, *OWNER, 16, "127.0.0.1", None)
    heard = context.socket(zmq.SUB)
    heard.rcvtimeo = 30_000
    try:
        heard.subscribe(topic_of(*OWNER).encode())
        heard.connect(relay.info.endpoint)
        vllm.until_heard()
        decode_frames(heard.recv_multipart())  # an idle relay's beat: it is connected
        yield vllm, relay, heard
    finally:
        heard.close(linger=0)
        relay.close()
        vllm.close()


def removed(name: int) -> bytes:
    return msgpack.encode(EventBatch(1.0, [BlockRemoved([name], "GPU")], 0))


def test_what_comes_is_passed_on_and_what_was_missed_is_said(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    with relayed(context, tmp_path) as (vllm, relay, heard):
        vllm.say(0, removed(10))
        vllm.say(1, removed(11))
        vllm.say(3, removed(13))
        vllm.say(4, b"no batch")
        vllm.say(5, removed(15))
        said: list[str | int] = []

        def take() -> bool:
            batch = decode_frames(heard.recv_multipart())
            numbers.append(batch.sequence)
            for event in batch.events.events:
                if isinstance(event, AllBlocksCleared):
                    said.append("cleared")
                elif isinstance(event, BlockRemoved):
                    said.extend(event.block_hashes)  # type: ignore[arg-type]
            return said[-1:] == [15]

        numbers: list[int] = []
        until(take)
        assert said == [10, 11, "cleared", 13, "cleared", 15]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert not relay.thread.is_alive()
    with pytest.raises(TransferError, match="KV events has ended"):
        relay.snapshot()


def stored(name: int, medium: str, parent: int | None = None) -> BlockStored:
    return BlockStored([name], parent, [name] * 16, 16, None, medium, None)


def copies(events: Sequence[BlockStored]) -> set[tuple[str | None, int | bytes]]:
    return {(event.medium, name) for event in events for name in event.block_hashes}


def test_who_comes_later_gets_a_snapshot(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    own, behind = [stored(1, "GPU"), stored(2, "GPU", 1)], [stored(1, "CPU")]
    with relayed(context, tmp_path) as (vllm, relay, heard):
        batches = [[*own, *behind], [AllBlocksCleared()], [BlockRemoved([1], "CPU")]]
        expected = [[*own, *behind], behind, []]
        for number, (events, held) in enumerate(zip(batches, expected, strict=True)):
            vllm.say(number, msgpack.encode(EventBatch(1.0, [*events], 0)))
            while not (batch := decode_frames(heard.recv_multipart())).events.events:
                pass
            if events == [AllBlocksCleared()]:  # and what was not cleared with it
                batch = decode_frames(heard.recv_multipart())
                assert batch.events.events == behind
            snapshot = msgpack.decode(relay.snapshot(), type=KVSnapshot)
            assert snapshot.sequence >= batch.sequence
            assert (snapshot.instance, snapshot.epoch, snapshot.block_tokens) == (*OWNER, 16)
            events = [stored_event(run, 16) for run in snapshot.server_blocks]
            assert copies(events) == copies(held)
        assert relay.info.server_snapshot
        assert not relay.info.snapshot  # who knows of no other asks for none
        vllm.say(7, removed(10))  # what was missed may have removed anything
        until(lambda: decode_frames(heard.recv_multipart()).events.events == [AllBlocksCleared()])
        assert msgpack.decode(relay.snapshot(), type=KVSnapshot).server_blocks == []


def test_what_is_no_endpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="KV events of vLLM at nowhere"):
        EventRelay("nowhere", *OWNER, 16, "127.0.0.1", None)
