"""`NixlTransport`: writes between any two hosts by NIXL, over RDMA or TCP, or within one host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count

from memserve.errors import TransferError, UnknownPeer
from memserve.pool.layout import KVLayout
from memserve.transfer.base import (
    Completion,
    LocalRegion,
    Outcome,
    PoolRegions,
    Region,
    Ticket,
    TransportCounters,
    WriteList,
)
from memserve.transfer.conversion import compatibility
from memserve.transfer.copy_plan import RegionCopy, RegionTable, plan_copies
from memserve.transfer.nixl_agent import MetadataConflict, NixlAgent, Request, RequestState
from memserve.types import InstanceId, Owner

# Bytes of one request. NIXL cannot cancel a posted request: CHUNK_BYTES * WINDOW bytes may still be
# written after a cancel. Within one host a post copies before it returns: a few milliseconds.
CHUNK_BYTES = 8 * 1024 * 1024
# Maximum of requests in flight to one peer; the next one is posted when one ends.
WINDOW = 4


@dataclass(slots=True, eq=False)
class _Link:
    """One life of one peer."""

    owner: Owner
    table: RegionTable
    metadata: bytes | None  # to load when NIXL has forgotten the previous one; None: loaded
    posted: int = 0  # requests in flight
    broken: TransferError | None = None

    @property
    def agent(self) -> str:
        return _agent_name(self.owner)


@dataclass(slots=True, eq=False)
class _Job:
    """One ticket."""

    link: _Link
    nbytes: int
    chunks: Iterator[RegionCopy]  # still to post
    requests: list[Request] = field(default_factory=list)
    to_post: bool = True
    cancelled: bool = False
    error: TransferError | None = None


def _agent_name(owner: Owner) -> str:
    """Return the name of a life's agent. NIXL refuses two agents of one name, hence the epoch."""
    return f"{owner.instance}.{owner.epoch}"


