"""One gateway with many members: what it costs to start, to keep up with them, and to ask it."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from aiohttp import ClientSession

from evaluation.scale.members import MODULE, Done, Members, Task
from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.signatures import Signer
from memserve.api.status import InstanceState
from memserve.bench.gateway_process import MODULE as GATEWAY_MODULE
from memserve.bench.gateway_process import LoadConfig, LoadSeen
from memserve.cluster.client import FEEDS_PATH
from memserve.cluster.kv_feed import MemberFeed
from memserve.cluster.member import ClusterView
from memserve.errors import MemserveError
from memserve.models.resolve import Progress
from memserve.secrets import cluster_secret

_PROBE_SECONDS = 0.05  # between questions for `/health`: what a client's request waits at least
_LOOK_SECONDS = 0.5  # between looks at a gateway that starts
_SETTLE_SECONDS = 3.0  # for what follows the start, such as proofs of hand-overs
_ASK_SECONDS = 30.0
_MAX_BYTES = 1 << 30  # of an answer
_PROMPT_TOKENS, _CHUNKS, _STREAMS = 1000, 8, 4  # of the requests
_WARM_SECONDS = 0.5
_BENCHMARKS = str(Path(__file__).parents[2])  # where the stand-ins' module is
_TICK = 1 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")

_clusters = msgspec.json.Decoder(ClusterView)
_feeds = msgspec.json.Decoder(list[MemberFeed])
_encode = msgspec.json.Encoder().encode
T = TypeVar("T")


class ScaleLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What is done to one gateway."""

    held_blocks: int  # of each member
    seconds: float  # of each measurement
    batches: int  # of KV events per second
    ready_seconds: float  # until a gateway that does not come up is given up


class Answer(msgspec.Struct, frozen=True):
    """What an answer of a gateway costs."""

    num_bytes: int
    seconds: float  # until it is there
    cpu_seconds: float  # of the gateway


class GatewayFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway with so many members. None: not measured, since it did not come up."""

    gateway: str  # "now", or the checkout of another version
    members: int
    held_blocks: int  # of all members together
    most_ready: int  # members that were ready at the same time
    ready: float | None = None  # seconds from the first join until all members are ready
    synchronised: float | None = None  # seconds until it knows what all of them have cached
    start_cpu: float  # seconds of CPU until then
    resident_bytes: int
    descriptors: int
    idle_cpu: float | None = None  # cores, without requests and events
    health_p50: float | None = None  # seconds of an answer meanwhile
    health_p99: float | None = None
    metrics: Answer | None = None
    cluster: Answer | None = None
    list_seconds: float | None = None  # of the whole command `memserve cluster list`
    request_cpu: float | None = None  # seconds of CPU for each request
    event_cpu: float | None = None  # seconds of CPU for each batch: 16 blocks come, 16 go
    events_per_second: float | None = None  # batches that were published meanwhile
    lag: int | None = None  # batches that it had not applied at the end of that, of all members


class _Gateway:
    """A gateway's process, and what is asked of it."""

    def __init__(self, pid: int, url: str, peers: PeerClient, open_: ClientSession) -> None:
        """`peers`: signs; `open_`: does not, for what anybody may ask."""
        self.url = url
        self._open = open_
        self._proc = Path(f"/proc/{pid}")
        self._peers = peers

    def cpu(self) -> float:
        """Return the seconds of CPU so far, user and system."""
        fields = (self._proc / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) * _TICK

    def resident_bytes(self) -> int:
        return int((self._proc / "statm").read_text(encoding="ascii").split()[1]) * _PAGE

    def descriptors(self) -> int:
        return len(list((self._proc / "fd").iterdir()))

    async def ask(self, path: str, decode: Callable[[bytes], T]) -> T:
        url = self.url + path
        return await self._peers.call(
            "GET", url, decode, seconds=_ASK_SECONDS, max_bytes=_MAX_BYTES
        )

    async def ask_openly(self, path: str) -> bytes:
        """Return the answer to a question that anybody may ask."""
        async with self._open.get(self.url + path) as answer:
            return await answer.read()

    async def ready(self) -> int:
        """Return how many members are ready."""
        view = await self.ask("/cluster", _clusters.decode)
        return sum(member.state is InstanceState.READY for member in view.instances)

    async def synchronised(self) -> int:
        """Return of how many members it knows all that they have cached."""
        return sum(feed.synchronised for feed in await self.ask(FEEDS_PATH, _feeds.decode))

    async def lag(self) -> int:
        return sum(feed.lag for feed in await self.ask(FEEDS_PATH, _feeds.decode))

    async def timed(self, path: str) -> Answer:
        before, started = self.cpu(), time.perf_counter()
        asked = self.ask(path, bytes) if path.startswith("/cluster") else self.ask_openly(path)
        body = await asked
        return Answer(len(body), time.perf_counter() - started, self.cpu() - before)


class _Start(msgspec.Struct):
    """How far a gateway has come."""

    most_ready: int = 0
    ready: float | None = None
    synchronised: float | None = None


