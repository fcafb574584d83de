"""KV events from real pools through real sockets into prompt trees."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.asyncio

from memserve.api.kv_events import (
    END_OF_REPLAY,
    BlockRemoved,
    BlockStored,
    EventBatch,
    KVEvent,
    decode_batch,
)
from memserve.api.status import InstanceState
from memserve.cluster import kv_subscription
from memserve.cluster.kv_subscription import EventSource
from memserve.cluster.membership import Change, MemberChange
from memserve.errors import OutOfBlocks
from memserve.models.tokenizer import Tokenizer
from memserve.types import InstanceId, Role
from tests.fakes import tiny_tokenizer
from tests.kv_events_harness import Following, Publishing, following, publishing
from tests.pool_harness import BLOCK, prompt
from tests.waiting import until


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return tiny_tokenizer(directory)


async def test_inserts_swaps_evictions_and_deletions_arrive(tokenizer: Tokenizer) -> None:
    async with publishing(tokenizer, hbm_blocks=8, dram_blocks=4) as one, following() as gateway:
        gateway.follow(one)
        await gateway.until_equal(one)
        one.store(*prompt(1, 2, 3))
        one.store(*prompt(1, 2, 4), namespace="salt:x")
        await gateway.until_equal(one)
        assert gateway.matches(prompt(1, 2, 3, 9)) == {"p0": 3 * BLOCK}
        assert gateway.matches(prompt(1, 2, 3), "salt:x") == {"p0": 2 * BLOCK}
        assert gateway.matches(prompt(1, 2, 3), "salt:y") == {}
        one.pool.swap_out(3)
        with one.pool.match(prompt(1, 2, 3), in_hbm=True):
            pass
        for number in range(10, 22):  # more than there is room for
            one.store(*prompt(1, number))
        one.pool.delete(prompt(1, 2))
        await gateway.until_equal(one)
        assert gateway.of(one).counts.unplaced == 0


async def test_threads_that_change_the_pool_while_gateways_come_and_go(
    tokenizer: Tokenizer,
) -> None:
    def work(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(120):
            tokens = prompt(*(choose.randrange(3) for _ in range(choose.randint(1, 6))))
            with contextlib.suppress(OutOfBlocks):
                one.store(*tokens, namespace=choose.choice(["", "salt:x"]))
            with one.pool.match(tokens, in_hbm=choose.random() < 0.5):
                one.pool.swap_out(choose.randint(0, 4))
            if choose.random() < 0.1:
                one.pool.delete(tokens[: choose.randint(0, len(tokens))])

    async with publishing(tokenizer, hbm_blocks=48, dram_blocks=16) as one, following() as first:
        first.follow(one)
        working = asyncio.gather(*(asyncio.to_thread(work, seed) for seed in range(3)))
        while not working.done():  # each begins with a snapshot in the middle of it
            async with following() as other:
                other.follow(one)
                await until(lambda: other.feed.synchronised(one.id), "a snapshot")
        await working
        async with following() as last:
            last.follow(one)
            await first.until_equal(one)
            await last.until_equal(one)
        assert first.of(one).counts.unplaced == 0
        one.pool.check_integrity()


async def test_private_namespaces_stay_private(tokenizer: Tokenizer) -> None:
    async with publishing(tokenizer) as one, following() as gateway:
        one.store(*prompt(1), namespace="sequence:a")
        gateway.follow(one)
        one.store(*prompt(2), namespace="sequence:b")
        one.store(*prompt(3))
        await until(lambda: bool(gateway.matches(prompt(3))), "the shared prompt")
        assert gateway.tree.held_blocks(one.id) == 1
        assert gateway.matches(prompt(2), "sequence:b") == {}
        one.pool.delete([], "sequence:a")
        one.pool.delete([], "sequence:b")


async def test_a_late_joiner_begins_with_a_snapshot(tokenizer: Tokenizer) -> None:
    async with publishing(tokenizer) as one:
        for number in range(6):
            one.store(*prompt(0, number % 3, number))
        async with following() as first, following() as second:
            first.follow(one)
            second.follow(one)
            one.store(*prompt(7, 8))  # meanwhile
            await first.until_equal(one)
            await second.until_equal(one)
            assert first.of(one).counts.snapshots >= 1


async def test_a_gap_is_closed_by_replay(tokenizer: Tokenizer) -> None:
    async with publishing(tokenizer) as one, following() as gateway:
        gateway.follow(one)
        await gateway.until_equal(one)
        await _lose(one, 3)
        one.store(*prompt(1, 9))
        await gateway.until_equal(one)
        counts = gateway.of(one).counts
        assert (counts.snapshots, counts.gaps) == (1, 1)
        assert counts.replays >= 1


async def test_a_gap_beyond_the_replay_is_closed_by_a_snapshot(tokenizer: Tokenizer) -> None:
    async with publishing(tokenizer, buffer_batches=1) as one, following() as gateway:
        gateway.follow(one)
        await gateway.until_equal(one)
        await _lose(one, 3)
        one.store(*prompt(1, 9))
        await gateway.until_equal(one)
        assert gateway.of(one).counts.snapshots >= 2


async def test_what_the_queue_had_no_room_for_is_noticed(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memserve.instance.kv_events.MAX_PENDING", 2)
    async with publishing(tokenizer) as one, following() as gateway:
        gateway.follow(one)
        await gateway.until_equal(one)
        for number in range(8):
            one.store(*prompt(number))
        await gateway.until_equal(one)
        assert gateway.of(one).counts.gaps >= 1


async def test_a_restart_begins_empty_and_the_former_life_is_cut_out(tokenizer: Tokenizer) -> None:
    async with following() as gateway, publishing(tokenizer) as one:
        one.store(*prompt(1, 2))
        gateway.follow(one)
        await gateway.until_equal(one)
        async with publishing(tokenizer) as again:
            assert again.id == one.id
            again.store(*prompt(3))
            gateway.follow(again)
            assert gateway.matches(prompt(1, 2)) == {}
            one.store(*prompt(5))  # its last words
            await gateway.until_equal(again)
            assert gateway.matches(prompt(5)) == {}
            gateway.feed.forget(again.id)
            assert gateway.matches(prompt(3)) == {}


async def test_a_gateway_that_was_killed_learns_everything_again(tokenizer: Tokenizer) -> None:
    async with publishing(tokenizer) as p, publishing(tokenizer, "d0", Role.DECODE) as d:
        async with following() as gateway:
            gateway.follow(p, d)
            p.store(*prompt(1, 2))
            await gateway.until_equal(p, d)
        d.store(*prompt(1, 2, 3))
        async with following() as gateway:
            gateway.follow(p, d)
            await gateway.until_equal(p, d)
            assert gateway.matches(prompt(1, 2, 3)) == {"p0": 2 * BLOCK, "d0": 3 * BLOCK}


async def test_the_membership_decides_who_is_followed(tokenizer: Tokenizer) -> None:
    async with publishing(tokenizer) as one, following() as gateway:

        def tell(change: Change, role: Role, epoch: int = one.epoch) -> None:
            ready = InstanceState.READY
            gateway.feed.observe(MemberChange(change, one.id, epoch, one.url, role, ready))

        one.store(*prompt(1))
        tell(Change.JOINED, Role.COLOCATED)
        await gateway.until_equal(one)
        tell(Change.ROLE, Role.DECODE)
        tokens = one.snapshot().blocks[0].token_array
        assert gateway.tree.match("", tokens, Role.COLOCATED) == {}
        assert gateway.tree.match("", tokens, Role.DECODE) == {one.id: BLOCK}
        tell(Change.DIED, Role.DECODE, one.epoch - 1)  # a former life
        assert gateway.matches(prompt(1))
        tell(Change.DIED, Role.DECODE)
        assert gateway.matches(prompt(1)) == {}
        assert gateway.feed.members() == []


async def test_the_wire_is_vllms(tokenizer: Tokenizer) -> None:
    """Frames, events and replay, as a subscriber of vLLM's expects them."""
    async with publishing(tokenizer) as one:
        context = zmq.asyncio.Context()
        with context.socket(zmq.DEALER) as socket:
            one.store(*prompt(1, 2), namespace="salt:x")
            one.pool.swap_out(1)
            one.snapshot()  # by then it has been sent
            socket.connect(one.events.info.replay_endpoint)
            await socket.send_multipart((b"", bytes(8)))
            events = []
            while True:
                async with asyncio.timeout(10):
                    _, topic, sequence, payload = await socket.recv_multipart()
                if sequence == END_OF_REPLAY:
                    break
                assert topic.decode() == one.events.info.topic
                events += decode_batch(payload).events
        context.destroy(linger=0)
        stored, moved, removed = events
        assert isinstance(stored, BlockStored)
        assert stored.token_ids == prompt(1, 2)
        assert stored.parent_block_hash is None
        assert stored.extra_keys == [("x",), None]
        assert (stored.block_size, stored.medium) == (BLOCK, "GPU")
        assert isinstance(moved, BlockStored)
        assert (moved.medium, moved.token_ids) == ("CPU", prompt(2))
        assert moved.parent_block_hash == stored.block_hashes[0]
        assert removed == BlockRemoved(stored.block_hashes[1:], "GPU")


