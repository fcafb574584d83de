"""A process that stands in for many members: each has its own port, id, life and KV events.

Requests are signed and answered as by instances, events are on CURVE sockets; nothing computes.
All members share one PUB socket, on which each has its topic: a gateway connects to it once for
each member, as it does to sockets of their own.

`python -m evaluation.scale.members MEMBERS`, as JSON, prints the number of members, as one line.
Each line of standard input is then one `Task`; one with batches is answered by a line with a
`Done`. The end of standard input ends the process.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial

import msgspec
import uvloop
import zmq

from evaluation.scale.blocks import BLOCK_TOKENS, PROMPT_BLOCKS, VOCABULARY, Blocks
from memserve.api.audience import Audience
from memserve.api.handoff import PREFILL_PATH
from memserve.api.histogram import Histogram
from memserve.api.kv_events import (
    BEAT_SECONDS,
    END_OF_REPLAY,
    SEQUENCE_BYTES,
    SNAPSHOT_PATH,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    KVEventsInfo,
    KVSnapshot,
    topic_of,
)
from memserve.api.peer_client import PeerClient
from memserve.api.request_stats import RequestStats
from memserve.api.serving import allow_files, bind, url_of
from memserve.api.signatures import Signer, Verifier
from memserve.api.status import (
    REPORT_PATH,
    EngineTotals,
    InstanceReport,
    InstanceState,
    InstanceStats,
    Latencies,
    Limits,
    MediumTotals,
    PoolTotals,
)
from memserve.bench.gateway_process import MODEL, Backend
from memserve.gateway.instance_costs import PROFILE_PATH
from memserve.instance.join import Registration
from memserve.scheduler.hardware import cost_model
from memserve.scheduler.profiles import Hardware, Subject, encode_profile, make_profile
from memserve.secrets import cluster_secret
from memserve.transfer.secret import ClusterKeys, cluster_keys
from memserve.types import Epoch, InstanceId, Role, new_epoch

MODULE = "evaluation.scale.members"
_CALL_BYTES = 64 * 1024
_HIGH_WATER = 100_000  # batches queued for a gateway, as it accepts itself
_KV = "0" * 64  # all members' fingerprint
_FILES = 40_000
_JOIN_SECONDS = 2.0  # in which all members join: the interval in which they repeat it
Event = BlockStored | BlockRemoved | AllBlocksCleared
_encode = msgspec.json.Encoder().encode
_pack = msgspec.msgpack.Encoder().encode


class Members(msgspec.Struct, frozen=True):
    """How many members there are, and what they have cached."""

    count: int
    held_blocks: int  # of each
    pairs: bool = True  # one half prefills and one decodes; without: colocated


class Task(msgspec.Struct, frozen=True):
    """A gateway to join, as instances do, or batches to publish: each has one prompt of one of the
    members in turn, and what that takes the place of."""

    join: str | None = None
    batches: int = 0
    seconds: float = 0.0  # over which the batches are spread evenly


class Done(msgspec.Struct, frozen=True):
    """What was published."""

    batches: int
    blocks: int  # stored; as many were removed
    seconds: float  # that it took


class _Proof(msgspec.Struct):
    """The part of a call that tells a proof of a hand-over from a client's request."""

    stream: bool = False


class _Usage(msgspec.Struct):
    memserve: RequestStats


class _Answer(msgspec.Struct):
    usage: _Usage


_MOVED = _Answer(_Usage(RequestStats(0, 0, 0, 1, 1, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)))
_proofs = msgspec.msgpack.Decoder(_Proof)


class Member:
    """One member: what it says of itself, and its cached blocks."""

    def __init__(self, number: int, members: Members, events: tuple[str, str]) -> None:
        """`events`: endpoints of live and replayed events."""
        self.epoch: Epoch = new_epoch()
        role = (Role.PREFILL, Role.DECODE)[number % 2] if members.pairs else Role.COLOCATED
        self.id = InstanceId(f"{role}-{number}")
        self.blocks = Blocks(self.epoch, members.held_blocks)
        self.topic = topic_of(self.id, self.epoch).encode()
        self.sequence = 0  # of the next batch
        kv_events = KVEventsInfo(*events, self.topic.decode(), BLOCK_TOKENS, secured=True)
        limits = Limits(VOCABULARY, 8192, 1 << 20, 8192, BLOCK_TOKENS, "bfloat16", "cuda", 1)
        identity = self.id, self.epoch, role, InstanceState.READY, os.getpid(), MODEL
        stats = _stats(members.held_blocks)
        self._stats = _encode(stats)  # for gateways of earlier versions
        self._report = _encode(
            InstanceReport(*identity, limits, kv_events, pool=True, kv=_KV, stats=stats)
        )
        self.lock = threading.Lock()  # of blocks and sequence

    def describe(self, url: bytes, body: bytes) -> bytes | None:
        if url in (b"/info", REPORT_PATH.encode()):
            return self._report
        if url == b"/stats":
            return self._stats
        if url == PROFILE_PATH.encode():
            return _PROFILE
        if url == SNAPSHOT_PATH.encode():
            return self._snapshot()
        if url == PREFILL_PATH.encode() or not _proofs.decode(body).stream:
            return _encode(_MOVED)
        return None

    def _snapshot(self) -> bytes:
        with self.lock:
            blocks, sequence = self.blocks.snapshot(), self.sequence - 1
        return _pack(KVSnapshot(self.id, self.epoch, sequence, BLOCK_TOKENS, blocks))


