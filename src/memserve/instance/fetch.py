"""Fetches of longer prefixes from other instances, and pushes for their fetches.

The instance that computes a prompt asks the one that has a longer prefix cached to push the KV.
A failed fetch costs about the time of computing the missing tokens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import msgspec

from memserve.api import msgpack
from memserve.api.errors import ApiError, invalid, unavailable
from memserve.api.generate import PrefillPeer
from memserve.api.handoff import PUSH_PATH, MeetCall, MeetResult, PushCall, PushResult
from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.status import MAX_MOVE_PEERS, EngineTotals, FetchTotals, InstanceInfo, PeerMoves
from memserve.clock import Clock
from memserve.errors import PoolError, TransferError
from memserve.instance.link import KVLink
from memserve.tracing.span import Span, SpanKind, headers_of, timed
from memserve.types import InstanceId, Namespace, RequestId, TokenArray


class KVMoves:
    """Counters of moved bytes of at most MAX_MOVE_PEERS peers. Used on one event loop."""

    def __init__(self) -> None:
        self._by_peer: dict[InstanceId, PeerMoves] = {}

    def received(self, peer: InstanceId, size: int) -> None:
        """Count `size` bytes received from `peer`."""
        if size and (moves := self._of(peer)) is not None:
            moves.received += size

    def returned(self, peer: InstanceId, size: int) -> None:
        """Count `size` bytes returned to `peer`."""
        if size and (moves := self._of(peer)) is not None:
            moves.returned += size

    def totals(self) -> dict[InstanceId, PeerMoves]:
        return {peer: copy(moves) for peer, moves in self._by_peer.items()}

    def _of(self, peer: InstanceId) -> PeerMoves | None:
        known = self._by_peer.get(peer)
        if known is None and len(self._by_peer) < MAX_MOVE_PEERS:
            known = self._by_peer[peer] = PeerMoves()
        return known


log = logging.getLogger(__name__)

# Limits of a fetch's timeout, which is the time to compute the same tokens at the engine's mean
# speed so far. The minimum lets two instances connect for the first time; the maximum bounds the
# wait for an instance that has stopped answering.
MIN_FETCH_SECONDS = 0.25
MAX_FETCH_SECONDS = 5.0
INFO_SECONDS = 2.0  # timeout of a peer's `/info`, equal to that of a gateway's poll

_results = msgspec.msgpack.Decoder(PushResult)
_info = msgspec.json.Decoder(InstanceInfo)


@dataclass(frozen=True, slots=True)
class Fetched:
    """Result of a fetch: blocks received, and its duration."""

    blocks: int = 0
    seconds: float = 0.0


class Fetcher:
    """Fetches prefixes, and answers peers' push and meet calls. Used on one event loop."""

    def __init__(
        self, peers: PeerClient, link: KVLink, pace: Callable[[], EngineTotals], clock: Clock
    ) -> None:
        """`pace` returns the engine's totals."""
        self._peers = peers
        self._link = link
        self._pace = pace
        self._clock = clock
        self._counters = FetchTotals(block_bytes=link.block_bytes)
        self.moves = KVMoves()  # also counts hand-overs

    def totals(self) -> FetchTotals:
        """Counters since start, in blocks and bytes."""
        return copy(self._counters)

    async def fetch(
        self,
        peer: PrefillPeer | None,
        request: RequestId,
        tokens: TokenArray,
        source: Namespace,
        target: Namespace,
        trace: Span | None = None,
    ) -> Fetched:
        """Ask `peer` to push the KV of `tokens` from its namespace `source` into `target` here.

        The peer is not asked if all whole blocks of `tokens` without the last token are cached
        here, or if caching is off. Errors are logged, not raised. `trace`: the span of the call
        that needs the KV, if it is traced.
        """
        if peer is None or peer.id == self._link.address.id or self._link.caching == "off":
            return Fetched()
        size = self._link.block_tokens
        useful = (len(tokens) - 1) // size * size
        try:
            async with asyncio.timeout(MAX_FETCH_SECONDS):
                missing = useful - await self._link.cached(tokens[:useful], target)
        except (TransferError, TimeoutError) as error:
            log.warning("%s: no prefix is fetched: %s", request, error or "the pool did not answer")
            return Fetched()
        if missing <= 0:
            return Fetched()
        call = PushCall(tokens[:useful], source, self._link.address, target)
        counters, started = self._counters, self._clock.now()
        counters.asked += 1
        blocks = 0
        try:
            with timed(trace, "fetch", SpanKind.CLIENT, {"memserve.instance": peer.id}) as span:
                async with asyncio.timeout(self._timeout(missing)):
                    blocks = (await self._ask(peer, call, span)).blocks_sent
                if span is not None:
                    span.attributes["memserve.blocks.received"] = blocks
        except (PeerError, TimeoutError) as error:
            counters.failed += 1
            log.warning("%s: no prefix from %s: %s", request, peer.id, error or "timed out")
        finally:
            seconds = self._clock.now() - started
            counters.seconds += seconds
        counters.blocks_received += blocks
        self.moves.received(peer.id, blocks * self._link.block_bytes)
        log.info("%s: %d blocks fetched from %s in %.4f s", request, blocks, peer.id, seconds)
        return Fetched(blocks, seconds)

    async def push(self, call: PushCall) -> PushResult:
        """Push cached KV to the instance that asks for it. Raises ApiError if that fails."""
        if call.target.id == self._link.address.id:
            raise invalid("an instance does not push to itself", "target")
        try:
            pushed = await self._link.push(
                call.target, call.tokens, call.namespace, call.target_namespace
            )
        except (TransferError, PoolError) as error:
            self._counters.pushes_failed += 1
            raise _not_pushed(call, error) from error
        self._counters.pushes += 1
        self._counters.blocks_pushed += pushed.sent
        return PushResult(pushed.sent, pushed.already_present)

    async def meet(self, call: MeetCall) -> MeetResult:
        """Ask a peer for its pool's address, and make a round trip from this pool to it. Raises
        ApiError with the reason if that fails."""
        peer = call.peer
        if peer.id == self._link.address.id:
            raise invalid("an instance does not meet itself", "peer")
        try:
            info = await self._peers.call(
                "GET", f"{peer.address}/info", _info.decode, seconds=INFO_SECONDS
            )
        except PeerError as error:
            raise _not_met(peer, f"{peer.address} gave no answer: {error}") from error
        if info.id != peer.id:
            raise _not_met(peer, f"{peer.address} is the address of {info.id}")
        if info.pool_peer is None or info.kv is None:
            raise _not_met(peer, "the peer has no pool that others can reach")
        if info.kv != self._link.kv:
            raise _not_met(peer, "the peer holds other KV (another engine, model or layout)")
        started = self._clock.now()
        try:
            transport = await self._link.transport(info.pool_peer)
        except (TransferError, PoolError) as error:
            raise _not_met(peer, f"its pool at {info.pool_peer.address}: {error}") from error
        return MeetResult(transport, self._clock.now() - started)

    def _timeout(self, tokens: int) -> float:
        """Return the timeout in seconds of a fetch of `tokens` tokens: the time to compute them,
        between MIN_FETCH_SECONDS and MAX_FETCH_SECONDS."""
        stats = self._pace()
        if not stats.computed_prompt_tokens:
            return MAX_FETCH_SECONDS
        computing = tokens * stats.busy_seconds / stats.computed_prompt_tokens
        return min(max(computing, MIN_FETCH_SECONDS), MAX_FETCH_SECONDS)

    async def _ask(self, peer: PrefillPeer, call: PushCall, span: Span | None) -> PushResult:
        return await self._peers.call(
            "POST",
            peer.address + PUSH_PATH,
            _results.decode,
            msgpack.encode(call),
            media=msgpack.MEDIA,
            headers=headers_of(span),
        )


def _not_pushed(call: PushCall, error: Exception) -> ApiError:
    return unavailable(f"KV did not reach {call.target.id}: {error}", "not_pushed")


def _not_met(peer: PrefillPeer, why: str) -> ApiError:
    return unavailable(f"No way to {peer.id}: {why}", "not_met")