async def test_only_who_knows_the_secret_hears_events(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMSERVE_SECRET", "of the cluster")
    async with publishing(tokenizer, secret="of the cluster") as one, following() as gateway:
        gateway.follow(one)
        await gateway.until_equal(one)
        one.store(*prompt(1, 2))
        await gateway.until_equal(one)
        await until(lambda: gateway.of(one).counts.events > 0, "events beside the snapshot")


# --- publishers that are not ours ---------------------------------------------------------


class VLLM:
    """Publishes as a vLLM with `--kv-events-config` does; can lose batches and begin anew."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self._publisher = context.socket(zmq.PUB)
        self._replay = context.socket(zmq.ROUTER)
        self.endpoint = self._bind(self._publisher)
        self.replay_endpoint = self._bind(self._replay)
        self._answering = asyncio.create_task(self._answer())
        self._sent: list[bytes] = []
        self._time = 0.0

    def source(self, replay: bool = True) -> EventSource:
        end = self.replay_endpoint if replay else None
        return EventSource(V, self.endpoint, BLOCK, "kv-events", end)

    def restart(self) -> None:
        self._sent = []

    async def say(self, *events: KVEvent, lost: bool = False) -> None:
        self._time += 1.0
        payload = msgspec.msgpack.encode(EventBatch(self._time, [*events], 0))
        number = len(self._sent).to_bytes(8, "big")
        self._sent.append(payload)
        if not lost:
            await self._publisher.send_multipart((b"kv-events", number, payload))

    async def close(self) -> None:
        self._answering.cancel()
        await asyncio.wait((self._answering,))
        self._publisher.close(0)
        self._replay.close(0)

    async def _answer(self) -> None:
        while True:
            client, _, first = await self._replay.recv_multipart()
            for number, payload in enumerate(self._sent):
                if number >= int.from_bytes(first, "big"):
                    frames = (client, b"", b"kv-events", number.to_bytes(8, "big"), payload)
                    await self._replay.send_multipart(frames)
            await self._replay.send_multipart((client, b"", b"", END_OF_REPLAY, b""))

    def _bind(self, socket: zmq.asyncio.Socket) -> str:
        socket.bind("tcp://127.0.0.1:0")
        return socket.getsockopt_string(zmq.LAST_ENDPOINT)


V = InstanceId("vllm")


@asynccontextmanager
async def vllm() -> AsyncIterator[VLLM]:
    context = zmq.asyncio.Context()
    engine = VLLM(context)
    try:
        yield engine
    finally:
        await engine.close()
        context.destroy(linger=0)


def stored(*numbers: int, parent: int | None = None) -> BlockStored:
    return BlockStored([*numbers], parent, prompt(*numbers), BLOCK, None, "GPU", None)


async def heard(gateway: Following, engine: VLLM) -> None:
    """Until what the engine says arrives: subscribing takes a moment."""
    before = gateway.feed.members()[0].counts
    seen = before.batches + before.duplicates
    while before.batches + before.duplicates == seen:
        await engine.say()
        await asyncio.sleep(0.01)


async def test_a_vllm_is_followed_from_its_first_event_on(tokenizer: Tokenizer) -> None:
    async with vllm() as engine, following() as gateway:
        await engine.say(stored(1, 2))  # before anybody listens
        gateway.feed.follow_source(engine.source())
        await until(lambda: gateway.matches(prompt(1, 2)) == {V: 2 * BLOCK}, "the replay")
        await heard(gateway, engine)
        await engine.say(stored(3, parent=2), lost=True)
        await engine.say(BlockRemoved([1], "GPU"), stored(7))
        await until(lambda: gateway.matches(prompt(7)) == {V: BLOCK}, "what comes after the gap")
        assert gateway.matches(prompt(1, 2, 3)) == {}
        await engine.say(stored(1))
        await until(lambda: gateway.matches(prompt(1, 2, 3)) == {V: 3 * BLOCK}, "all of it")


async def test_a_vllm_that_restarts_begins_empty(tokenizer: Tokenizer) -> None:
    async with vllm() as engine, following() as gateway:
        gateway.feed.follow_source(engine.source())
        await heard(gateway, engine)
        await engine.say(stored(1, 2))
        await until(lambda: bool(gateway.matches(prompt(1))), "the first life")
        engine.restart()
        await engine.say(stored(5))
        await until(lambda: gateway.matches(prompt(5)) == {V: BLOCK}, "the second life")
        assert gateway.matches(prompt(1)) == {}


async def test_a_vllm_without_replay_is_learned_again_after_a_gap(tokenizer: Tokenizer) -> None:
    async with vllm() as engine, following() as gateway:
        await engine.say(stored(9))
        gateway.feed.follow_source(engine.source(replay=False))
        await heard(gateway, engine)
        await engine.say(stored(1, 2))
        await until(lambda: bool(gateway.matches(prompt(1))), "what it said")
        await engine.say(BlockRemoved([1], "GPU"), lost=True)
        await engine.say(stored(5))
        await until(lambda: gateway.matches(prompt(5)) == {V: BLOCK}, "what comes after the gap")
        assert gateway.matches(prompt(1)) == {}
        gateway.feed.forget(V)
        assert gateway.matches(prompt(5)) == {}


async def test_a_server_whose_snapshot_cannot_be_had_is_followed_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kv_subscription, "MOST_FAILURES", 2)
    async with vllm() as engine, following() as gateway:
        nowhere = "http://127.0.0.1:1/kv/snapshot"
        gateway.feed.follow_source(replace(engine.source(), snapshot_url=nowhere))
        await heard(gateway, engine)
        assert caplog.text.count("gives no snapshot") == 1
        await engine.say(stored(1, 2))
        await until(lambda: gateway.matches(prompt(1, 2)) == {V: 2 * BLOCK}, "what comes now")


async def _lose(one: Publishing, batches: int) -> None:
    """Have the publisher leave batches out that it can replay."""
    publisher = one.events._outlet._publisher
    send, lost = publisher.send_multipart, []
    publisher.send_multipart = lost.append
    for number in range(batches):
        one.store(*prompt(number))
        await until(lambda want=number: len(lost) > want, "a batch to lose")
    publisher.send_multipart = send
