"""What the NIXL transport asks of its agent, and when: with an agent that only writes it down."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memserve import KVLayout, Medium
from memserve.errors import PeerLost, TransferError
from memserve.pool.pool import BlockPool
from memserve.transfer import nixl
from memserve.transfer.base import (
    Completion,
    LocalRegion,
    Outcome,
    Region,
    Ticket,
    WriteList,
    block_list,
)
from memserve.transfer.nixl import WINDOW, NixlTransport
from memserve.transfer.nixl_agent import MetadataConflict, Request, RequestState
from memserve.transfer.regions import local_regions, pool_regions
from memserve.types import Epoch, IndexArray, Owner

LAYOUT = KVLayout(layers=1, kv_heads=1, head_dim=4, dtype="float32", block_tokens=2)
BLOCKS = 3 * WINDOW


class ScriptedAgent:
    """Requests end when the test says so."""

    def __init__(self, name: str, tls: str | None = None) -> None:
        self.known: list[str] = []  # loaded, in order
        self.forgotten: list[str] = []
        self.requests: dict[Request, RequestState | PeerLost] = {}
        self.posted = 0
        self.conflict = False  # until something is forgotten

    def register(self, local: LocalRegion) -> object:
        return local.region

    def deregister(self, handle: object) -> None:
        pass

    def metadata(self) -> bytes:
        return b""

    def load(self, metadata: bytes) -> str:
        if self.conflict:
            raise MetadataConflict("registered anew")
        self.known.append(metadata.decode())
        return metadata.decode()

    def forget(self, name: str) -> None:
        assert not self.requests, "what is posted must not go out of sight"
        self.conflict = False
        self.forgotten.append(name)

    def write(
        self,
        name: str,
        source: tuple[Region, IndexArray],
        target: tuple[Region, IndexArray],
        nbytes: IndexArray,
    ) -> Request:
        self.posted += 1
        request = Request(self.posted)
        self.requests[request] = RequestState.IN_PROGRESS
        return request

    def state(self, request: Request) -> RequestState:
        state = self.requests[request]
        if isinstance(state, PeerLost):
            raise state
        return state

    def release(self, request: Request) -> None:
        assert self.requests.pop(request) is not RequestState.IN_PROGRESS

    def end_all(self, state: RequestState | PeerLost = RequestState.DONE) -> None:
        self.requests = dict.fromkeys(self.requests, state)


class Scene:
    """A transport with a peer."""

    def __init__(self, source: BlockPool, target: BlockPool) -> None:
        self.memory = pool_regions(LAYOUT, local_regions(target))
        self.peer = target.owner
        self.transport = NixlTransport(source.owner, LAYOUT)
        agent = self.transport._agent
        assert isinstance(agent, ScriptedAgent)
        self.agent = agent
        self.transport.register(local_regions(source))
        self.connect()

    def connect(self, epoch: int | None = None) -> Owner:
        peer = Owner(self.peer.instance, Epoch(self.peer.epoch if epoch is None else epoch))
        self.transport.add_peer(peer, self.memory, f"{peer.instance}.{peer.epoch}".encode())
        return peer

    def post(self, blocks: int = BLOCKS) -> Ticket:
        every = block_list(Medium.HBM, list(range(blocks)))
        return self.transport.post(self.peer, WriteList(every, every))


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr(nixl, "NixlAgent", ScriptedAgent)
    monkeypatch.setattr(nixl, "CHUNK_BYTES", LAYOUT.block_bytes)
    with (
        BlockPool(LAYOUT, BLOCKS, 0, "source") as source,
        BlockPool(LAYOUT, BLOCKS, 0, "t") as target,
    ):
        yield Scene(source, target)


def test_a_window_is_posted_at_a_time(scene: Scene) -> None:
    ticket = scene.post()
    posted = []
    while not (ended := scene.transport.poll()):
        posted.append(scene.agent.posted)
        scene.agent.end_all()
    assert posted[0] == WINDOW
    assert posted[-1] == BLOCKS
    assert ended == [Completion(ticket, Outcome.DONE)]
    assert scene.transport.counters.bytes_moved == BLOCKS * LAYOUT.block_bytes


def test_cancelling_posts_no_more_and_waits_for_the_rest(scene: Scene) -> None:
    ticket = scene.post()
    scene.transport.poll()
    scene.transport.cancel(ticket)
    assert scene.transport.poll() == []
    scene.agent.end_all()
    assert scene.transport.poll() == [Completion(ticket, Outcome.CANCELLED)]
    assert scene.agent.posted == WINDOW


def test_a_removed_peer_is_forgotten_when_its_writes_have_ended(scene: Scene) -> None:
    ticket = scene.post()
    scene.transport.poll()
    scene.transport.remove_peer(scene.peer)
    assert scene.transport.poll() == []
    assert scene.agent.forgotten == []
    scene.agent.end_all()
    assert scene.transport.poll() == [Completion(ticket, Outcome.CANCELLED)]
    assert scene.agent.forgotten == [f"t.{scene.peer.epoch}"]


def test_a_peer_comes_back_behind_its_old_writes(scene: Scene) -> None:
    """NIXL knows one agent of a name: the new connection waits for the old one's end."""
    old = scene.post()
    scene.transport.poll()
    scene.transport.remove_peer(scene.peer)
    scene.connect()
    new = scene.post(1)
    assert scene.transport.poll() == []
    assert len(scene.agent.known) == 1
    scene.agent.end_all()
    assert scene.transport.poll() == [Completion(old, Outcome.CANCELLED)]
    assert len(scene.agent.known) == 2
    scene.transport.poll()
    scene.agent.end_all()
    assert scene.transport.poll() == [Completion(new, Outcome.DONE)]


def test_another_life_does_not_wait(scene: Scene) -> None:
    scene.post()
    scene.transport.poll()
    again = scene.connect(scene.peer.epoch + 1)
    assert scene.agent.known[-1] == f"t.{again.epoch}"


def test_replaced_registrations_are_loaded_between_writes(scene: Scene) -> None:
    ticket = scene.post()
    scene.transport.poll()
    scene.agent.conflict = True
    scene.connect()
    scene.agent.end_all()
    scene.transport.poll()
    assert scene.agent.posted == WINDOW  # no more, until the memory is known again
    assert scene.agent.forgotten == scene.agent.known[:1]
    while not (ended := scene.transport.poll()):
        scene.agent.end_all()
    assert ended == [Completion(ticket, Outcome.DONE)]


def test_a_broken_connection_fails_all_that_waits_for_it(scene: Scene) -> None:
    first, second = scene.post(), scene.post()
    scene.transport.poll()
    error = PeerLost("gone")
    scene.agent.end_all(error)
    ended = scene.transport.poll()
    assert {end.ticket: (end.outcome, end.error) for end in ended} == {
        first: (Outcome.FAILED, error),
        second: (Outcome.FAILED, error),
    }
    scene.connect()  # a new connection
    third = scene.post(1)
    scene.transport.poll()
    scene.agent.end_all()
    assert scene.transport.poll() == [Completion(third, Outcome.DONE)]


def test_metadata_of_somebody_else_is_refused(scene: Scene) -> None:
    with pytest.raises(TransferError, match=r"'other\.1', not of 't\."):
        scene.transport.add_peer(scene.peer, scene.memory, b"other.1")
