"""KV that leaves while its prompt is computed: when, for whom, and what becomes of its memory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from memserve.api.handoff import PoolPeer
from memserve.config import Caching, TransferMode
from memserve.errors import OutOfBlocks, TransferCancelled
from memserve.pool.layout import KVLayout
from memserve.transfer.base import Ticket, Transport, WriteList
from memserve.transfer.kv_stream import KVStream
from memserve.transfer.mempool import MemPool
from memserve.transfer.shm import ShmTransport
from memserve.types import SHARED, InstanceId, Medium, Namespace, Owner, RefArray, Role
from tests.fakes import save_tiny_tokenizer
from tests.handoff_harness import Node, node, prompt_of
from tests.tiny_models import Reference, save_tiny_model
from tests.transfer_harness import LAYOUT, eventually, kv_blocks, tokens_of, two_pools
from tests.waiting import PATIENCE, until

PROMPT = prompt_of(100, seed=1)
CHUNK = 32  # tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


class Watched(ShmTransport):
    """Remembers what was posted; copies nothing while it is `held`."""

    def __init__(self, layout: KVLayout) -> None:
        super().__init__(layout)
        self.posts: list[tuple[int, range | None]] = []  # blocks, layers
        self.posted = threading.Condition()
        self.held = False

    def post(self, peer: Owner, writes: WriteList) -> Ticket:
        with self.posted:
            self.posts.append((len(writes.source), writes.layers))
            self.posted.notify_all()
        return super().post(peer, writes)

    def poll(self):  # type: ignore[no-untyped-def]
        return [] if self.held else super().poll()

    def wait(self, posts: int) -> None:
        """For the engine's thread."""
        with self.posted:
            assert self.posted.wait_for(lambda: len(self.posts) >= posts, PATIENCE)


class Watching:
    """Makes the transport of one instance."""

    def __init__(self) -> None:
        self.made: list[Watched] = []

    def __call__(self, owner: Owner, layout: KVLayout) -> Sequence[Transport]:
        self.made.append(Watched(layout))
        return self.made[-1:]

    @property
    def transport(self) -> Watched:
        return self.made[0]


def layer_of(one: Node, number: int) -> nn.Module:
    layer = one.engine._model.module.get_submodule(f"model.layers.{number}")
    assert isinstance(layer, nn.Module)
    return layer


async def test_a_layer_leaves_before_the_next_but_one_is_computed(
    model: Path, reference: Reference
) -> None:
    watching = Watching()
    async with (
        node(model, Role.PREFILL, mode="by-layer", transports=watching) as p,
        node(model, Role.DECODE, mode="by-layer") as d,
    ):
        # The engine stops before the last layer until both others have been posted.
        hook = layer_of(p, 2).register_forward_pre_hook(lambda *_: watching.transport.wait(2))
        answer = await d.complete(*PROMPT, tokens=5, prefill=[p])
        hook.remove()
        assert answer.tokens == [reference.generate(PROMPT, 5)]
        assert watching.transport.posts == [(6, range(at, at + 1)) for at in range(3)]
        assert d.totals.blocks_received == 6


@pytest.mark.parametrize("mode", ["by-layer", "by-request", "by-request-agg"])
async def test_a_chunk_leaves_before_the_next_is_computed(
    model: Path, reference: Reference, mode: TransferMode
) -> None:
    watching = Watching()
    layers = 1 if mode == "by-request-agg" else 3  # posts for each chunk
    chunks = 0

    def wait(*_: object) -> None:
        nonlocal chunks
        watching.transport.wait(chunks * layers)
        chunks += 1

    async with (
        node(model, Role.PREFILL, mode=mode, transports=watching, max_batch_tokens=CHUNK) as p,
        node(model, Role.DECODE, mode=mode) as d,
    ):
        hook = layer_of(p, 0).register_forward_pre_hook(wait)
        answer = await d.complete(*PROMPT, tokens=5, prefill=[p])
        hook.remove()
        assert chunks == 4
        assert answer.tokens == [reference.generate(PROMPT, 5)]
        assert [blocks for blocks, _ in watching.transport.posts] == [2] * (3 * layers)


