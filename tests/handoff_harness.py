"""Instances with real engines and real HTTP servers, on the test's own event loop."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memserve.api.generate import CallKind, GenerateCall, PrefillPeer, SamplingParams
from memserve.api.serving import MAX_BODY_BYTES, Shutdown, bind, serve_http, url_of
from memserve.api.status import FetchTotals, HandoffTotals, PeerMoves
from memserve.clock import MonotonicClock
from memserve.config import (
    CacheConfig,
    Caching,
    ClusterConfig,
    InstanceConfig,
    ModelConfig,
    TransferMode,
)
from memserve.engine.engine import Engine
from memserve.gateway.instance_costs import UNKNOWN
from memserve.instance import build
from memserve.instance.dispatcher import Run
from memserve.instance.instance import Instance
from memserve.instance.parts import Identity
from memserve.instance.run import handler_of
from memserve.scheduler.profiles import Profile, Subject, make_profile
from memserve.secrets import cluster_secret
from memserve.tokens import from_ids
from memserve.tracing.span import Tracer
from memserve.transfer.kv_link import PoolLink
from memserve.transfer.mempool import MakeTransports, MemPool
from memserve.types import SHARED, Epoch, InstanceId, Namespace, Role
from tests.device import DEVICE
from tests.insider import peers
from tests.waiting import PATIENCE, until

BLOCK = 16
_ids = itertools.count()


def prompt_of(tokens: int, seed: int) -> list[int]:
    """Tokens that no other seed's prompt begins with."""
    return [int(t) for t in np.random.default_rng(seed).integers(3, 300, tokens)]


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer, one entry per choice."""

    tokens: list[list[int]]
    reasons: list[str]
    cached: int
    prompt_tokens: int
    body: dict[str, Any]


@dataclass(eq=False)
class Node:
    """One instance."""

    instance: Instance
    engine: Engine
    link: PoolLink
    url: str
    shutdown: Shutdown

    @property
    def pool(self) -> MemPool:
        assert isinstance(self.engine.pool, MemPool)
        return self.engine.pool

    @property
    def peer(self) -> PrefillPeer:
        return PrefillPeer(self.instance.identity.id, self.url, self.link.address.address)

    @property
    def totals(self) -> HandoffTotals:
        stats = self.instance.stats()
        assert stats is not None
        return stats.handoff

    @property
    def fetches(self) -> FetchTotals:
        stats = self.instance.stats()
        assert stats is not None
        return stats.fetch

    @property
    def moves(self) -> dict[InstanceId, PeerMoves]:
        stats = self.instance.stats()
        assert stats is not None
        return stats.moves

    def has(self, tokens: Sequence[int], namespace: Namespace = SHARED) -> int:
        """How many leading tokens have KV in the index."""
        with self.pool.match(tokens, namespace) as match:
            return match.tokens

    @property
    def cached(self) -> int:
        """Blocks in the index, of whatever."""
        stats = self.pool.stats()
        return stats.hbm.cached + stats.dram.cached

    async def complete(self, *prompt: int, **options: Any) -> Completion:
        """Have it answer, and wait for what follows the answer."""
        completion = await self.answer(*prompt, **options)
        await self.settled()
        return completion

    async def answer(self, *prompt: int, **options: Any) -> Completion:
        """Have it answer; others may be answered meanwhile."""
        call = call_of(prompt, **options)
        constraints = await self.instance.constraints(call)
        with self.instance.run(call, constraints) as run:
            return await completed(run)

    async def settled(self) -> None:
        """Until no sequence runs and no block is held, for a sequence or a peer."""

        def quiet() -> bool:
            engine, pool = self.engine.stats(), self.pool.stats()
            held = pool.hbm.active + pool.hbm.pinned + pool.dram.active + pool.dram.pinned
            peers = self.pool.peer_stats()
            left = engine.running + engine.waiting + held + pool.matches
            return not (left + peers.quarantined + peers.granted)

        await until(quiet, "the end of everything")
        self.pool.check_integrity()


def call_of(
    prompt: Sequence[int],
    tokens: int = 8,
    *,
    prefill: Sequence[Node | PrefillPeer] = (),
    n: int = 1,
    stop: Sequence[str] = (),
    cache_salt: str = "",
    **sampling: Any,
) -> GenerateCall:
    """Greedy, and never ended by the model, unless `sampling` says otherwise."""
    settings = {"temperature": 0.0, "ignore_eos": True, "max_tokens": tokens, **sampling}
    return GenerateCall(
        id=f"call-{next(_ids)}",
        kind=CallKind.COMPLETION,
        model="tiny",
        created=1,
        prompts=(from_ids(prompt),),
        sampling=SamplingParams(**settings),
        n=n,
        stop=tuple(stop),
        return_token_ids=True,
        cache_salt=cache_salt,
        prefill=tuple(p.peer if isinstance(p, Node) else p for p in prefill),
    )


async def completed(run: Run) -> Completion:
    async with asyncio.timeout(PATIENCE):
        while not run.generation.finished:
            await run.step()
    body = json.loads(run.generation.body())
    usage = body["usage"]
    return Completion(
        tokens=[choice["token_ids"] for choice in body["choices"]],
        reasons=[choice["finish_reason"] for choice in body["choices"]],
        cached=usage["prompt_tokens_details"]["cached_tokens"],
        prompt_tokens=usage["prompt_tokens"],
        body=body,
    )


def _profile(subject: Subject, *_: object) -> Profile:
    """Costs of a larger model, whatever this machine's store has: for tiny ones, what a step costs
    in itself would be all, and no cached prefix worth a transfer."""
    return make_profile("default", subject, UNKNOWN)


@asynccontextmanager
async def node(
    model: Path,
    role: Role,
    caching: Caching = "full",
    *,
    name: str | None = None,
    transports: MakeTransports | None = None,
    mode: TransferMode = "by-request-agg",
    hbm_blocks: int = 128,
    tracer: Tracer | None = None,
    **settings: Any,
) -> AsyncIterator[Node]:
    """A running instance; on leaving it nothing may be held any more."""
    identity = Identity(InstanceId(name or f"{role}-{next(_ids)}"), Epoch(next(_ids)), role, "tiny")
    config = ClusterConfig(
        model=ModelConfig(path=str(model), dtype="float32", device=DEVICE),
        cache=CacheConfig(caching=caching, mode=mode),
    )
    own = InstanceConfig(
        role=role,
        threads=1,
        hbm_blocks=hbm_blocks,
        profile="off",
        **{"dram_blocks": 32, **settings},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "MemPool", partial(MemPool, transports=transports))
        patch.setattr(build, "instance_profile", _profile)
        parts = build.build_parts(config, own, identity)
    engine = parts.engine
    assert isinstance(engine, Engine)
    assert parts.link is not None
    client = peers()
    instance = Instance(identity, MonotonicClock(), client)
    await instance.start(parts)
    sock, shutdown = bind("127.0.0.1", 0), Shutdown()

    async def drain() -> None:
        instance.lifecycle.end()
        await shutdown.wait_for(instance.lifecycle.idle(), PATIENCE)

    handler = handler_of(instance, cluster_secret(), sock, tracer=tracer)
    serving = asyncio.create_task(serve_http(handler, sock, shutdown, drain, MAX_BODY_BYTES))
    made = Node(instance, engine, parts.link, url_of(sock), shutdown)
    try:
        yield made
        await made.settled()
    finally:
        shutdown.request()
        shutdown.request()
        await serving
        await instance.stop()
        await instance.close()
        await client.close()


@asynccontextmanager
async def pair(
    model: Path, caching: Caching = "full", **options: Any
) -> AsyncIterator[tuple[Node, Node]]:
    """A prefill and a decode instance."""
    async with (
        node(model, Role.PREFILL, caching, **options) as p,
        node(model, Role.DECODE, caching) as d,
    ):
        yield p, d
