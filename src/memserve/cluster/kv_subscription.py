"""The subscription to one instance's KV events: receives batches, and recovers missing ones."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import msgspec
import zmq
import zmq.asyncio

from memserve.api.kv_events import (
    BEAT_SECONDS,
    END_OF_REPLAY,
    MAX_BATCH_BYTES,
    SEQUENCE_BYTES,
    BlockTokens,
    KVSnapshot,
    MalformedEvents,
    TcpEndpoint,
    Topic,
    decode_frames,
)
from memserve.api.peer_client import PeerClient, PeerError, decoded
from memserve.clock import Clock
from memserve.errors import ConfigError
from memserve.logs import shown
from memserve.scheduler.event_stream import EventCounts, EventStream
from memserve.scheduler.prompt_tree import PromptTree
from memserve.transfer.secret import ClusterKeys
from memserve.types import Epoch, InstanceId, Role
from memserve.vital import Vitals

log = logging.getLogger(__name__)

# Longest time that applying events holds the event loop, which also serves clients.
SLICE_SECONDS = 0.002
# Pauses between attempts to recover. The first is less than the instance's beat, so that one beat
# finds one gap; the last is a few polls of the membership, which finds out if the instance is gone.
BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 5.0
# A replay fails without a batch for this time; an instance answers between two batches.
REPLAY_SECONDS = 2.0
# A large cache's snapshot takes a second to make, and seconds to send over a slow network.
SNAPSHOT_SECONDS = 60.0
MOST_FAILURES = 5  # snapshots of a vLLM server that are tried before it is followed without one
MAX_SNAPSHOT_BYTES = 1024 * 1024 * 1024  # 2^24 blocks, with 16 tokens each
RECEIVE_HIGH_WATER = 100_000  # batches
HEARTBEAT_MS = int(2000 * BEAT_SECONDS)  # ZMQ reconnects if heartbeats are not answered

Context = zmq.asyncio.Context
_Place = tuple[TcpEndpoint, Topic, BlockTokens]
_snapshots = msgspec.msgpack.Decoder(KVSnapshot)


@dataclass(frozen=True, slots=True)
class EventSource:
    """Endpoints of one life of an instance for KV events, and for recovery of missed ones.

    Instances of memserve have a snapshot. Without one (another's server), a gap is closed by a
    replay if there is an endpoint for it; if batches remain missing, the tree forgets the
    instance's blocks and goes on with the batches that follow.
    """

    instance: InstanceId
    endpoint: str  # of the PUB socket
    block_tokens: int
    topic: str = ""
    replay_endpoint: str | None = None
    snapshot_url: str | None = None
    references: bool = False  # blocks are named by packed references; else by hashes
    epoch: Epoch | None = None  # that a snapshot must have
    role: Role = Role.COLOCATED
    secured: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError for an invalid endpoint, topic or block size."""
        try:
            msgspec.convert((self.endpoint, self.topic, self.block_tokens), _Place)
            msgspec.convert(self.replay_endpoint, TcpEndpoint | None)
        except msgspec.ValidationError as error:
            raise ConfigError(f"KV events of {shown(self.instance)}: {error}") from error


class Subscription:
    """Applies one instance's KV events to the prompt tree until it is closed. Belongs to the event
    loop."""

    def __init__(
        self,
        source: EventSource,
        tree: PromptTree,
        peers: PeerClient,
        context: Context,
        keys: ClusterKeys,
        clock: Clock,
        counts: EventCounts,
        restoring: asyncio.Semaphore,
        vitals: Vitals | None = None,
    ) -> None:
        """`restoring`: held while a snapshot is fetched and applied. `vitals`: counts unexpected
        exceptions, after which the subscription begins anew."""
        self._vitals = vitals or Vitals()
        self._source = source
        self._topic = source.topic.encode()
        self._tree = tree
        self._peers = peers
        self._context = context
        self._keys = keys if source.secured else None
        self._clock = clock
        self._turn = 0.0  # when this task last let others run
        self.heard = clock.now()
        self.counts = counts
        self._restoring = restoring
        self._native = source.snapshot_url is not None
        tree.join(source.instance, source.block_tokens, source.role, references=source.references)
        self.stream = self._new_stream()
        self._recovery: asyncio.Task[None] | None = None
        self._receiving = self._vitals.errand("KV events", self._keep_receiving())

    def close(self) -> None:
        """Apply no more events to the tree. The caller removes the instance from it."""
        self.stream.close()
        self._receiving.cancel()
        if self._recovery is not None:
            self._recovery.cancel()

    async def closed(self) -> None:
        """Return when the sockets are closed, after `close`."""
        tasks = [task for task in (self._receiving, self._recovery) if task is not None]
        await asyncio.wait(tasks)

    @property
    def synchronised(self) -> bool:
        """Whether the tree has all batches that are known of."""
        return not self.stream.gap and (self._recovery is None or self._recovery.done())

    # --- receiving ------------------------------------------------------------------------

    async def _keep_receiving(self) -> None:
        pause = BACKOFF_SECONDS
        while True:
            began = self._clock.now()
            try:
                await self._receive()
            except Exception as error:  # noqa: BLE001 - the tree must be kept up to date
                self._vitals.survive("a subscription to KV events", error)
            if self._clock.now() - began > MAX_BACKOFF_SECONDS:
                pause = BACKOFF_SECONDS
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_BACKOFF_SECONDS)
            self._begin_anew()  # the failed batch may be applied in part

    def _begin_anew(self) -> None:
        """Remove all blocks of the instance from the tree, and begin another stream."""
        self.stream.close()
        self._tree.cleared(self._source.instance)
        self.counts.resets += 1
        self.stream = self._new_stream()

    async def _receive(self) -> None:
        with self._socket(zmq.SUB) as socket:
            socket.rcvhwm = RECEIVE_HIGH_WATER
            socket.subscribe(self._topic)
            socket.connect(self._source.endpoint)
            self._recover_in_background()
            while True:
                self._offer(await socket.recv_multipart())
                if self.stream.gap:
                    self._recover_in_background()
                await self._yield_to_loop()

    def _offer(self, frames: list[bytes]) -> None:
        self.heard = self._clock.now()
        try:
            topic, sequence, batch = decode_frames(frames)
        except MalformedEvents as error:
            log.debug("%s: a batch of KV events is malformed: %s", self._source.instance, error)
            self.counts.malformed += 1
            return
        if self._native and topic != self._topic:  # ZMQ subscribes to all topics with this prefix
            self.counts.foreign += 1
            return
        if not self._native and self.stream.restarted(sequence, batch):
            log.info("%s counts its KV events anew: it was restarted", self._source.instance)
            self._begin_anew()
        self.stream.offer(sequence, batch)

    def _new_stream(self) -> EventStream:
        source = self._source
        # Publishers without snapshots number their batches from 0, their first event.
        start = None if self._native else -1
        return EventStream(self._tree, source.instance, source.block_tokens, self.counts, start)

    # --- recovering -----------------------------------------------------------------------

    def _recover_in_background(self) -> None:
        if self._recovery is None or self._recovery.done():
            self._recovery = self._vitals.errand("a recovery of KV events", self._recover())

    async def _recover(self) -> None:
        pause, failures = BACKOFF_SECONDS, 0
        while True:
            if self.stream.position is not None:
                await self._replay()
            if self._source.snapshot_url is None:
                if self.stream.gap:
                    self.stream.skip()
            elif self.stream.gap and not await self._restore(self._source.snapshot_url):
                failures += 1
                if failures >= MOST_FAILURES and not self._source.references:
                    if failures == MOST_FAILURES:
                        log.warning("%s gives no snapshot of its cache", self._source.instance)
                    self.stream.skip()  # as of a vLLM that has none
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_BACKOFF_SECONDS)
                continue
            if not self.stream.gap:
                return

    async def _restore(self, url: str) -> bool:
        """Restore the instance's blocks from a snapshot. Return False if that is impossible now."""
        async with self._restoring:
            return await self._fetch_and_restore(url)

    async def _fetch_and_restore(self, url: str) -> bool:
        try:
            body = await self._peers.call(
                "GET", url, bytes, seconds=SNAPSHOT_SECONDS, max_bytes=MAX_SNAPSHOT_BYTES
            )
            snapshot = await asyncio.to_thread(decoded, _snapshots.decode, body, url)
        except PeerError as error:
            log.debug("%s gives no snapshot: %s", self._source.instance, error)
            return False
        said = (snapshot.instance, snapshot.epoch, snapshot.block_tokens)
        if said != (self._source.instance, self._source.epoch, self._source.block_tokens):
            self.counts.foreign += 1
            return False  # another life or instance, which the membership will find out
        for _ in self.stream.restore(snapshot):
            await self._yield_to_loop()
        return True

    async def _replay(self) -> None:
        """Request the missing batches. The publisher may not have all of them any more."""
        endpoint, position = self._source.replay_endpoint, self.stream.position
        if endpoint is None or position is None:
            return
        self.counts.replays += 1
        with self._socket(zmq.DEALER) as socket:
            socket.connect(endpoint)
            first = (position + 1).to_bytes(SEQUENCE_BYTES, "big")
            await socket.send_multipart((b"", first))
            try:
                while True:
                    async with asyncio.timeout(REPLAY_SECONDS):
                        frames = await socket.recv_multipart()
                    if len(frames) >= 2 and frames[-2] == END_OF_REPLAY:
                        return
                    self._offer(frames)
                    await self._yield_to_loop()
            except TimeoutError:
                log.debug("%s does not answer for replay", self._source.instance)

    async def _yield_to_loop(self) -> None:
        """Yield to the event loop if the last yield was more than SLICE_SECONDS ago."""
        now = self._clock.now()
        if now - self._turn > SLICE_SECONDS:
            await asyncio.sleep(0)
            self._turn = self._clock.now()

    def _socket(self, kind: int) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.maxmsgsize = MAX_BATCH_BYTES
        socket.reconnect_ivl = int(1000 * BACKOFF_SECONDS)
        socket.reconnect_ivl_max = int(1000 * MAX_BACKOFF_SECONDS / 2)
        socket.heartbeat_ivl = HEARTBEAT_MS
        socket.heartbeat_timeout = 2 * HEARTBEAT_MS
        socket.ipv6 = True
        if self._keys is not None:
            self._keys.secure_client(socket)
        return socket
