"""KV events as nobody should send them: from valid batches, changed a little.

Nothing of it may raise into the subscription or leave the trees inconsistent, and what is
heard afterwards makes them what they should be. MEMSERVE_FUZZ_EXAMPLES for a long run.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
import zmq.asyncio

from memserve.api.kv_events import EventBatch, KVSnapshot, MalformedEvents, decode_frames
from memserve.cluster.kv_subscription import EventSource
from memserve.errors import ConfigError
from memserve.instance.kv_events import stored_blocks, wire_events
from memserve.pool.listener import StoredRun
from memserve.pool.pool import BlockPool
from memserve.scheduler.event_stream import EventCounts, EventStream
from memserve.scheduler.prompt_tree import PromptTree
from memserve.types import SHARED, Epoch, InstanceId, RefArray
from tests.kv_events_harness import following, prefixes_of
from tests.pool_harness import BLOCK, LAYOUT, prompt, store
from tests.vllm_events import RECORDING, Recording
from tests.waiting import until

EXAMPLES = int(os.environ.get("MEMSERVE_FUZZ_EXAMPLES", "2000"))
CHECKED_EACH = 20  # examples between looks at the whole tree
OURS, THEIRS = InstanceId("ours"), InstanceId("vllm")
Frames = list[bytes]

_encode = msgspec.msgpack.encode
NASTY: list[Any] = [
    *(0, 1, -1, 2**31, 2**49 - 1, 2**50, 2**63 - 1, 2**64 - 1, -(2**63)),
    *(0.5, float("nan"), float("inf"), "", "x" * 5000, "\u2028", b"", b"\xff" * 40, None, True),
    *([], {}, [[]], ["namespace", "n"], {"type": "BlockStored"}, [0] * 100),
]


class Recorder:
    """A pool's listener that keeps what a publisher would send."""

    def __init__(self, pool: BlockPool) -> None:
        self.changes: list[StoredRun | RefArray] = []
        pool.listen(self)

    def stored(self, run: StoredRun) -> None:
        self.changes.append(run)

    def removed(self, namespace: str, refs: RefArray) -> None:
        self.changes.append(refs)

    def moved(self, run: StoredRun, old: RefArray) -> None:
        self.changes += [run, old]


def lived(pool: BlockPool) -> list[Frames]:
    """What an instance of ours said while it stored, evicted and moved."""
    recorder = Recorder(pool)
    choose = random.Random(1)
    for _ in range(60):
        tokens = prompt(*(choose.randrange(4) for _ in range(choose.randint(1, 6))))
        store(pool, tokens, choose.choice(["", "salt:x"]))
        pool.swap_out(choose.randint(0, 3))
    pool.listen(None)
    return [
        [b"kv", number.to_bytes(8, "big"), _encode(EventBatch(1.0, wire_events(each, BLOCK), 0))]
        for number, each in enumerate(recorder.changes)
    ]


def recorded() -> list[Frames]:
    """What a vLLM said."""
    recording = msgspec.msgpack.decode(RECORDING.read_bytes(), type=Recording)
    return [frames for step in recording.steps for frames in step.frames]


def changed(payload: bytes, choose: random.Random) -> bytes:
    """A payload with a few bytes, or a few values, that are not what they were."""
    if choose.random() < 0.4:
        data = bytearray(payload)
        for _ in range(choose.randint(1, 4)):
            at = choose.randrange(len(data) + 1)
            match choose.randrange(4):
                case 0:
                    data[at : at + 1] = bytes((choose.randrange(256),))
                case 1:
                    del data[at : at + choose.randint(1, 9)]
                case 2:
                    data[at:at] = choose.randbytes(choose.randint(1, 9))
                case _:
                    data[at:at] = data[at : at + 50]
        return bytes(data)
    value = msgspec.msgpack.decode(payload)
    for _ in range(choose.randint(1, 3)):
        value = changed_value(value, choose)
    try:
        return _encode(value)
    except (OverflowError, TypeError, RecursionError):
        return payload


def changed_value(value: Any, choose: random.Random) -> Any:
    """The same with one value replaced, left out, or there twice."""
    if isinstance(value, dict) and value and choose.random() < 0.95:
        key = choose.choice(list(value))
        if choose.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: changed_value(value[key], choose)}
    if isinstance(value, list) and value and choose.random() < 0.9:
        at = choose.randrange(len(value))
        match choose.randrange(6):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value[: at + 1] + value[at:]
            case _:
                return [*value[:at], changed_value(value[at], choose), *value[at + 1 :]]
    if isinstance(value, int) and choose.random() < 0.5:
        return value + choose.choice((-1, 1, 2**24, 2**48))
    return choose.choice(NASTY)