def _profile() -> bytes:
    costs = cost_model("h800", "llama2-13b", tp=2)
    hardware = Hardware(device="h800", threads=1, software="none")
    subject = Subject(
        hardware=hardware,
        architecture=costs.architecture,
        dtype="bfloat16",
        max_batch_tokens=2048,
    )
    return encode_profile(make_profile("default", subject, costs))


_PROFILE = _profile()


def _stats(held_blocks: int) -> InstanceStats:
    """Figures of an instance that has served for a while."""
    engine = EngineTotals(8, 0, 10**6, 10**8, 10**8, 10**7, 0, 10**5, 0, 10**4)
    hbm = MediumTotals(2 * held_blocks, held_blocks, 0, held_blocks)
    pool = PoolTotals(hbm, hbm, 1, held_blocks)
    latencies = Latencies()
    for field in msgspec.structs.fields(Latencies):
        observed = getattr(latencies, field.name)
        if isinstance(observed, Histogram):
            for power in range(-9, 4):
                observed.observe(2.0**power, 1000)
    return InstanceStats(engine, pool, latencies)


class Publisher(threading.Thread):
    """The thread that publishes all members' events, and an empty batch of each that is idle."""

    def __init__(self, keys: ClusterKeys) -> None:
        super().__init__(name="events", daemon=True)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
        self._keys = keys
        self._gate = keys.open_gate(self._context)
        self._publisher, live = self._bound(zmq.PUB)
        self._replay, replayed = self._bound(zmq.ROUTER)
        self.endpoints = live, replayed
        self.members: Sequence[Member] = ()
        self._tasks: list[Task] = []
        self._began = time.monotonic()
        self._beats = 0

    def publish(self, task: Task) -> None:
        """Publish a task's batches, and print what was done."""
        self._tasks.append(task)

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._gate, zmq.POLLIN)
        poller.register(self._replay, zmq.POLLIN)
        while True:
            if self._tasks:
                self._work(self._tasks.pop(0), poller)
            self._answer(poller, 5)
            self._beat()

    def _work(self, task: Task, poller: zmq.Poller) -> None:
        started = time.monotonic()
        for number in range(task.batches):
            at = started + task.seconds * number / task.batches
            while (rest := at - time.monotonic()) > 0:
                self._answer(poller, min(int(1000 * rest), 5))
                self._beat()
            self._send(self.members[number % len(self.members)], None)
        seconds = time.monotonic() - started
        blocks = PROMPT_BLOCKS * task.batches
        print(_encode(Done(task.batches, blocks, seconds)).decode(), flush=True)

    def _beat(self) -> None:
        """Send the empty batches that are due: of each member one in BEAT_SECONDS, in turn."""
        elapsed = time.monotonic() - self._began
        due = int(elapsed / BEAT_SECONDS * len(self.members))
        for number in range(self._beats, due):
            self._send(self.members[number % len(self.members)], [])
        self._beats = due

    def _send(self, member: Member, events: list[Event] | None) -> None:
        with member.lock:
            batch = EventBatch(time.time(), member.blocks.turn() if events is None else [], 0)
            number = member.sequence.to_bytes(SEQUENCE_BYTES, "big")
            member.sequence += 1
        self._publisher.send_multipart((member.topic, number, _pack(batch)))

    def _answer(self, poller: zmq.Poller, milliseconds: int) -> None:
        ready = dict(poller.poll(milliseconds))
        while ready:
            if self._gate in ready:
                self._keys.answer(self._gate)
            if self._replay in ready:  # nothing is kept: a snapshot is asked for
                client = self._replay.recv_multipart()[0]
                self._replay.send_multipart((client, b"", b"", END_OF_REPLAY, b""))
            ready = dict(poller.poll(0))

    def _bound(self, kind: int) -> tuple[zmq.Socket[bytes], str]:
        socket = self._context.socket(kind)
        socket.sndhwm = _HIGH_WATER
        socket.backlog = 4096
        self._keys.secure_server(socket)
        socket.bind("tcp://127.0.0.1:*")
        return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)


async def _serve(members: Members) -> None:
    allow_files(_FILES)
    loop = asyncio.get_running_loop()
    publisher = Publisher(cluster_keys())
    audience = Audience()
    verifier = Verifier(cluster_secret(), audience)
    known, urls, servers = [], [], []
    joining: list[asyncio.Task[None]] = []
    for number in range(members.count):
        member = Member(number, members, publisher.endpoints)
        sock = bind("127.0.0.1", 0)
        audience.add_socket(sock)
        make = partial(Backend, loop, 0.0, verifier, member.describe)
        servers.append(await loop.create_server(make, sock=sock))
        known.append(member)
        urls.append(url_of(sock))
    publisher.members = known
    publisher.start()
    print(len(urls), flush=True)
    async with PeerClient(Signer(cluster_secret())) as peers:
        while line := await asyncio.to_thread(sys.stdin.readline):
            task = msgspec.json.decode(line, type=Task)
            if task.join is None:
                publisher.publish(task)
                continue
            for member, url in zip(known, urls, strict=True):
                each = Registration(peers, (task.join,), url, member.id, member.epoch)
                joining.append(loop.create_task(each.run()))
                # Not all in one moment: no cluster starts like that.
                await asyncio.sleep(_JOIN_SECONDS / len(known))
        for task_ in joining:
            task_.cancel()


if __name__ == "__main__":
    uvloop.run(_serve(msgspec.json.decode(sys.argv[1], type=Members)))
