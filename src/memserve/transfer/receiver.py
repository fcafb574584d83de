"""The destination's side of transfers, on the pool: who holds which blocks, and until when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from memserve.errors import LengthMismatch
from memserve.pool.layout import KVLayout
from memserve.pool.results import InsertResult, Match
from memserve.transfer.conversion import common_heads, require_filled
from memserve.transfer.destination_session import DestinationSession
from memserve.transfer.guards import Guard
from memserve.transfer.messages import (
    Prepare,
    from_wire_tokens,
    from_words,
    to_words,
)
from memserve.types import Medium, Owner, RefArray, TokenArray

_NONE: RefArray = np.empty(0, dtype=np.int64)


class ReceivingPool(Protocol):
    """What a pool does for its peers."""

    layout: KVLayout
    owner: Owner

    def alloc_mem(
        self, n: int, medium: Medium = Medium.HBM, instance: str | None = None
    ) -> RefArray: ...
    def match(self, tokens: ArrayLike, namespace: str = "") -> Match: ...
    def insert(
        self, tokens: ArrayLike, refs: ArrayLike, namespace: str = "", *, pin: bool = False
    ) -> InsertResult: ...
    def free_mem(self, refs: ArrayLike) -> None: ...
    def still_allocated(self, refs: RefArray) -> RefArray:
        """Those that are still what they were: allocated, not inserted, not freed."""
        ...

    def guard(self, refs: RefArray, heads: range) -> Guard:
        """Allocated blocks will be written by a peer. Raises as `free_mem` does; NotOwned if
        another writes these heads."""
        ...

    def unguard(self, guard: Guard) -> None: ...


@dataclass(slots=True, eq=False)
class _Held:
    """What a session has: either blocks of its `own`, or a `guard`."""

    tokens: TokenArray | None
    match: Match | None
    own: RefArray  # allocated for the session
    guard: Guard | None = None  # on blocks that a local caller allocated


class Receiver:
    """Allocates, publishes and frees for `DestinationSession`s. Owns what a session holds, and
    what plain transfers have left to peers (*grants*) until they free it or are gone."""

    def __init__(self, pool: ReceivingPool, owner_number: int) -> None:
        self._pool = pool
        self._owner_number = owner_number
        self._held: dict[DestinationSession, _Held] = {}
        self._grants: dict[tuple[Owner, int], RefArray] = {}
        self._quarantined: set[DestinationSession] = set()

    @property
    def quarantined_blocks(self) -> int:
        """Blocks that nobody may have because a peer may still write to them."""
        return sum(len(self._held[each].own) for each in self._quarantined)

    @property
    def granted_blocks(self) -> int:
        return sum(len(refs) for refs in self._grants.values())

    def allocate(self, session: DestinationSession, source: KVLayout) -> tuple[int, bytes]:
        """How many blocks are cached already, and the words of the others (or of all, if all
        are cached). `source`: of the peer's pool. Raises PoolError; then nothing is held."""
        prepare = session.prepare
        tokens = None
        if prepare.tokens is not None:
            require_filled(source, self._pool.layout, "an insert")
            tokens = self._tokens(prepare, prepare.tokens)
        if prepare.target is not None:
            heads = common_heads(source, self._pool.layout)
            guard = self._guard_target(prepare, prepare.target, heads)
            self._held[session] = _Held(tokens, None, _NONE, guard)
            return 0, prepare.target
        if tokens is None:
            own = self._pool.alloc_mem(prepare.blocks, prepare.medium)
            self._held[session] = _Held(None, None, own)
            return 0, to_words(own)
        match = self._pool.match(tokens, prepare.namespace)
        missing = prepare.blocks - len(match.refs)
        own = _NONE
        if missing:
            try:
                own = self._pool.alloc_mem(missing, prepare.medium)
            except BaseException:
                match.release()
                raise
        self._held[session] = _Held(tokens, match, own)
        return len(match.refs), to_words(own if missing else match.refs)

    def publish(self, peer: Owner, session: DestinationSession) -> bytes:
        """Everything is written. Returns the words of all blocks. Raises PoolError."""
        held = self._held[session]
        if held.tokens is None:
            refs = held.own if held.guard is None else held.guard.refs
            if len(held.own):
                self._grants[peer, session.number] = held.own
                held.own = _NONE
        else:
            refs = self._insert(held, held.tokens, session.prepare.namespace)
        self.free(session)
        return to_words(refs)

    def quarantine(self, session: DestinationSession) -> None:
        """Let go of all that nobody writes to."""
        self._quarantined.add(session)
        match = self._held[session].match
        if match is not None:
            match.release()

    def free(self, session: DestinationSession) -> None:
        """Let go of everything."""
        held = self._held.pop(session)
        self._quarantined.discard(session)
        if held.match is not None:
            held.match.release()
        if len(held.own):
            self._pool.free_mem(held.own)
        if held.guard is not None:
            self._pool.unguard(held.guard)

    def revoke(self, peer: Owner, number: int) -> None:
        """Take back a grant, less what was freed or inserted meanwhile."""
        refs = self._pool.still_allocated(self._grants.pop((peer, number), _NONE))
        if len(refs):
            self._pool.free_mem(refs)

    def revoke_all(self, peer: Owner) -> None:
        for owner, number in list(self._grants):
            if owner == peer:
                self.revoke(owner, number)

    def claim(self, refs: RefArray) -> None:
        """Blocks of grants become the local caller's."""
        for key, granted in list(self._grants.items()):
            left = granted[~np.isin(granted, refs)]
            if len(left):
                self._grants[key] = left
            else:
                del self._grants[key]

    def prune(self) -> None:
        """Forget grants of which nothing is left."""
        for key, granted in list(self._grants.items()):
            left = self._pool.still_allocated(granted)
            if len(left) < len(granted):
                self._grants[key] = left
            if not len(left):
                del self._grants[key]

    def grantees(self) -> set[Owner]:
        return {owner for owner, _ in self._grants}

    def _insert(self, held: _Held, tokens: TokenArray, namespace: str) -> RefArray:
        """Returns the index's blocks for the tokens."""
        guard, held.guard = held.guard, None
        if guard is not None:  # into blocks of a local caller; duplicates stay the caller's
            self._pool.unguard(guard)
            result = self._pool.insert(tokens, guard.refs, namespace, pin=True)
        else:
            assert held.match is not None
            given = np.concatenate((held.match.refs, held.own))
            result = self._pool.insert(tokens, given, namespace, pin=True)
            held.own = result.duplicate  # somebody else was faster
        assert result.match is not None
        result.match.release()
        return result.match.refs

    def _guard_target(self, prepare: Prepare, words: bytes, heads: range) -> Guard:
        target = _refs(words, self._owner_number)
        if len(target) != prepare.blocks:
            raise LengthMismatch(f"{prepare.blocks} blocks for {len(target)} references")
        return self._pool.guard(target, heads)

    def _tokens(self, prepare: Prepare, data: bytes) -> TokenArray:
        block_bytes = 4 * self._pool.layout.block_tokens
        if len(data) != prepare.blocks * block_bytes:
            raise LengthMismatch(
                f"{prepare.blocks} blocks of {self._pool.layout.block_tokens} tokens "
                f"for {len(data)} bytes of tokens"
            )
        return from_wire_tokens(data)


def _refs(words: bytes, owner_number: int) -> RefArray:
    try:
        return from_words(words, owner_number)
    except ValueError as error:
        raise LengthMismatch(str(error)) from error