def mutated(frames: Frames, choose: random.Random) -> Frames:
    *topic, number, payload = frames
    if choose.random() < 0.1:
        number = choose.choice((b"", number[1:], b"\xff" * 8, b"\x7f" + b"\xff" * 7, number * 2))
    made = [*topic, number, changed(payload, choose)]
    if choose.random() < 0.05:
        made = choose.choice(([], made[1:], made[-1:], made * 20, [b"", *made]))
    return made


def offer(stream: EventStream, frames: Frames, sequence: int | None = None) -> None:
    """As a subscription does; with `sequence`, in its place whatever the frames say."""
    try:
        _, number, batch = decode_frames(frames)
    except MalformedEvents:
        stream.counts.malformed += 1
        return
    stream.offer(number if sequence is None else sequence, batch)


def test_ours_mutated_harm_nothing() -> None:
    with BlockPool(LAYOUT, 48, 16, instance=OURS, epoch=Epoch(1)) as pool:
        valid = lived(pool)
        runs = pool.indexed(lambda: None)
        state = KVSnapshot(
            OURS, Epoch(1), len(valid) - 1, BLOCK, [stored_blocks(run) for run in runs]
        )
        expected = prefixes_of(pool)
    tree = PromptTree()
    tree.join(OURS, BLOCK, references=True)
    counts = EventCounts()
    for seed in range(EXAMPLES):
        choose = random.Random(seed)
        if seed % CHECKED_EACH == 0:
            stream = EventStream(tree, OURS, BLOCK, counts, position=-1)
            at = 0
        for _ in range(choose.randint(0, 3)):  # what is valid, between what is not
            offer(stream, choose.choice(valid), at)
            at += 1
        own = choose.random() < 0.9
        offer(stream, mutated(choose.choice(valid), choose), at if own else None)
        at = 1 + (-1 if stream.position is None else stream.position)
        if seed % CHECKED_EACH == CHECKED_EACH - 1:
            tree.check_integrity()
            stream.close()
            clean = EventStream(tree, OURS, BLOCK, counts)
            for _ in clean.restore(state):
                pass
            assert not clean.gap
            assert tree.held(OURS) == expected
            tree.check_integrity()
    assert counts.malformed > EXAMPLES // 20  # they were tried
    assert counts.batches > EXAMPLES


def test_vllm_s_mutated_harm_nothing() -> None:
    valid = recorded()
    block = msgspec.msgpack.decode(RECORDING.read_bytes(), type=Recording).block_tokens

    def replayed(into: PromptTree, into_counts: EventCounts) -> None:
        stream = EventStream(into, THEIRS, block, into_counts, position=-1)
        for number, frames in enumerate(valid):
            offer(stream, frames, number)

    clean = PromptTree()
    clean.join(THEIRS, block)
    replayed(clean, EventCounts())
    expected = clean.held(THEIRS)
    tree, counts = PromptTree(), EventCounts()
    tree.join(THEIRS, block)
    for seed in range(EXAMPLES):
        choose = random.Random(seed)
        if seed % CHECKED_EACH == 0:
            stream = EventStream(tree, THEIRS, block, counts, position=-1)
        number = 1 + (stream.position or 0)
        offer(stream, choose.choice(valid), number)
        offer(stream, mutated(choose.choice(valid), choose), number + 1)
        if stream.gap:
            stream.skip()
        if seed % CHECKED_EACH == CHECKED_EACH - 1:
            tree.check_integrity()
            tree.cleared(THEIRS)
            if seed % (10 * CHECKED_EACH) == CHECKED_EACH - 1:
                replayed(tree, counts)
                assert tree.held(THEIRS) == expected
                tree.check_integrity()
                tree.cleared(THEIRS)
    assert counts.malformed > 0


