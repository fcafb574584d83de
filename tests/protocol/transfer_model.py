"""Hosts, memory, a transport and a network for transfer sessions, all in one thread.

A host lives several lives. Its blocks know who holds them, so that a write that lands in a
block which was freed, given away or published is caught when it happens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from memserve.transfer.destination_session import DestinationSession
from memserve.transfer.messages import (
    WIRE_REF_BYTES,
    Drained,
    Failure,
    Prepare,
    SessionMessage,
)
from memserve.transfer.session import (
    Actions,
    Allocate,
    CancelWrites,
    Finish,
    Forget,
    Free,
    Publish,
    Quarantine,
    Release,
    Revoke,
    Round,
    Send,
    Sever,
    Write,
)
from memserve.transfer.source_session import SourceSession
from memserve.transfer.table import SessionTable, Step, Steps, steps
from memserve.types import Epoch, InstanceId, Medium, Owner

TOKEN_BYTES = 4  # one token for each block
Content = tuple[object, ...]


@dataclass(eq=False)
class Block:
    holder: object = None  # None: free; a session; "index"; a grant's (life, number)
    generation: int = 0
    content: Content = ()
    pins: int = 0


@dataclass(eq=False)
class Held:
    """What a destination session has."""

    pinned: list[int]
    blocks: list[int]


class Memory:
    """The blocks and the index of one life."""

    def __init__(self, blocks: int) -> None:
        self.blocks = [Block() for _ in range(blocks)]
        self.index: dict[bytes, int] = {}
        self.held: dict[DestinationSession, Held] = {}
        self.grants: dict[tuple[Owner, int], list[int]] = {}

    def words(self, indices: list[int]) -> bytes:
        return b"".join(
            (at | self.blocks[at].generation << 8).to_bytes(WIRE_REF_BYTES, "little")
            for at in indices
        )

    def free(self, indices: list[int]) -> None:
        for at in indices:
            block = self.blocks[at]
            assert block.holder not in (None, "index"), "freed twice, or from under the index"
            block.holder = None
            block.generation += 1

    def evict(self) -> None:
        """Drop what was cached last, if nobody reads it."""
        for key in sorted(self.index, key=len, reverse=True):
            block = self.blocks[self.index[key]]
            if not block.pins:
                block.holder = None
                block.generation += 1
                del self.index[key]
                return

    def allocate(self, session: DestinationSession) -> tuple[int, bytes] | None:
        prepare = session.prepare
        cached = self._cached(prepare)
        free = [at for at, block in enumerate(self.blocks) if block.holder is None]
        missing = prepare.blocks - len(cached)
        if missing > len(free):
            return None
        blocks = free[:missing]
        for at in blocks:
            self.blocks[at].holder = session
            self.blocks[at].content = ()
        for at in cached:
            self.blocks[at].pins += 1
        self.held[session] = Held(cached, blocks)
        return len(cached), self.words(blocks or cached)

    def publish(self, peer: Owner, session: DestinationSession) -> bytes:
        held = self.held[session]
        prepare = session.prepare
        for position, at in enumerate(held.blocks, len(held.pinned)):
            wanted = content(peer, prepare, position)
            assert self.blocks[at].content == wanted, "published before it was whole"
        words = self.words(held.pinned + held.blocks)
        if prepare.tokens is None:
            for at in held.blocks:
                self.blocks[at].holder = (peer, session.number)
            self.grants[peer, session.number] = held.blocks
            held.blocks = []
        self.release(session)
        return words

    def release(self, session: DestinationSession, insert: bool = True) -> None:
        held = self.held.pop(session)
        for at in held.pinned:
            self.blocks[at].pins -= 1
        tokens = session.prepare.tokens
        spare = []
        for position, at in enumerate(held.blocks, len(held.pinned)):
            key = b"" if tokens is None else tokens[: (position + 1) * TOKEN_BYTES]
            if tokens is None or not insert or key in self.index:
                spare.append(at)
            else:
                self.index[key] = at
                self.blocks[at].holder = "index"
        self.free(spare)

    def quarantine(self, session: DestinationSession) -> None:
        held = self.held[session]
        for at in held.pinned:
            self.blocks[at].pins -= 1
        held.pinned = []

    def revoke(self, peer: Owner, number: int) -> None:
        self.free(self.grants.pop((peer, number), []))

    def land(self, words: bytes, contents: list[Content], attempt_of: object) -> None:
        for at in range(len(contents)):
            word = int.from_bytes(words[at * WIRE_REF_BYTES : (at + 1) * WIRE_REF_BYTES], "little")
            block = self.blocks[word & 0xFF]
            assert block.generation == word >> 8, "a write landed in a block that was freed"
            assert isinstance(block.holder, DestinationSession), "written to when published"
            block.content = contents[at]

    def _cached(self, prepare: Prepare) -> list[int]:
        found: list[int] = []
        if prepare.tokens is None:
            return found
        for end in range(TOKEN_BYTES, len(prepare.tokens) + 1, TOKEN_BYTES):
            at = self.index.get(prepare.tokens[:end])
            if at is None:
                break
            found.append(at)
        return found


def content(source: Owner, prepare: Prepare, position: int) -> Content:
    """What a block must hold: KV is a function of the tokens up to its end."""
    if prepare.tokens is not None:
        return ("kv", prepare.tokens[: (position + 1) * TOKEN_BYTES])
    return ("raw", source, prepare.number, position)


@dataclass(eq=False)
class Copy:
    """A write that has been posted and not yet drained."""

    life: Life
    peer: Owner
    session: SourceSession
    write: Write

    def contents(self) -> list[Content]:
        first, last, _ = self.write.round
        prepare = self.session.prepare
        return [content(self.life.owner, prepare, at) for at in range(first, last)]


@dataclass(eq=False)
class Outgoing:
    """A transfer as its caller sees it."""

    session: SourceSession
    finished: Finish | None = None
    released: bool = False


@dataclass(eq=False)
class Life:
    """One process."""

    owner: Owner
    memory: Memory
    table: SessionTable = field(default_factory=SessionTable)
    outgoing: dict[int, Outgoing] = field(default_factory=dict)
    severed: list[Copy] = field(default_factory=list)  # in this life's receive buffers
    alive: bool = True
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))


class World:
    """Two hosts, what is on the wire and what the transports still do."""

    def __init__(self, blocks: int) -> None:
        self.now = 100.0
        self.blocks = blocks
        self.epochs = itertools.count(1)
        self.lives: list[Life] = []
        self.wire: list[tuple[Owner, Owner, SessionMessage]] = []
        self.copies: list[Copy] = []
        self.hosts = [self.new_life("a"), self.new_life("b")]

    def new_life(self, name: str) -> Life:
        owner = Owner(InstanceId(name), Epoch(next(self.epochs)))
        life = Life(owner, Memory(self.blocks))
        self.lives.append(life)
        return life

    def life_of(self, owner: Owner) -> Life:
        return next(life for life in self.lives if life.owner == owner)

    # --- what happens -----------------------------------------------------------------------

    def begin(self, at: int, blocks: int, tokens: bytes | None) -> Outgoing | None:
        life, peer = self.hosts[at], self.hosts[1 - at]
        if life.table.is_gone(peer.owner):
            return None
        prepare = Prepare(next(life.numbers), blocks, Medium.HBM, "", tokens)
        session = SourceSession(prepare, life.table.lease(peer.owner, self.now))
        outgoing = life.outgoing[prepare.number] = Outgoing(session)
        self.perform(life, life.table.begin(peer.owner, session, self.now))
        return outgoing

    def deliver(self, at: int, *, keep: bool = False) -> None:
        sender, receiver, message = self.wire[at] if keep else self.wire.pop(at)
        life = self.life_of(receiver)
        if life.alive:
            self.perform(life, life.table.on_message(sender, message, self.now))

    def land(self, copy: Copy) -> None:
        """Bytes arrive; in nobody's memory if the process has ended."""
        life = self.life_of(copy.peer)
        if life.alive:
            life.memory.land(copy.write.wire_refs, copy.contents(), copy.session)

    def end_copy(self, copy: Copy, failure: Failure | None, drained: Drained) -> None:
        self.copies.remove(copy)
        if drained is Drained.SEVERED:
            self.life_of(copy.peer).severed.append(copy)
        done = copy.session.on_write_done(copy.write.serial, failure, drained, self.now)
        self.perform(copy.life, steps(copy.peer, copy.session, done))

    def kill(self, at: int) -> None:
        """The process ends, and another takes its place."""
        old = self.hosts[at]
        old.alive = False
        self.copies = [copy for copy in self.copies if copy.life is not old]
        self.hosts[at] = self.new_life(old.owner.instance)

    def discover(self, at: int) -> None:
        """A host learns which lives are over."""
        life = self.hosts[at]
        for other in self.lives:
            if not other.alive and not life.table.is_gone(other.owner):
                self.perform(life, life.table.on_gone(other.owner, self.now))
                life.severed = [copy for copy in life.severed if copy.life is not other]
                for peer, number in list(life.memory.grants):
                    if peer == other.owner:
                        life.memory.revoke(peer, number)

    def tick(self, at: int) -> None:
        life = self.hosts[at]
        self.perform(life, life.table.on_tick(self.now))
        for peer, number in list(life.memory.grants):
            if life.table.silent(peer, self.now):
                life.memory.revoke(peer, number)

    def heartbeat(self, at: int) -> None:
        """One arrives from the other host."""
        peer = self.hosts[1 - at]
        self.hosts[at].table.heard(peer.owner, self.now)

    # --- performing actions -----------------------------------------------------------------

    def act(self, life: Life, peer: Owner, session: SourceSession, actions: Actions) -> None:
        self.perform(life, steps(peer, session, actions))

    def perform(self, life: Life, todo: Steps) -> None:
        for step in todo:
            if isinstance(step.action, Send):
                self.wire.append((life.owner, step.peer, step.action.message))
            elif isinstance(step.session, SourceSession):
                self._perform_source(life, step, step.session)
            else:
                assert isinstance(step.session, DestinationSession)
                self._perform_destination(life, step, step.session)

    def _perform_source(self, life: Life, step: Step, session: SourceSession) -> None:
        outgoing = life.outgoing[session.number]
        match step.action:
            case Write() as write:
                assert not outgoing.released, "wrote from blocks that were released"
                self.copies.append(Copy(life, step.peer, session, write))
            case Finish() as finish:
                assert outgoing.finished is None, "finished twice"
                outgoing.finished = finish
            case Release():
                assert not outgoing.released, "released twice"
                assert not any(copy.session is session for copy in self.copies)
                outgoing.released = True
            case Forget():
                assert outgoing.finished, "forgotten without a word to the caller"
                assert outgoing.released
                life.table.forget(step.peer, session)
            case CancelWrites():
                pass
            case _:
                raise AssertionError(step)

    def _perform_destination(self, life: Life, step: Step, session: DestinationSession) -> None:
        memory = life.memory
        match step.action:
            case Allocate():
                got = memory.allocate(session)
                more = (
                    session.on_refused(Failure("OutOfBlocks", ""))
                    if got is None
                    else session.on_allocated(*got, self.now)
                )
                self.perform(life, steps(step.peer, session, more))
            case Publish():
                words = memory.publish(step.peer, session)
                more = session.on_published(words, self.now)
                self.perform(life, steps(step.peer, session, more))
            case Quarantine():
                memory.quarantine(session)
            case Free():
                memory.release(session, insert=False)
            case Revoke():
                memory.revoke(step.peer, session.number)
            case Sever():
                life.severed = [copy for copy in life.severed if copy.life.owner != step.peer]
            case Forget():
                assert session not in memory.held, "forgotten with blocks"
                life.table.forget(step.peer, session)
            case _:
                raise AssertionError(step)


ALL = Round(0, 1 << 20, None)