async def test_what_is_cached_leaves_before_anything_is_computed(
    model: Path, reference: Reference
) -> None:
    watching = Watching()
    async with (
        node(model, Role.PREFILL, transports=watching) as p,
        node(model, Role.DECODE) as d,
    ):
        await p.complete(*PROMPT, tokens=1)
        prompt = PROMPT + prompt_of(40, seed=2)
        hook = layer_of(p, 0).register_forward_pre_hook(lambda *_: watching.transport.wait(1))
        answer = await d.complete(*prompt, tokens=5, prefill=[p])
        hook.remove()
        assert answer.tokens == [reference.generate(prompt, 5)]
        assert watching.transport.posts == [(6, None), (2, None)]


async def test_nobody_waits_for_a_transfer(model: Path) -> None:
    """While one is stuck, the decode instance decodes, and the prefill instance computes."""
    watching = Watching()
    async with (
        node(model, Role.PREFILL, transports=watching) as p,
        node(model, Role.DECODE) as d,
    ):
        await d.complete(*prompt_of(20, seed=5), prefill=[p])
        watching.transport.held = True
        stuck = asyncio.ensure_future(d.answer(*PROMPT, prefill=[p]))
        await until(lambda: watching.transport.in_flight > 0, "a write")
        await d.answer(*prompt_of(50, seed=3), tokens=30)
        await p.answer(*prompt_of(60, seed=4), tokens=30)
        assert not stuck.done()
        watching.transport.held = False
        await stuck


@pytest.mark.parametrize("ending", ["stop token", "max_tokens"])
@pytest.mark.parametrize("caching", ["off", "p", "pd", "full"])
async def test_kv_that_nobody_will_use_does_not_arrive(
    model: Path, reference: Reference, caching: Caching, ending: str
) -> None:
    (token,) = reference.generate(PROMPT, 1)
    options = {"stop_token_ids": (token,)} if ending == "stop token" else {"tokens": 1}
    async with node(model, Role.PREFILL, caching) as p, node(model, Role.DECODE, caching) as d:
        answer = await d.complete(*PROMPT, prefill=[p], **options)
        assert answer.tokens == [[token]]
        assert d.totals.blocks_received == (6 if caching in ("pd", "full") else 0)
        await until(lambda: d.cached == d.totals.blocks_received, "nothing else")


async def test_many_equal_prompts_at_once_leave_no_block_behind(
    model: Path, reference: Reference
) -> None:
    """All are computed at the same time, and one of them gets into the index first."""
    async with (
        node(model, Role.PREFILL, mode="by-layer", max_batch_tokens=CHUNK * 3) as p,
        node(model, Role.DECODE, mode="by-layer") as d,
    ):
        salts = ["", "", "", "other", "other"]
        expected = reference.generate(PROMPT, 5)
        answers = await asyncio.gather(
            *(d.answer(*PROMPT, tokens=5, prefill=[p], cache_salt=salt) for salt in salts)
        )
        assert all(answer.tokens == [expected] for answer in answers)
        await p.settled()
        assert p.cached == 2 * 6


# --- the stream alone -------------------------------------------------------------------------


def stream_between(a: MemPool, blocks: int, mode: TransferMode = "by-request-agg") -> KVStream:
    tokens = np.array(tokens_of(blocks), dtype=np.int32)
    peer = PoolPeer(InstanceId("b"), "")
    return KVStream(a, mode, peer, tokens, SHARED, Namespace("there"), Medium.HBM)


def computed(pool: MemPool, count: int) -> RefArray:
    refs = pool.alloc_mem(count)
    pool.write(refs, kv_blocks(count, seed=7))
    return refs


def arrived(pool: MemPool, count: int) -> bool:
    with pool.match(tokens_of(count), "there") as match:
        return len(match.refs) == count and torch.equal(
            pool.read(match.refs), kv_blocks(count, seed=7)
        )


async def test_a_preempted_sequence_begins_again() -> None:
    with two_pools() as (a, b):
        stream = stream_between(a, 4)
        lost = computed(a, 4)
        first = stream.begin(lost)
        assert first is not None
        first.ready(0, 2, None)
        first.released(2)
        a.free_mem(lost)
        garbage = a.alloc_mem(20)  # in the blocks that it had, among others
        refs = computed(a, 4)
        second = stream.begin(refs)
        assert second is not None
        first.ready(2, 3, None)  # late: a GPU's word of the first admission
        second.ready(0, 4, None)
        a.insert(tokens_of(4), refs)
        second.released(4)
        assert await stream.finish() == 4
        assert arrived(b, 4)
        a.free_mem(garbage)