async def measure_gateway(
    name: str, source: Path, members: int, load: ScaleLoad, progress: Progress
) -> GatewayFigures:
    """Measure the gateway of the package in folder `source`, with stand-ins of this version's
    members. Raises MemserveError if a process does not start."""
    held = members * load.held_blocks
    wanted = _encode(Members(members, load.held_blocks)).decode()
    async with (
        _process(_BENCHMARKS, "-m", MODULE, wanted) as standing_in,
        _process(str(source), "-m", GATEWAY_MODULE, "gateway", "prompt-tree", "1") as serving,
        PeerClient(Signer(cluster_secret())) as peers,
        ClientSession() as open_,
    ):
        await _line(standing_in)
        gateway = _Gateway(serving.pid, await _line(serving), peers, open_)
        _tell(standing_in, Task(join=gateway.url))
        start = await _come_up(gateway, members, load.ready_seconds)
        progress(f"{name}, {members} members: {start.most_ready} ready at once")
        figures = GatewayFigures(
            gateway=name,
            members=members,
            held_blocks=held,
            most_ready=start.most_ready,
            ready=start.ready,
            synchronised=start.synchronised,
            start_cpu=gateway.cpu(),
            resident_bytes=gateway.resident_bytes(),
            descriptors=gateway.descriptors(),
        )
        if start.synchronised is None:
            return figures
        await asyncio.sleep(_SETTLE_SECONDS)
        idle, p50, p99 = await _idle(gateway, load.seconds)
        answers = await gateway.timed("/metrics"), await gateway.timed("/cluster")
        listed = time.perf_counter()
        command = "-m", "memserve", "cluster", "list", "--url", gateway.url
        async with _process(str(source), *command) as listing:
            await listing.communicate()
        listed = time.perf_counter() - listed
        spent, requests = await _requests(gateway, str(source), load.seconds)
        done, event_cpu = await _events(gateway, standing_in, load)
        return msgspec.structs.replace(
            figures,
            idle_cpu=idle,
            health_p50=p50,
            health_p99=p99,
            metrics=answers[0],
            cluster=answers[1],
            list_seconds=listed,
            request_cpu=(spent - idle * load.seconds) / requests,
            event_cpu=max(0.0, event_cpu - idle * done.seconds) / done.batches,
            events_per_second=done.batches / done.seconds,
            lag=await gateway.lag(),
        )


async def _come_up(gateway: _Gateway, members: int, seconds: float) -> _Start:
    """Wait until all members are ready and followed; at most `seconds`."""
    start, began = _Start(), time.monotonic()
    while time.monotonic() - began < seconds and start.synchronised is None:
        try:
            ready = await gateway.ready()
            start.most_ready = max(start.most_ready, ready)
            if ready == members:
                start.ready = start.ready or time.monotonic() - began
                if await gateway.synchronised() == members:
                    start.synchronised = time.monotonic() - began
        except PeerError:
            continue  # it has not answered in time
        await asyncio.sleep(_LOOK_SECONDS)
    return start


async def _idle(gateway: _Gateway, seconds: float) -> tuple[float, float, float]:
    """Return the cores that a gateway takes without requests, and P50 and P99 of the seconds of an
    answer."""
    took: list[float] = []
    before, began = gateway.cpu(), time.monotonic()
    while time.monotonic() - began < seconds:
        started = time.perf_counter()
        await gateway.ask_openly("/health")
        took.append(time.perf_counter() - started)
        await asyncio.sleep(_PROBE_SECONDS)
    p50, p99 = np.percentile(took, [50, 99])
    return (gateway.cpu() - before) / (time.monotonic() - began), float(p50), float(p99)


async def _requests(gateway: _Gateway, source: str, seconds: float) -> tuple[float, int]:
    """Return the seconds of CPU that requests took, with what goes on anyway, and their number."""
    host, _, port = gateway.url.rpartition("//")[2].partition(":")
    for length in (_WARM_SECONDS, seconds):
        wanted = LoadConfig(host, int(port), _STREAMS, _CHUNKS, length, _PROMPT_TOKENS)
        before = gateway.cpu()
        async with _process(source, "-m", GATEWAY_MODULE, "load", _encode(wanted).decode()) as made:
            out, _ = await made.communicate()
        spent = gateway.cpu() - before
    seen = msgspec.json.decode(out, type=LoadSeen)
    if seen.failed or not seen.requests:
        raise MemserveError(f"{seen.failed} of {seen.requests} requests failed")
    return spent, seen.requests


async def _events(
    gateway: _Gateway, standing_in: asyncio.subprocess.Process, load: ScaleLoad
) -> tuple[Done, float]:
    """Return what members have published, and the seconds of CPU that the gateway took."""
    before = gateway.cpu()
    count = round(load.batches * load.seconds)
    _tell(standing_in, Task(batches=count, seconds=load.seconds))
    done = msgspec.json.decode(await _line(standing_in), type=Done)
    return done, gateway.cpu() - before


def _tell(process: asyncio.subprocess.Process, task: Task) -> None:
    assert process.stdin is not None
    process.stdin.write(_encode(task) + b"\n")


async def _line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        await process.wait()
        raise MemserveError("a process has ended before it said what it had to")
    return line.decode().strip()


@asynccontextmanager
async def _process(path: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process of this Python with `path` before its modules, ended with the context. An error in
    it gets the last line of a process that has ended by itself."""
    with tempfile.TemporaryFile() as said:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=said,
            env=_environment(path),
            limit=1 << 26,
        )
        try:
            yield process
        except MemserveError as error:
            if process.returncode is not None:
                said.seek(0)
                error.add_note(said.read().decode(errors="replace").strip().rpartition("\n")[2])
            raise
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


def _environment(path: str) -> Mapping[str, str]:
    known: Sequence[str] = [path, *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    return {**os.environ, "PYTHONPATH": ":".join(known)}
