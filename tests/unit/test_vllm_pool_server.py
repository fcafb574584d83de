"""The pool inside a vLLM server, as the instance beside it has it: over its socket, with real pools
on both ends of every transfer."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from memserve.api.handoff import PoolPeer
from memserve.api.namespaces import cache_salt_of, private, salted
from memserve.config import Caching
from memserve.errors import EngineStopped, PeerLost, PoolError, TransferError, TransferTimeout
from memserve.pool.layout import KVLayout
from memserve.secrets import cluster_secret
from memserve.transfer import kv_link
from memserve.transfer.kv_link import Pushed
from memserve.transfer.mempool import MemPool
from memserve.transfer.session import LEASE
from memserve.types import SHARED, Epoch, InstanceId, Medium, Namespace, TokenArray, ref_index
from memserve.vllm import pool_messages as m
from memserve.vllm import remote_link
from memserve.vllm.connector.pool_server import PoolServer
from memserve.vllm.connector.sequence import Spaces
from memserve.vllm.remote_link import RemoteLink
from tests.waiting import until

BLOCK = 4
LAYOUT = KVLayout(layers=2, kv_heads=1, head_dim=4, dtype="float32", block_tokens=BLOCK)
TOKENS: TokenArray = np.arange(100, 100 + 6 * BLOCK, dtype=np.int32)


@dataclass
class End:
    """A vLLM server's pool, and its instance's link to it."""

    pool: MemPool
    spaces: Spaces
    server: PoolServer
    link: RemoteLink
    path: Path

    def fill(self, blocks: int, salt: str = "") -> None:
        """The index has the first blocks of TOKENS, each of its own bytes."""
        tokens, namespace = TOKENS[: blocks * BLOCK], self.spaces.of(salt)
        with self.pool.match(tokens, namespace) as match:
            refs = self.pool.alloc_mem(blocks - len(match.refs), Medium.DRAM)
            (extent,) = self.pool.extents(Medium.DRAM)
            for at, place in enumerate(ref_index(refs).tolist(), len(match.refs)):
                extent.memory.view(extent.blocks, -1)[place] = at + 1
            self.pool.insert(tokens, np.concatenate((match.refs, refs)), namespace)

    def has(self, salt: str = "") -> list[int]:
        """The bytes of what it has of TOKENS."""
        (extent,) = self.pool.extents(Medium.DRAM)
        with self.pool.match(TOKENS, self.spaces.of(salt)) as match:
            rows = extent.memory.view(extent.blocks, -1)[ref_index(match.refs).tolist()]
        assert all((row == row[0]).all() for row in rows)
        return [int(row[0]) for row in rows]


def end(path: Path, name: str, blocks: int = 16, caching: Caching = "full") -> End:
    pool = MemPool(LAYOUT, hbm_blocks=0, dram_blocks=blocks, instance=name)
    spaces = Spaces()
    server = PoolServer(pool, spaces, path)
    server.start()
    secret = cluster_secret()
    link = RemoteLink(path, InstanceId(name), "127.0.0.1", secret, caching, "by-request-agg")
    return End(pool, spaces, server, link, path)


@pytest.fixture
async def ends(tmp_path: Path) -> AsyncIterator[tuple[End, End]]:
    both = end(tmp_path / "p", "p"), end(tmp_path / "d", "d")
    yield both
    for each in both:
        each.link.close()
        await asyncio.to_thread(each.server.close)
        each.pool.check_integrity()
        await asyncio.to_thread(each.pool.close)


async def test_what_a_peer_lacks_goes_over_and_is_whole(ends: tuple[End, End]) -> None:
    p, d = ends
    p.fill(6)
    d.fill(2)
    assert await p.link.push(d.link.address, TOKENS, SHARED, SHARED) == Pushed(4, 2)
    assert d.has() == [1, 2, 3, 4, 5, 6]
    assert await d.link.cached(TOKENS, SHARED) == len(TOKENS)
    assert p.link.kv == d.link.kv
    assert (p.link.block_bytes, p.link.block_tokens) == (LAYOUT.block_bytes, BLOCK)


async def test_what_kv_would_go_by_is_found_out_without_sending_any(
    ends: tuple[End, End],
) -> None:
    p, d = ends
    p.fill(2)
    assert await p.link.transport(d.link.address) == "shm"
    assert await d.link.transport(p.link.address) == "shm"
    assert d.has() == []
    await asyncio.to_thread(d.pool.close)
    with pytest.raises(TransferError):
        await p.link.transport(d.link.address)


@pytest.mark.parametrize("how", ["closed", "stalled"])
async def test_a_peer_that_is_lost_is_reported(ends: tuple[End, End], how: str) -> None:
    """Also one whose server goes on while its instance does not."""
    p, d = ends
    assert await p.link.cached(TOKENS, SHARED) == 0  # the pool hears from its instance
    lost = asyncio.ensure_future(d.link.until_lost(p.link.address))
    await until(lambda: d.pool.hears("p"), "that the two have met")
    assert not lost.done()
    if how == "closed":
        await asyncio.to_thread(p.pool.close)
    else:
        assert p.pool.vouched is not None
        p.pool.vouched -= LEASE
    assert await lost
    assert not d.pool.hears("p")


async def test_a_stalled_peer_stays_stalled_when_it_is_met_again(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its own next word: each request would wait for it anew."""
    p, d = ends
    assert await p.link.cached(TOKENS, SHARED) == 0
    await d.link.meet(p.link.address)
    assert p.pool.vouched is not None
    p.pool.vouched -= 100 * LEASE
    assert await d.link.until_lost(p.link.address)
    await d.link.meet(p.link.address)  # with a Hello of the same life
    assert not d.pool.hears("p")
    # The word comes at once, not with the next heartbeat.
    assert p.pool._service is not None
    monkeypatch.setattr(p.pool._service._endpoint, "on_beat", lambda now: None)
    p.pool.vouch()
    await until(lambda: d.pool.hears("p"), "that p serves calls again")


