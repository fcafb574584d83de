"""`Receiver` performs the actions of `DestinationSession`s: allocates, publishes, frees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memserve.errors import LengthMismatch, NotOwned, UnwrittenBlocks
from memserve.pool.layout import KVLayout
from memserve.pool.results import Match
from memserve.tokens import TOKEN_BYTES, from_wire
from memserve.transfer.canary import Canaries, Canary
from memserve.transfer.conversion import common_heads, require_filled
from memserve.transfer.destination_session import DestinationSession
from memserve.transfer.messages import (
    Prepare,
    from_wire_refs,
    to_wire_refs,
)
from memserve.transfer.shared_pool import Guard, SharedPool
from memserve.types import Owner, RefArray, TokenArray

_NONE: RefArray = np.empty(0, dtype=np.int64)


@dataclass(slots=True, eq=False)
class _Held:
    """The blocks of a session: either its `own`, or those of a `guard`."""

    tokens: TokenArray | None
    match: Match | None
    own: RefArray  # allocated for the session
    guard: Guard | None = None  # on blocks that a local caller allocated
    canary: Canary | None = None  # in the blocks to write; None: the writing peer gets them


class Receiver:
    """Owns the blocks of sessions, and the *grants*: blocks of plain transfers, which belong to a
    peer until the peer frees them or is gone."""

    def __init__(self, pool: SharedPool, owner_number: int) -> None:
        self._pool = pool
        self._owner_number = owner_number
        self._canaries = Canaries(pool)
        self._held: dict[DestinationSession, _Held] = {}
        self._grants: dict[tuple[Owner, int], RefArray] = {}
        self._quarantined: dict[DestinationSession, int] = {}  # number of blocks
        # Number of blocks that are not reused, because a peer may still write to them. A plain
        # int, which any thread may read.
        self.quarantined_blocks = 0

    @property
    def granted_blocks(self) -> int:
        return sum(len(refs) for refs in self._grants.values())

    def allocate(
        self, peer: Owner, session: DestinationSession, source: KVLayout
    ) -> tuple[int, bytes]:
        """Return the number of leading blocks that are cached, and the wire_refs of the others (of
        all blocks, if all are cached). `source`: layout of the peer's pool. Raises PoolError; call
        `free` then."""
        prepare = session.prepare
        tokens = None
        if prepare.tokens is not None:
            require_filled(source, self._pool.layout, "an insert")
            tokens = self._tokens(prepare, prepare.tokens)
        heads = common_heads(source, self._pool.layout)
        held = self._held[session] = _Held(tokens, None, _NONE)
        if prepare.target is not None:
            held.guard = self._guard_target(peer, prepare, prepare.target, heads)
            held.canary = self._canaries.plant(held.guard.refs, heads)
            return 0, prepare.target
        if tokens is None:  # a plain transfer: the blocks become the peer's
            held.own = self._pool.alloc_mem(prepare.blocks, prepare.medium, private=True)
            return 0, to_wire_refs(held.own)
        held.match = self._pool.match(tokens, prepare.namespace)
        missing = prepare.blocks - len(held.match.refs)
        if not missing:
            return len(held.match.refs), to_wire_refs(held.match.refs)
        held.own = self._pool.alloc_mem(missing, prepare.medium, private=True)
        held.canary = self._canaries.plant(held.own, heads)
        return len(held.match.refs), to_wire_refs(held.own)

    def publish(self, peer: Owner, session: DestinationSession) -> bytes:
        """Insert the blocks into the index, or grant them to the peer. Returns the wire_refs of all
        blocks. Raises UnwrittenBlocks unless all are written, PoolError."""
        held = self._held[session]
        if held.canary is not None and (left := held.canary.left()):
            raise UnwrittenBlocks(
                f"{left} pieces of {session.prepare.blocks} committed blocks were not written"
            )
        if held.tokens is None:
            refs = held.own if held.guard is None else held.guard.refs
            if len(held.own):
                self._grants[peer, session.number] = held.own
                held.own = _NONE
        else:
            refs = self._insert(held, held.tokens, session.prepare.namespace)
        self.free(session)
        return to_wire_refs(refs)

    def quarantine(self, session: DestinationSession) -> None:
        """Release the pins; keep the blocks that the peer may still write to."""
        held = self._held[session]
        if session not in self._quarantined:
            self._quarantined[session] = len(held.own)
            self.quarantined_blocks += len(held.own)
        match = held.match
        if match is not None:
            match.release()

    def free(self, session: DestinationSession) -> None:
        """Release pins, guards and blocks of a session, if it has any."""
        held = self._held.pop(session, None)
        self.quarantined_blocks -= self._quarantined.pop(session, 0)
        if held is None:
            return
        if held.match is not None:
            held.match.release()
        if len(held.own):
            self._pool.free_mem(held.own)
        if held.guard is not None:
            self._pool.unguard(held.guard)

    def free_granted(self, peer: Owner, refs: RefArray) -> None:
        """Free blocks of a peer's grants. Raises NotOwned for other allocated blocks, and the
        errors of the pool's `free_mem`."""
        self._pool.require_freeable(refs)
        if not np.isin(refs, self._granted(peer)).all():
            raise NotOwned(f"not all of {len(refs)} blocks were given to {peer.instance!r}")
        self._pool.free_mem(refs)

    def _granted(self, peer: Owner) -> RefArray:
        mine = [refs for (owner, _), refs in self._grants.items() if owner == peer]
        return np.concatenate(mine) if mine else _NONE

    def revoke(self, peer: Owner, number: int) -> None:
        """Free the blocks of a grant that are still allocated."""
        refs = self._pool.still_allocated(self._grants.pop((peer, number), _NONE))
        if len(refs):
            self._pool.free_mem(refs)

    def revoke_all(self, peer: Owner) -> None:
        for owner, number in list(self._grants):
            if owner == peer:
                self.revoke(owner, number)

    def claim(self, refs: RefArray) -> None:
        """Make granted blocks the local caller's, and let peers write to them."""
        self._pool.make_public(refs)
        for key, granted in list(self._grants.items()):
            left = granted[~np.isin(granted, refs)]
            if len(left):
                self._grants[key] = left
            else:
                del self._grants[key]

    def prune(self) -> None:
        """Forget granted blocks that are no longer allocated."""
        for key, granted in list(self._grants.items()):
            left = self._pool.still_allocated(granted)
            if len(left) < len(granted):
                self._grants[key] = left
            if not len(left):
                del self._grants[key]

    def grantees(self) -> set[Owner]:
        return {owner for owner, _ in self._grants}

    def _insert(self, held: _Held, tokens: TokenArray, namespace: str) -> RefArray:
        """Insert a session's blocks; return the index's blocks for the tokens."""
        guard, held.guard = held.guard, None
        if guard is not None:  # into blocks of a local caller; duplicates stay the caller's
            self._pool.unguard(guard)
            result = self._pool.insert(tokens, guard.refs, namespace, pin=True)
        else:
            assert held.match is not None
            given = np.concatenate((held.match.refs, held.own))
            result = self._pool.insert(tokens, given, namespace, pin=True)
            held.own = result.duplicate  # the index got these from another caller first
        assert result.match is not None
        result.match.release()
        return result.match.refs

    def _guard_target(self, peer: Owner, prepare: Prepare, wire_refs: bytes, heads: range) -> Guard:
        target = _refs(wire_refs, self._owner_number)
        if len(target) != prepare.blocks:
            raise LengthMismatch(f"{prepare.blocks} blocks for {len(target)} references")
        return self._pool.guard(target, heads, self._granted(peer))

    def _tokens(self, prepare: Prepare, data: bytes) -> TokenArray:
        block_bytes = TOKEN_BYTES * self._pool.layout.block_tokens
        if len(data) != prepare.blocks * block_bytes:
            raise LengthMismatch(
                f"{prepare.blocks} blocks of {self._pool.layout.block_tokens} tokens "
                f"for {len(data)} bytes of tokens"
            )
        return from_wire(data)


def _refs(wire_refs: bytes, owner_number: int) -> RefArray:
    try:
        return from_wire_refs(wire_refs, owner_number)
    except ValueError as error:
        raise LengthMismatch(str(error)) from error
