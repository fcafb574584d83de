"""MemPool with peers: the memory of one instance, and the way into that of others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
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
from memserve.transfer.base import Transport
from memserve.transfer.conversion import require_filled
from memserve.transfer.links import is_local
from memserve.transfer.messages import Prepare, to_wire_refs
from memserve.transfer.path import PathName
from memserve.transfer.peer_endpoint import PeerEndpoint
from memserve.transfer.pending import OpenTransfer, PeerStats, Transfer
from memserve.transfer.secret import cluster_keys
from memserve.transfer.sender import Outgoing
from memserve.transfer.service import Service
from memserve.transfer.session import DEADLINE, Actions, Round, rounds_of
from memserve.transfer.shared_pool import SharedPool
from memserve.transfer.shm import ShmTransport
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
        """`secret`: the cluster's; default: MEMSERVE_SECRET. Without one a pool can only be
        served on this host. `path`, `transports`: how bytes go; default: whatever works."""
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
        """Leave the peers, then give the memory back."""
        service, self._service = self._service, None
        if service is not None:
            service.close()
        super().close()

    # --- peers ----------------------------------------------------------------------------

    def serve(self, address: str, secret: str | None = None) -> str:
        """Become reachable at tcp://host:port, port 0 for any; returns the address. `secret`: for
        that of the constructor, which has the say once a peer is known.

        Raises ConfigError for an address beyond this host without a secret; TransferError.
        """
        if secret is not None and self._service is None:
            self._secret = secret
        service = self._started(address)
        return service.listen(address)

    def connect(self, instance: str, address: str) -> None:
        """Know a peer; again with another address: it has moved.

        Raises PeerLost where nobody answers; PeerRefused; LayoutMismatch.
        """
        if instance == self.owner.instance:
            raise TransferError(f"{instance!r} is this pool itself")
        self._started(address).connect(InstanceId(instance), address)

    def transport_to(self, instance: str) -> str:
        """The name of what blocks would be written to a connected peer by, after a round trip to
        it. Raises UnknownPeer, PeerLost; TransferError where there is no way."""
        service = self._require_service()
        # Nothing is allocated, but the peer has to answer.
        self.alloc_mem(0, Medium.HBM, instance)
        life = service.life(InstanceId(instance))
        if life.transport is None:
            raise TransferError(life.obstacle)
        return life.transport.name

    def threads(self) -> list[threading.Thread]:
        """That must not end before `close`: without them no peer can be talked to."""
        return [] if self._service is None else [self._service.thread]

    def peer_stats(self) -> PeerStats:
        service = self._service
        if service is None:
            return PeerStats()
        return service.ask(lambda endpoint, now: endpoint.stats())

    def on_failure(self, call: Callable[[BaseException], None]) -> None:
        """Have `call` called with the error that has ended the thread which talks to peers, if
        anything does; at once if it has. From that thread: it must not block. Nothing can be sent
        or received then; close the pool, and start another."""
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
        """Copy blocks `src` [n] into a peer's blocks `dst` [n], or into new ones of `medium`.

        Cached source blocks are pinned meanwhile; allocated ones must neither change nor be
        freed before the end. New blocks at the peer are this caller's to free; `dst` must have
        been allocated there. `by-request-agg` writes whole blocks, the others layer by layer.

        Raises UnknownPeer, StaleBlock, ForeignBlock, LengthMismatch; all else comes from
        `Transfer.result`.
        """
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
        """Make the KV of `tokens` [n * block_tokens] in `src` [n] reusable at a peer.

        Only blocks that the peer's index lacks are sent, and none is visible there before all
        are whole. Errors as of `transfer`.
        """
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
        """A transfer whose layers are written as they get ready, and that the caller commits.

        `tokens`: to insert. It is aborted after `idle_timeout` seconds without a write.
        """
        space = Namespace(namespace)
        return self._open(instance, src, dst, tokens, space, medium, idle_timeout, None)

    def claim(self, refs: ArrayLike) -> None:
        """Blocks that a peer allocated here become this caller's: they are no longer freed
        when the peer is gone. Raises StaleBlock if they were."""
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
        """As in `memserve.pool`; with `instance`, blocks of that peer, which come back to it
        when this pool closes or dies. Raises UnknownPeer, PeerLost."""
        if instance is None or instance == self.owner.instance:
            return super().alloc_mem(n, medium, private=private)
        if n < 0:
            raise LengthMismatch(f"{n} blocks asked")
        prepare = Prepare(next(self._numbers), n, medium)
        handle = self._begin(InstanceId(instance), prepare, _NONE, _NONE, DEADLINE, [])
        try:
            return handle.result(DEADLINE)
        except TimeoutError:
            handle.cancel()
            raise

    def free_mem(self, refs: ArrayLike) -> None:
        """As in `memserve.pool`; also blocks of one peer, allocated from here. Blocks that a
        peer is still writing to are free once it has stopped."""
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

    # --- inside ---------------------------------------------------------------------------

    def _started(self, address: str) -> Service:
        """The service; able to write to other hosts if `address` is on one."""
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
            # It protects no memory: who has its description may write anywhere in this pool. Only
            # peers that have the secret are told.
            service.ask(self._add_nixl)
        return service

    def _add_nixl(self, endpoint: PeerEndpoint, now: float) -> None:
        introductions = endpoint.introductions
        if not introductions.has_transport("nixl"):
            # Heavy, an extra, and of no use on one host.
            from memserve.transfer.nixl import NixlTransport

            introductions.add_transport(NixlTransport(self.owner, self.layout))

    def _require_service(self) -> Service:
        service = self._service
        if service is None:
            raise UnknownPeer(f"pool {self.owner.instance!r} is not connected to any other")
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
        """`rounds`: all that is to be written; None: the caller will say."""
        service = self._require_service()
        life = service.life(instance)
        if len(target) and (ref_owner(target) != intern_owner(*life.owner)).any():
            raise StaleBlock(f"not all of `dst` are blocks of the present life of {instance!r}")
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
            super().free_mem(refs)  # says what is wrong with them
            raise ForeignBlock("blocks of one instance at a time")
        try:
            owner = owner_of(number)
        except IndexError:
            super().free_mem(refs)
            raise
        freed: Future[None] = Future()

        def task(endpoint: PeerEndpoint, now: float) -> None:
            if endpoint.peers.current(owner.instance).owner != owner:
                raise StaleBlock(f"{owner.instance!r} has begun another life without them")
            message = endpoint.calls.begin(owner, to_wire_refs(refs), freed, now)
            endpoint.say(owner, message)

        self._service.ask(task)
        self._service.wait(freed)

    def _tell_memory(self) -> None:
        service = self._service
        if service is not None:
            service.ask(lambda endpoint, now: endpoint.introductions.refresh_memory())


def _make_shm(owner: Owner, layout: KVLayout) -> Sequence[Transport]:
    return [ShmTransport(layout)]