async def test_another_life_of_a_peer_is_not_the_one_waited_for(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    p, d = ends
    await d.link.meet(p.link.address)
    life = d.pool.heard_life("p")
    assert life is not None
    lost = asyncio.ensure_future(d.link.until_lost(p.link.address))
    await asyncio.sleep(0.05)
    assert not lost.done()
    monkeypatch.setattr(d.pool, "heard_life", lambda instance: life._replace(epoch=Epoch(7)))
    assert await lost


async def test_an_instance_vouches_for_itself_while_its_link_runs(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_link, "HEARTBEAT", 0.01)
    p, _ = ends
    running = asyncio.ensure_future(p.link.run())
    await until(lambda: p.pool.vouched is not None, "the first word")
    first = p.pool.vouched
    await until(lambda: p.pool.vouched != first, "another one")
    running.cancel()


async def test_what_is_ready_early_goes_early_and_counts_as_sent(ends: tuple[End, End]) -> None:
    p, d = ends
    stream = await p.link.stream(d.link.address, TOKENS, SHARED, salted("t"))
    for blocks in (2, 3, 5):
        p.fill(blocks)
        p.server.ready(stream.number, TOKENS[: blocks * BLOCK], p.spaces.of(""))
    await until(lambda: len(d.has("t")) == 5, "five blocks")
    p.fill(6)
    assert await stream.deliver() == Pushed(6, 0)
    assert d.has("t") == [1, 2, 3, 4, 5, 6]
    assert d.has() == []
    stream.close()
    assert not p.server._orders


async def test_who_names_an_order_that_nobody_gave_sends_nothing(ends: tuple[End, End]) -> None:
    p, d = ends
    p.fill(6)
    stream = await p.link.stream(d.link.address, TOKENS, SHARED, SHARED)
    p.server.ready(stream.number + 1, TOKENS, p.spaces.of(""))
    p.server.ready(stream.number, TOKENS, p.spaces.of("another's"))
    p.server.ready(stream.number, TOKENS + 1, p.spaces.of(""))
    stream.close()
    await until(lambda: not p.server._orders, "the end of all orders")
    p.server.ready(stream.number, TOKENS, p.spaces.of(""))
    assert await p.link.cached(TOKENS, SHARED) == len(TOKENS)  # whatever was asked before is done
    assert d.has() == []


async def test_an_instance_that_hangs_up_takes_its_orders_with_it(ends: tuple[End, End]) -> None:
    p, d = ends
    await p.link.stream(d.link.address, TOKENS, SHARED, SHARED)
    assert p.server._orders
    p.link.close()
    await until(lambda: not p.server._orders, "the end of all orders")


async def test_salts_and_private_namespaces_are_said_as_vllm_has_them(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_link, "LINGER_SECONDS", 0.1)
    p, _ = ends
    p.fill(2, "tenant")
    assert await p.link.cached(TOKENS, salted("tenant")) == 2 * BLOCK
    sequence = private("r1")
    p.fill(3, sequence)
    assert await p.link.cached(TOKENS, sequence) == 3 * BLOCK
    # A client's salt that looks like a sequence's is another one.
    assert await p.link.cached(TOKENS, salted(sequence)) == 0
    p.link.forget(sequence)
    for _ in range(3):  # also what comes late, and later
        await until(lambda: p.has(sequence) == [], "forgetting")
        p.fill(3, sequence)
    await until(lambda: p.has(sequence) == [], "forgetting")
    assert await p.link.cached(TOKENS, salted("tenant")) == 2 * BLOCK


async def test_totals_are_the_pool_s(ends: tuple[End, End]) -> None:
    p, _ = ends
    p.fill(3)
    await until(lambda: p.link.totals.dram.cached == 3, "totals")
    assert p.link.totals.dram.total == 16


async def test_failures_are_of_the_kind_that_callers_know(tmp_path: Path) -> None:
    p, d = end(tmp_path / "p", "p"), end(tmp_path / "d", "d", blocks=2)
    try:
        p.fill(6)
        nobody = PoolPeer(InstanceId("nobody"), "tcp://127.0.0.1:1")
        with pytest.raises(TransferError):
            await p.link.push(nobody, TOKENS, SHARED, SHARED)
        with pytest.raises(PoolError, match="blocks asked, 2 free"):
            await p.link.push(d.link.address, TOKENS, SHARED, SHARED)
        await asyncio.to_thread(p.server.close)
        with pytest.raises(TransferError, match="not there any more"):
            await p.link.cached(TOKENS, SHARED)
        with pytest.raises(TransferError, match="not there any more"):
            await p.link.push(d.link.address, TOKENS, SHARED, SHARED)
    finally:
        for each in (p, d):
            each.link.close()
            await asyncio.to_thread(each.server.close)
            each.pool.check_integrity()
            await asyncio.to_thread(each.pool.close)


async def test_a_call_that_is_cancelled_is_over(ends: tuple[End, End]) -> None:
    p, d = ends
    p.fill(6)
    pushing = asyncio.ensure_future(p.link.push(d.link.address, TOKENS, SHARED, SHARED))
    await asyncio.sleep(0)
    pushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pushing
    assert await p.link.push(d.link.address, TOKENS, SHARED, SHARED) in (
        Pushed(sent, 6 - sent) for sent in range(7)
    )
    assert d.has() == [1, 2, 3, 4, 5, 6]


async def test_kv_of_other_weights_is_found_nowhere(ends: tuple[End, End]) -> None:
    """Whatever is pinned, or on its way, when weights are changed."""
    p, d = ends
    p.fill(6)
    with p.pool.match(TOKENS, p.spaces.of("")):
        p.spaces.renew()
        p.pool.delete(np.empty(0, dtype=np.int32), "0:")
        assert p.has() == []
    assert await p.link.cached(TOKENS, SHARED) == 0
    p.fill(3)
    # The peer's are not changed yet: it gets what it will find when they are.
    assert await p.link.push(d.link.address, TOKENS, SHARED, SHARED) == Pushed(3, 0)
    assert d.has() == []
    d.spaces.renew()
    assert d.has() == [1, 2, 3]


async def test_a_push_that_is_given_up_takes_what_was_sent_early_with_it(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    p, d = ends
    p.fill(6)
    stream = await p.link.stream(d.link.address, TOKENS, SHARED, SHARED)
    held = asyncio.Event()

    async def push(*args: object) -> Pushed:
        await held.wait()
        raise AssertionError("it was given up")

    assert p.server._link is not None
    monkeypatch.setattr(p.server._link, "push", push)
    p.server.ready(stream.number, TOKENS, p.spaces.of(""))
    order = p.server._orders[stream.number]
    await until(lambda: order.begun, "the early push")
    delivering = asyncio.ensure_future(stream.deliver())
    await until(lambda: not p.server._orders, "the last one")
    delivering.cancel()
    await until(lambda: order.sending is not None and order.sending.done(), "both ends")
    assert d.has() == []


async def test_whatever_fails_is_answered(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    p, d = ends

    def connect(*args: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(p.pool, "connect", connect)
    with pytest.raises(TransferError, match="Too many open files"):
        await p.link.push(d.link.address, TOKENS, SHARED, SHARED)


async def test_what_is_not_answered_in_time_is_given_up(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    p, d = ends
    monkeypatch.setattr(remote_link, "CALL_SECONDS", 0.05)
    monkeypatch.setattr(p.pool, "connect", lambda *_: time.sleep(0.5))
    with pytest.raises(TransferTimeout, match="has not answered"):
        await p.link.meet(d.link.address)


async def test_a_pool_that_can_talk_to_nobody_ends_its_link(ends: tuple[End, End]) -> None:
    p, _ = ends
    running = asyncio.ensure_future(p.link.run())
    assert await p.link.cached(TOKENS, SHARED) == 0
    assert not running.done()
    p.pool._failed.set_result(RuntimeError("its thread has ended"))
    await asyncio.wait_for(running, 10)
    with pytest.raises(TransferError, match="not there any more"):
        await p.link.cached(TOKENS, SHARED)


async def test_a_pool_of_another_name_is_refused(ends: tuple[End, End]) -> None:
    p, _ = ends
    other, secret = InstanceId("other"), cluster_secret()
    with pytest.raises(EngineStopped, match="the vLLM server's pool is 'p', not 'other'"):
        await asyncio.to_thread(
            RemoteLink, p.path, other, "127.0.0.1", secret, "full", "by-request-agg"
        )


async def test_a_link_that_is_closed_says_so(tmp_path: Path) -> None:
    one = end(tmp_path / "p", "p")
    one.link.close()
    with pytest.raises(TransferError, match="it is closed"):
        await one.link.cached(TOKENS, SHARED)
    one.link.close()
    await asyncio.to_thread(one.server.close)
    one.server.ready(1, TOKENS, one.spaces.of(""))
    await asyncio.to_thread(one.pool.close)


async def test_who_cannot_be_reached_is_asked_once_by_all(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    p, d = ends
    asked = []

    def connect(instance: str, address: str) -> None:
        asked.append(instance)
        raise PeerLost("nobody answers")

    monkeypatch.setattr(p.pool, "connect", connect)
    results = await asyncio.gather(
        *(p.link.meet(d.link.address) for _ in range(20)), return_exceptions=True
    )
    assert all(isinstance(each, TransferError) for each in results)
    with pytest.raises(TransferError, match="nobody answers"):
        await p.link.meet(d.link.address)
    assert asked == ["d"]
    monkeypatch.undo()
    monkeypatch.setattr(kv_link, "REFUSED_SECONDS", 0.0)
    await asyncio.sleep(1.1)
    await p.link.meet(d.link.address)


GARBAGE = [
    b"\xff\xff\xff\xff",
    m.HEAD_BYTES * b"\0",
    (3).to_bytes(m.HEAD_BYTES) + b"\xc1\xc1\xc1",
    m.frame(m.Reply(1, m.Done())),
]


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_ends_its_connection_and_nothing_else(
    ends: tuple[End, End], garbage: bytes
) -> None:
    p, _ = ends

    def ask() -> bytes:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(p.path))
            stranger.sendall(garbage)
            return stranger.recv(1)

    assert await asyncio.to_thread(ask) == b""
    assert await p.link.cached(TOKENS, SHARED) == 0


def test_a_pool_that_is_not_there_is_said(tmp_path: Path) -> None:
    secret = cluster_secret()
    with pytest.raises(EngineStopped, match="cannot be talked to"):
        RemoteLink(tmp_path / "p", InstanceId("p"), "127.0.0.1", secret, "full", "by-request-agg")


def test_namespaces_do_not_meet() -> None:
    salts = ["", "a", "salt:a", "sequence:a", "salt:salt:a", "salt:sequence:a"]
    spaces = [*map(salted, salts), private("a"), private("salt:a")]
    assert len({cache_salt_of(Namespace(space)) for space in spaces}) == len(spaces)