async def test_superseded_blocks_are_kept_until_they_are_read() -> None:
    with two_pools() as (a, b):
        stream = stream_between(a, 3)
        a.insert(tokens_of(2), computed(a, 2))  # somebody was faster
        refs = computed(a, 3)
        leg = stream.begin(refs)
        assert leg is not None
        duplicate = a.insert(tokens_of(3), refs).duplicate
        leg.superseded(duplicate)
        leg.ready(0, 3, None)
        leg.released(3)
        assert a.stats().hbm.active == 2
        assert await stream.finish() == 3
        assert arrived(b, 3)
        assert a.stats().hbm.active == 0
        late = a.alloc_mem(1)
        leg.superseded(late)  # nothing is read any more
        assert a.stats().hbm.active == 0


async def test_what_was_released_stays_until_it_is_sent() -> None:
    with two_pools(blocks=6) as (a, b):
        stream = stream_between(a, 4)
        refs = computed(a, 4)
        leg = stream.begin(refs)
        assert leg is not None
        a.insert(tokens_of(4), refs)
        leg.released(4)
        with pytest.raises(OutOfBlocks):
            a.alloc_mem(3)
        leg.ready(0, 4, None)
        assert await stream.finish() == 4
        assert arrived(b, 4)
        a.free_mem(a.alloc_mem(3))


async def test_a_commit_waits_for_the_last_layer() -> None:
    with two_pools() as (a, b):
        stream = stream_between(a, 2, "by-layer")
        refs = computed(a, 2)
        leg = stream.begin(refs)
        assert leg is not None
        a.insert(tokens_of(2), refs)
        leg.released(2)
        leg.ready(0, 2, 0)
        finishing = asyncio.ensure_future(stream.finish())
        for layer in range(1, LAYOUT.layers):
            await asyncio.sleep(0.01)
            assert not finishing.done()
            assert not arrived(b, 2)
            leg.ready(0, 2, layer)
        assert await finishing == 2
        assert arrived(b, 2)


@pytest.mark.parametrize("computed_blocks", [0, 2, 4])
async def test_a_closed_stream_holds_and_publishes_nothing(computed_blocks: int) -> None:
    with two_pools() as (a, b):
        stream = stream_between(a, 4)
        refs = computed(a, 4)
        leg = stream.begin(refs)
        assert leg is not None
        leg.ready(0, computed_blocks, None)
        stream.close()
        with pytest.raises(TransferCancelled):
            leg.transfer.result(PATIENCE)
        leg.released(computed_blocks)
        a.free_mem(refs)
        assert stream.begin(computed(a, 0)) is None
        assert not arrived(b, 1)
        eventually(lambda: b.stats().hbm.active == 0, "free blocks")


async def test_a_peer_without_room_says_so_at_the_end() -> None:
    with two_pools() as (a, b):
        full = b.alloc_mem(30)
        stream = stream_between(a, 4)
        refs = computed(a, 4)
        leg = stream.begin(refs)
        assert leg is not None
        with suppress(OutOfBlocks):
            leg.transfer.result(PATIENCE)
        leg.ready(0, 4, None)
        leg.released(0)
        with pytest.raises(OutOfBlocks):
            await stream.finish()
        a.free_mem(refs)
        b.free_mem(full)


async def test_a_peer_that_lacked_room_gets_it_with_a_push(model: Path) -> None:
    async with node(model, Role.PREFILL) as p, node(model, Role.DECODE, hbm_blocks=12) as d:
        await d.complete(*prompt_of(20, seed=5), prefill=[p])
        taken = d.pool.alloc_mem(8)

        def make_room(*_: object) -> None:
            """Once the transfer was refused, and before all is computed."""
            hook.remove()
            eventually(lambda: p.pool.peer_stats().outgoing == 0, "a refusal")
            d.pool.free_mem(taken)

        hook = layer_of(p, 1).register_forward_pre_hook(make_room)
        before = d.totals.blocks_received
        await d.complete(*PROMPT, prefill=[p])
        assert d.totals.blocks_received - before == 6