def test_snapshots_mutated_harm_nothing() -> None:
    with BlockPool(LAYOUT, 48, 16, instance=OURS, epoch=Epoch(1)) as pool:
        lived(pool)
        runs = pool.indexed(lambda: None)
        state = KVSnapshot(OURS, Epoch(1), 7, BLOCK, [stored_blocks(run) for run in runs])
        expected = prefixes_of(pool)
    tree = PromptTree()
    tree.join(OURS, BLOCK, references=True)
    decoder = msgspec.msgpack.Decoder(KVSnapshot)
    payload = _encode(state)
    for seed in range(EXAMPLES // 4):
        choose = random.Random(seed)
        stream = EventStream(tree, OURS, BLOCK, EventCounts())
        try:
            given = decoder.decode(changed(payload, choose))
        except (msgspec.MsgspecError, ValueError, RecursionError):
            continue
        for _ in stream.restore(given):
            pass
        tree.check_integrity()
    stream = EventStream(tree, OURS, BLOCK, EventCounts())
    for _ in stream.restore(state):
        pass
    assert tree.held(OURS) == expected
    tree.check_integrity()


async def test_a_subscription_lives_on_and_follows() -> None:
    """Through sockets: what is mutated first, then all of it as it was."""
    valid = recorded()
    block = msgspec.msgpack.decode(RECORDING.read_bytes(), type=Recording).block_tokens
    context = zmq.asyncio.Context()
    with context.socket(zmq.PUB) as publisher:
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        async with following() as gateway:
            source = EventSource(THEIRS, f"tcp://127.0.0.1:{port}", block)
            gateway.feed.follow_source(source)
            subscription = gateway.feed._followed[THEIRS].subscription
            assert subscription is not None
            beat = [b"", (0).to_bytes(8, "big"), _encode(EventBatch(0.0, [], 0))]

            async def heard() -> None:
                before = subscription.counts.duplicates
                while subscription.counts.duplicates == before:
                    await publisher.send_multipart(beat)
                    await asyncio.sleep(0.01)

            async with asyncio.timeout(15):
                await heard()
            choose = random.Random(0)
            for number in range(200):
                frames = mutated(choose.choice(valid), choose)
                if len(frames) > 2:
                    frames[-2] = (number + 1).to_bytes(8, "big")
                if frames:
                    await publisher.send_multipart(frames)
            # A later life, that counts anew.
            for number, (topic, _, payload) in enumerate(valid):
                batch = msgspec.msgpack.decode(payload)
                batch[0] += 1e9
                await publisher.send_multipart([topic, number.to_bytes(8, "big"), _encode(batch)])
            clean = PromptTree()
            clean.join(THEIRS, block)
            stream = EventStream(clean, THEIRS, block, EventCounts(), position=-1)
            for number, frames in enumerate(valid):
                offer(stream, frames, number)
            expected = clean.held(THEIRS)
            await until(lambda: gateway.tree.held(THEIRS) == expected, "the later life's blocks")
            gateway.tree.check_integrity()
            assert not subscription._receiving.done()
            assert not gateway.feed._vitals.survived
    context.destroy(linger=0)


@pytest.mark.parametrize(
    ("endpoint", "topic"),
    [
        ("tcp://127.0.0.1:1", "x" * (1 << 20)),
        ("tcp://127.0.0.1:1", "\n"),
        ("ipc:///tmp/x", "kv"),
        ("inproc://zeromq.zap.01", "kv"),
        ("tcp://127.0.0.1:1\n", "kv"),
        ("tcp://a;b:1", "kv"),
        ("tcp://:1", "kv"),
        ("udp://127.0.0.1:1", "kv"),
        ("tcp://" + "a" * 100_000 + ":1", "kv"),
    ],
)
def test_no_socket_sees_a_place_that_is_none(endpoint: str, topic: str) -> None:
    with pytest.raises(ConfigError):
        EventSource(OURS, endpoint, BLOCK, topic)


def test_a_large_reference_costs_no_memory() -> None:
    """One event of 30 bytes took 700 MB."""
    tree = PromptTree()
    tree.join(OURS, BLOCK, references=True)
    before = _resident()
    reference = ((1 << 24) - 1) << 24
    assert tree.stored(OURS, SHARED, None, [reference], _one_block())
    assert _resident() - before < 64 << 20
    tree.cleared(OURS)
    tree.check_integrity()


def _one_block() -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.zeros(BLOCK, dtype=np.int32)


def _resident() -> int:
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize(
    "hashes",
    [
        [(5 << 24) | 1, (5 << 24) | 2],  # two lives of one block: one place for both
        [b"a hash", b"another"],
        [1 << 60, 1],
        [-1, 1],
    ],
)
def test_names_that_cannot_be_change_nothing(hashes: list[Any]) -> None:
    tree = PromptTree()
    tree.join(OURS, BLOCK, references=True)
    tokens = np.arange(2 * BLOCK, dtype=np.int32)
    with pytest.raises(ValueError, match="references"):
        tree.stored(OURS, SHARED, None, hashes, tokens)
    tree.check_integrity()
    assert tree.stats().namespaces == 0
