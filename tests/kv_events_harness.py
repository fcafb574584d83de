"""Pools that publish their events, behind what an instance serves of it, on the test's loop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import numpy as np

from memserve.api.kv_events import KVSnapshot
from memserve.api.serving import MAX_BODY_BYTES, Shutdown, bind, serve_http, url_of
from memserve.api.status import PoolTotals
from memserve.clock import MonotonicClock
from memserve.cluster.kv_feed import KvFeed, MemberFeed
from memserve.instance.instance import Instance
from memserve.instance.kv_events import KVEventPublisher
from memserve.instance.parts import Identity, Parts
from memserve.instance.run import handler_of
from memserve.models.tokenizer import Tokenizer
from memserve.pool.pool import BlockPool
from memserve.radix import block_digests
from memserve.scheduler.prompt_tree import Prefix, PromptTree
from memserve.secrets import cluster_secret
from memserve.transfer.secret import cluster_keys
from memserve.types import Epoch, InstanceId, Namespace, Role
from tests.fakes import MODEL, FakeEngine
from tests.insider import peers
from tests.pool_harness import LAYOUT
from tests.pool_harness import store as store_in
from tests.waiting import until

_epochs = itertools.count(1)
_snapshots = msgspec.msgpack.Decoder(KVSnapshot)


def prefixes_of(pool: BlockPool) -> set[Prefix]:
    """What an index holds, in the terms of `PromptTree.held`."""
    found: set[Prefix] = set()
    step = 4 * pool.layout.block_tokens
    for namespace, root in pool._index.roots.items():
        digests: dict[int, bytes] = {}
        for node in root.subtree():
            if node.parent is not None:
                chain = block_digests(node.edge, step, digests.get(node.parent.id, b""))
                digests[node.id] = chain[-1]
                found.update((Namespace(namespace), digest) for digest in chain)
    return found


class Publishing:
    """One instance that publishes: a real pool and HTTP application, and no model."""

    def __init__(self, pool: BlockPool, events: KVEventPublisher, url: str, role: Role) -> None:
        self.pool = pool
        self.events = events
        self.url = url
        self.role = role

    @property
    def id(self) -> InstanceId:
        return self.pool.owner.instance

    @property
    def epoch(self) -> Epoch:
        return self.pool.owner.epoch

    def store(self, *tokens: int, namespace: str = "") -> None:
        store_in(self.pool, tokens, namespace)

    def snapshot(self) -> KVSnapshot:
        return _snapshots.decode(self.events.snapshot())


@asynccontextmanager
async def publishing(
    tokenizer: Tokenizer,
    name: str = "p0",
    role: Role = Role.COLOCATED,
    *,
    hbm_blocks: int = 32,
    dram_blocks: int = 32,
    buffer_batches: int = 1000,
    secret: str | None = None,
) -> AsyncIterator[Publishing]:
    epoch = Epoch(next(_epochs))
    pool = BlockPool(LAYOUT, hbm_blocks, dram_blocks, instance=name, epoch=epoch)
    keys = None if secret is None else cluster_keys(secret)
    events = KVEventPublisher(pool, "127.0.0.1", keys, buffer_batches)
    engine = FakeEngine()

    def close() -> None:
        events.close()
        pool.close()

    instance = Instance(Identity(InstanceId(name), epoch, role, MODEL), MonotonicClock())
    await instance.start(Parts(engine, tokenizer, PoolTotals, close, events=events))
    sock, shutdown = bind("127.0.0.1", 0), Shutdown()

    async def drain() -> None:
        instance.lifecycle.drain()

    handler = handler_of(instance, cluster_secret(), sock)
    serving = asyncio.create_task(serve_http(handler, sock, shutdown, drain, MAX_BODY_BYTES))
    try:
        yield Publishing(pool, events, url_of(sock), role)
    finally:
        shutdown.request()
        shutdown.request()
        await serving
        await instance.stop()
        await instance.close()


class Following:
    """A gateway's tree and its feed."""

    def __init__(self, tree: PromptTree, feed: KvFeed) -> None:
        self.tree = tree
        self.feed = feed

    def follow(self, *instances: Publishing) -> None:
        for each in instances:
            self.feed.follow(each.id, each.epoch, each.url, each.role)

    def of(self, instance: Publishing) -> MemberFeed:
        (found,) = [each for each in self.feed.members() if each.instance == instance.id]
        return found

    async def until_equal(self, *instances: Publishing) -> None:
        """Until the trees have just what the indexes have."""

        def equal() -> bool:
            self.tree.check_integrity()
            return all(
                each.id in self.tree
                and self.feed.synchronised(each.id)
                and self.tree.held(each.id) == prefixes_of(each.pool)
                for each in instances
            )

        await until(equal, "trees that equal the indexes")

    def matches(self, tokens: Sequence[int], namespace: str = "") -> dict[str, int]:
        found = self.tree.match(Namespace(namespace), np.array(tokens, dtype=np.int32))
        return {str(instance): length for instance, length in found.items()}


@asynccontextmanager
async def following() -> AsyncIterator[Following]:
    tree = PromptTree()
    async with peers() as session:
        feed = KvFeed(tree, session)
        try:
            yield Following(tree, feed)
        finally:
            await feed.close()
        assert tree.instances == []
        assert tree.stats().nodes == 0
