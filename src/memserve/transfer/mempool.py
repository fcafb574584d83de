"""`MemPool`: one instance's KV blocks and index, with transfers to the pools of peers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from importlib.util import find_spec
from itertools import count

import numpy as np
import torch
from numpy.typing import ArrayLike

from memserve.clock import Clock, MonotonicClock
from memserve.config import Eviction as EvictionName
from memserve.config import TransferMode
from memserve.errors import (
    ForeignBlock,
    LengthMismatch,
    StaleBlock,
    TransferError,
    UnknownPeer,
)
from memserve.pool.blocks import as_refs
from memserve.pool.eviction import Eviction
from memserve.pool.layout import KVLayout
from memserve.tokens import as_tokens, to_wire
from memserve.transfer.base import Transport, TransportCounters
from memserve.transfer.conversion import require_filled
from memserve.transfer.handles import OpenTransfer, PeerStats, Transfer
from memserve.transfer.messages import Prepare, to_wire_refs
from memserve.transfer.peer_endpoint import PeerEndpoint
from memserve.transfer.regions import PathName
from memserve.transfer.secret import cluster_keys
from memserve.transfer.sender import Outgoing
from memserve.transfer.service import Service
from memserve.transfer.session import DEADLINE, LEASE, Actions, Round, rounds_of
from memserve.transfer.shared_pool import SharedPool
from memserve.transfer.shm import ShmTransport
from memserve.transfer.sockets import is_local
from memserve.transfer.source_session import SourceSession
from memserve.transfer.wire import require_sendable
from memserve.types import (
    SHARED,
    InstanceId,
    Medium,
    Namespace,
    Owner,
    RefArray,
    intern_owner,
    owner_of,
    ref_owner,
)

_NONE: RefArray = np.empty(0, dtype=np.int64)

MakeTransports = Callable[[Owner, KVLayout], Sequence[Transport]]


class MemPool(SharedPool):
    """Fixed-size KV blocks, their index, and transfers to the pools of other instances."""

    def __init__(
        self,
        layout: KVLayout,
        hbm_blocks: int,
        dram_blocks: int = 0,
        instance: str = "p0",
        device: str | torch.device = "cpu",
        eviction: EvictionName | Eviction = "lru",
        clock: Clock | None = None,
        dram_segment_blocks: int | None = None,
        epoch: int | None = None,
        *,
        secret: str | None = None,
        path: PathName = "auto",
        transports: MakeTransports | None = None,
    ) -> None:
        """`secret`: default MEMSERVE_SECRET; without one, `serve` takes only loopback addresses.
        `path`: forces a transport. `transports`: makes them; default: shm, and nixl if needed."""
        self._service: Service | None = None
        self._failed: Future[BaseException] = Future()
        self._secret = secret
        self._path = path
        self._make_transports = transports
        self._transfer_clock = clock or MonotonicClock()
        self._numbers = count(1)
        super().__init__(
            layout,
            hbm_blocks,
            dram_blocks,
            instance,
            device,
            eviction,
            clock,
            dram_segment_blocks,
            epoch,
        )

    def close(self) -> None:
        """Stop talking to peers, then free the memory."""
        service, self._service = self._service, None
        if service is not None:
            service.close()
        super().close()

    # --- peers ----------------------------------------------------------------------------

    def serve(self, address: str, secret: str | None = None) -> str:
        """Listen on tcp://host:port (0: any free port); return the address. `secret` replaces the
        constructor's, unless `serve` or `connect` was called before. Raises ConfigError without a
        secret for an address that other hosts can reach; TransferError."""
        if secret is not None and self._service is None:
            self._secret = secret
        service = self._started(address)
        return service.listen(address)

    def connect(self, instance: str, address: str) -> None:
        """Connect, or reconnect, to a peer. Raises PeerLost, PeerRefused, LayoutMismatch."""
        if instance == self.owner.instance:
            raise TransferError(f"{instance!r} is this pool itself")
        self._started(address).connect(InstanceId(instance), address)

    def transport_to(self, instance: str, *, ask: bool = True) -> str:
        """Return the name of the transport to a connected peer; with `ask`, after a round trip.
        Raises UnknownPeer; PeerLost; TransferError if no transport reaches the peer."""
        service = self._require_service()
        if ask:
            self.alloc_mem(0, Medium.HBM, instance)  # a round trip: 0 blocks are allocated
        life = service.life(InstanceId(instance))
        if life.transport is None:
            raise TransferError(life.obstacle)
        return life.transport.name

    def vouch(self) -> None:
        """Declare that this process serves calls now. Peers are told that the process is stalled
        when the next call of `vouch` does not come within a LEASE, and again when it comes."""
        now, last = self._transfer_clock.now(), self.vouched
        self.vouched = now
        service = self._service
        if service is not None and last is not None and now - last >= LEASE:
            with suppress(TransferError):  # the pool's owner watches the transfer thread
                service.submit(PeerEndpoint.tell_all)

    def hears(self, instance: str) -> bool:
        """Return whether a peer is connected, was heard within a LEASE, and is not stalled. Does
        not wait for other threads."""
        return self.heard_life(instance) is not None

    def heard_life(self, instance: str) -> Owner | None:
        """Return the life of a peer for which `hears` is true; None for other peers."""
        service = self._service
        return None if service is None else service.heard_life(InstanceId(instance))

    def threads(self) -> list[threading.Thread]:
        """Return the threads that must run until `close`; transfers need them."""
        return [] if self._service is None else [self._service.thread]

    @property
    def quarantined_blocks(self) -> int:
        """`PeerStats.quarantined`, without asking the transfer thread."""
        service = self._service
        return 0 if service is None else service.quarantined_blocks + self.freed_by_owner

    def link_counters(self) -> dict[str, TransportCounters]:
        """Return the counters of each transport, by name, without asking the transfer thread, which
        changes them."""
        service = self._service
        return {} if service is None else service.link_counters()

    def peer_stats(self) -> PeerStats:
        service = self._service
        if service is None:
            return PeerStats()
        return service.ask(lambda endpoint, now: endpoint.stats())

    def on_failure(self, call: Callable[[BaseException], None]) -> None:
        """Register `call` for the error that ends the transfer thread. `call` runs on that thread,
        or at once after its end, and must not block. The pool then transfers nothing: close it."""
        self._failed.add_done_callback(lambda failed: call(failed.result()))

    # --- transfers ------------------------------------------------------------------------

    def transfer(
        self,
        instance: str,
        src: ArrayLike,
        dst: ArrayLike | None = None,
        *,
        mode: TransferMode = "by-request-agg",
        medium: Medium = Medium.HBM,
    ) -> Transfer:
        """Copy blocks `src` [n] into a peer's allocated blocks `dst` [n]; default: new blocks of
        `medium`, which the caller owns. Cached `src` is pinned; the caller must not change or free
        allocated `src` before the end. `by-request-agg` writes whole blocks, other modes by layer.
        Raises UnknownPeer, StaleBlock, ForeignBlock, NotOwned, LengthMismatch, LayoutMismatch;
        `Transfer.result` raises all later errors."""
        return self._open(instance, src, dst, None, SHARED, medium, DEADLINE, mode)

    def transfer_with_insert(
        self,
        instance: str,
        tokens: ArrayLike,
        src: ArrayLike,
        dst: ArrayLike | None = None,
        *,
        namespace: str = SHARED,
        mode: TransferMode = "by-request-agg",
        medium: Medium = Medium.HBM,
    ) -> Transfer:
        """Copy the KV of `tokens` [n * block_tokens] in `src` [n] into a peer's index. Sends blocks
        that the index lacks; the peer inserts them when all are written. Raises as `transfer`."""
        space = Namespace(namespace)
        return self._open(instance, src, dst, tokens, space, medium, DEADLINE, mode)

    def open_transfer(
        self,
        instance: str,
        src: ArrayLike,
        dst: ArrayLike | None = None,
        *,
        tokens: ArrayLike | None = None,
        namespace: str = SHARED,
        medium: Medium = Medium.HBM,
        idle_timeout: float = DEADLINE,
    ) -> OpenTransfer:
        """Return a transfer that the caller writes part by part and commits. `tokens`: to insert.
        Aborts after `idle_timeout` seconds without progress. Raises as `transfer`."""
        space = Namespace(namespace)
        return self._open(instance, src, dst, tokens, space, medium, idle_timeout, None)

    def claim(self, refs: ArrayLike) -> None:
        """Take over blocks that a peer allocated here: the pool no longer frees them when the
        peer is gone. Raises StaleBlock if they were freed already."""
        given = as_refs(refs)
        self._require_service().ask(lambda endpoint, now: endpoint.receiver.claim(given))
        self.require_live(given)

    # --- memory: what peers change about it -----------------------------------------------

    def alloc_mem(
        self,
        n: int,
        medium: Medium = Medium.HBM,
        instance: str | None = None,
        *,
        private: bool = False,
    ) -> RefArray:
        """As in `memserve.pool`; with `instance`, blocks of that peer, which the peer takes back
        when this pool closes or dies. Also raises UnknownPeer, PeerLost."""
        if instance is None or instance == self.owner.instance:
            return super().alloc_mem(n, medium, private=private)
        if n < 0:
            raise LengthMismatch(f"cannot allocate {n} blocks")
        prepare = Prepare(next(self._numbers), n, medium)
        handle = self._begin(InstanceId(instance), prepare, _NONE, _NONE, DEADLINE, [])
        try:
            return handle.result(DEADLINE)
        except TimeoutError:
            handle.cancel()
            raise

    def free_mem(self, refs: ArrayLike) -> None:
        """As in `memserve.pool`; or blocks of one peer that this pool allocated there. Blocks that
        a peer is writing become free when it stops."""
        given = as_refs(refs)
        if len(given) and (ref_owner(given) != intern_owner(*self.owner)).any():
            self._free_at_peer(given)
        else:
            super().free_mem(given)

    def grow_dram(self, blocks: int) -> None:
        super().grow_dram(blocks)
        self._tell_memory()

    def shrink_dram(self, blocks: int) -> int:
        gone = super().shrink_dram(blocks)
        self._tell_memory()
        return gone

    def _started(self, address: str) -> Service:
        """Return the service, started if needed; adds NIXL for an `address` on another host."""
        with self._lock:
            self._require_open()
            if self._service is None:
                make = self._make_transports or _make_shm
                transports = list(make(self.owner, self.layout))
                self._service = Service(
                    self,
                    transports,
                    self._path,
                    cluster_keys(self._secret),
                    self._transfer_clock,
                    self._failed.set_result,
                )
            service = self._service
        wanted = self._path == "nixl" or (not is_local(address) and self._path == "auto")
        if wanted and self._make_transports is None and find_spec("nixl") is not None:
            # NIXL does not protect memory: any process with its description can write anywhere in
            # this pool. Only peers with the secret get the description.
            service.ask(self._add_nixl)
        return service

    def _add_nixl(self, endpoint: PeerEndpoint, now: float) -> None:
        handshakes = endpoint.handshakes
        if not handshakes.has_transport("nixl"):
            from memserve.transfer.nixl import NixlTransport

            handshakes.add_transport(NixlTransport(self.owner, self.layout))

    def _require_service(self) -> Service:
        service = self._service
        if service is None:
            raise UnknownPeer(f"pool {self.owner.instance!r} is not connected to any peer")
        return service

    def _open(
        self,
        instance: str,
        src: ArrayLike,
        dst: ArrayLike | None,
        tokens: ArrayLike | None,
        namespace: Namespace,
        medium: Medium,
        idle_timeout: float,
        mode: TransferMode | None,
    ) -> OpenTransfer:
        source = as_refs(src)
        target = None if dst is None else as_refs(dst)
        if target is not None and len(target) != len(source):
            raise LengthMismatch(f"{len(source)} source blocks for {len(target)} target blocks")
        wire_tokens = None
        if tokens is not None:
            array = as_tokens(tokens)
            if len(array) != len(source) * self.layout.block_tokens:
                raise LengthMismatch(
                    f"{len(source)} blocks of {self.layout.block_tokens} tokens "
                    f"for {len(array)} tokens"
                )
            wire_tokens = to_wire(array)
        require_sendable(namespace, 0 if wire_tokens is None else len(wire_tokens))
        wire_refs = None if target is None else to_wire_refs(target)
        prepare = Prepare(
            next(self._numbers), len(source), medium, namespace, wire_tokens, wire_refs
        )
        rounds = None if mode is None else rounds_of(len(source), self.layout.layers, mode)
        return self._begin(
            InstanceId(instance),
            prepare,
            source,
            _NONE if target is None else target,
            idle_timeout,
            rounds,
        )

    def _begin(
        self,
        instance: InstanceId,
        prepare: Prepare,
        source: RefArray,
        target: RefArray,
        idle_timeout: float,
        rounds: Sequence[Round] | None,
    ) -> OpenTransfer:
        """Start a transfer of `rounds`; None: the caller writes and commits through the handle."""
        service = self._require_service()
        life = service.life(instance)
        if len(target) and (ref_owner(target) != intern_owner(*life.owner)).any():
            raise StaleBlock(f"some of `dst` are not blocks of the current life of {instance!r}")
        if len(source) and (prepare.tokens is not None or prepare.target is None):
            require_filled(self.layout, life.memory.layout, "a transfer of whole blocks")
        session = SourceSession(prepare, service.lease(life.owner), idle_timeout)
        pins = self.pin_source(source)

        def act(step: Callable[[float], Actions]) -> None:
            service.submit(lambda endpoint, now: endpoint.act(outgoing, step(now), now))

        handle = OpenTransfer(
            instance,
            target,
            cancel=lambda: None if handle.done else act(session.cancel),
            write=lambda round: act(lambda now: session.write(round, now)),
            seal=lambda: act(session.seal),
            blocks=len(source),
        )
        outgoing = Outgoing(session, life.owner, handle, source, pins)

        def begin(endpoint: PeerEndpoint, now: float) -> None:
            for round in rounds or ():
                session.write(round, now)
            if rounds is not None:
                session.seal(now)
            endpoint.begin(outgoing, now)

        try:
            service.run(begin)
        except BaseException:
            if pins is not None:
                pins.release()
            raise
        return handle

    def _free_at_peer(self, refs: RefArray) -> None:
        number = int(ref_owner(refs)[0])
        if self._service is None or (ref_owner(refs) != number).any():
            super().free_mem(refs)  # raises the precise error
            raise ForeignBlock("one call frees blocks of one instance only")
        try:
            owner = owner_of(number)
        except IndexError:
            super().free_mem(refs)
            raise
        freed: Future[None] = Future()

        def task(endpoint: PeerEndpoint, now: float) -> None:
            if endpoint.peers.current(owner.instance).owner != owner:
                raise StaleBlock(f"{owner.instance!r} has restarted without these blocks")
            message = endpoint.frees.begin(owner, to_wire_refs(refs), freed, now)
            endpoint.say(owner, message)

        self._service.ask(task)
        self._service.wait(freed)

    def _tell_memory(self) -> None:
        service = self._service
        if service is not None:
            service.ask(lambda endpoint, now: endpoint.handshakes.refresh_memory())


def _make_shm(owner: Owner, layout: KVLayout) -> Sequence[Transport]:
    return [ShmTransport(layout)]