class NixlTransport:
    """Posts scatter-gather writes, up to WINDOW at a time, and polls them.

    A request in progress is not released, and its peer is not forgotten: NIXL would continue to
    read the source and to write the target, without a report of the end.
    """

    name = "nixl"
    poll_interval = 0.0002  # less than a request takes; NIXL's progress thread works meanwhile

    def __init__(self, owner: Owner, layout: KVLayout, tls: str | None = None) -> None:
        """`owner`, `layout`: of the local pool. `tls`: see NixlAgent. Raises TransferError."""
        self.counters = TransportCounters()
        self._layout = layout
        self._agent = NixlAgent(_agent_name(owner), tls)
        self._local: dict[Region, tuple[LocalRegion, object]] = {}
        self._table = RegionTable(layout, ())
        self._links: dict[InstanceId, _Link] = {}
        self._leaving: list[_Link] = []  # removed, with requests in flight
        self._jobs: dict[Ticket, _Job] = {}  # in the order in which they are posted
        self._tickets = count(1)

    @property
    def in_flight(self) -> int:
        return len(self._jobs)

    def register(self, regions: Sequence[LocalRegion]) -> None:
        for each in regions:
            self._local[each.region] = (each, self._agent.register(each))
        self._table = RegionTable(self._layout, tuple(self._local))

    def unregister(self, regions: Sequence[LocalRegion]) -> None:
        for each in regions:
            _, handle = self._local.pop(each.region)
            self._agent.deregister(handle)
        self._table = RegionTable(self._layout, tuple(self._local))

    def describe(self) -> bytes:
        return self._agent.metadata()

    def add_peer(self, peer: Owner, memory: PoolRegions, description: bytes) -> None:
        compatibility(self._layout, memory.layout)
        table = RegionTable(memory.layout, memory.regions)
        link = self._links.get(peer.instance)
        if link is not None and (link.owner != peer or link.broken is not None):
            self.remove_peer(link.owner)
            link = None
        if link is None:
            link = self._links[peer.instance] = _Link(peer, table, description)
        link.table, link.metadata = table, description
        self._load(link)
        if link.broken is not None:
            self.remove_peer(peer)
            raise link.broken

    def remove_peer(self, peer: Owner) -> None:
        link = self._links.get(peer.instance)
        if link is None or link.owner != peer:
            return
        del self._links[peer.instance]
        self._leaving.append(link)
        for ticket, job in self._jobs.items():
            if job.link is link:
                self.cancel(ticket)
        self._forget_left()

    def post(self, peer: Owner, writes: WriteList) -> Ticket:
        link = self._links.get(peer.instance)
        if link is None or link.owner != peer:
            raise UnknownPeer(f"{peer.instance!r} of epoch {peer.epoch} is not connected")
        copies = plan_copies(self._table, link.table, writes)
        chunks = chain.from_iterable(copy.chunks(CHUNK_BYTES) for copy in copies)
        ticket = Ticket(next(self._tickets))
        self._jobs[ticket] = _Job(link, sum(copy.nbytes for copy in copies), chunks)
        self.counters.posted += 1
        return ticket

    def poll(self) -> list[Completion]:
        ended = []
        for ticket, job in list(self._jobs.items()):
            self._post_more(job)
            self._check(job)  # after posting: within a host, a posted request is complete already
            if not job.to_post and not job.requests:
                ended.append(self._end(ticket, job))
        self._forget_left()
        for link in self._links.values():
            self._load(link)
        return ended

    def cancel(self, ticket: Ticket) -> None:
        job = self._jobs.get(ticket)
        if job is not None and job.to_post:  # else all requests are posted, or one has failed
            job.to_post = False
            job.cancelled = True

    def close(self) -> None:
        # Delete the agent first: until then it may read the memory.
        del self._agent
        self._jobs.clear()
        self._links.clear()
        self._leaving.clear()
        self._local.clear()
        self._table = RegionTable(self._layout, ())

    def _check(self, job: _Job) -> None:
        """Release the requests that have ended."""
        for request in list(job.requests):
            try:
                if self._agent.state(request) is RequestState.IN_PROGRESS:
                    continue
            except TransferError as error:
                self._break(job, error)
            self._agent.release(request)
            job.requests.remove(request)
            job.link.posted -= 1

    def _post_more(self, job: _Job) -> None:
        if job.to_post and job.link.broken is not None:
            self._break(job, job.link.broken)
        for _ in range(WINDOW - job.link.posted):
            if not job.to_post or job.link.metadata is not None:
                return
            chunk = next(job.chunks, None)
            if chunk is None:
                job.to_post = False
                return
            source, target, nbytes = chunk.pieces()
            try:
                request = self._agent.write(
                    job.link.agent, (chunk.source, source), (chunk.target, target), nbytes
                )
            except TransferError as error:
                self._break(job, error)
                return
            job.requests.append(request)
            job.link.posted += 1
            self.counters.pieces += len(nbytes)

    def _break(self, job: _Job, error: TransferError) -> None:
        job.link.broken = job.error = error
        job.to_post = False

    def _end(self, ticket: Ticket, job: _Job) -> Completion:
        del self._jobs[ticket]
        self.counters.ended += 1
        if job.error is not None:
            return Completion(ticket, Outcome.FAILED, job.error, target_drained=False)
        if job.cancelled:
            return Completion(ticket, Outcome.CANCELLED)
        self.counters.bytes_moved += job.nbytes
        return Completion(ticket, Outcome.DONE)

    def _load(self, link: _Link) -> None:
        """Load a peer's metadata into NIXL, once no request to its former memory is in flight."""
        names = {leaving.agent for leaving in self._leaving}
        if link.metadata is None or link.broken is not None or link.agent in names:
            return
        try:
            try:
                name = self._agent.load(link.metadata)
            except MetadataConflict:
                if link.posted:
                    return
                self._agent.forget(link.agent)
                name = self._agent.load(link.metadata)
            if name != link.agent:
                raise TransferError(f"NIXL metadata is of agent {name!r}, not of {link.agent!r}")
        except TransferError as error:
            link.broken = error
            return
        link.metadata = None

    def _forget_left(self) -> None:
        for link in list(self._leaving):
            if not link.posted:
                self._agent.forget(link.agent)
                self._leaving.remove(link)
