"""Blocks that a vLLM server has cached, as far as its KV events have told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec
import numpy as np

from memserve.api.kv_events import (
    AllBlocksCleared,
    BlockHash,
    BlockRemoved,
    BlockStored,
    holds_prefix,
    place_of,
)
from memserve.types import TokenArray

_OWN_MEMORY = "GPU"  # vLLM's name for its own cache, also on a CPU

_Key = tuple[str | None, BlockHash]  # a copy of a block: its place and its hash


class _Block(NamedTuple):
    """Block `at` of an event, which has no token ids: those are in `tokens` [n * block_size]."""

    event: BlockStored
    tokens: TokenArray
    at: int

    @property
    def parent(self) -> BlockHash | None:
        hashes = self.event.block_hashes
        return hashes[self.at - 1] if self.at else self.event.parent_block_hash

    def is_next_of(self, other: _Block) -> bool:
        return self.event is other.event and self.at == other.at + 1


class ServerBlocks:
    """Blocks held by one server. Keeps 4 bytes for each of their tokens."""

    def __init__(self) -> None:
        self._held: dict[_Key, _Block] = {}  # in the order of their events

    def __len__(self) -> int:
        return len(self._held)

    def apply(self, events: Iterable[BlockStored | BlockRemoved | AllBlocksCleared]) -> bool:
        """Apply a batch. Returns whether the server has cleared its own memory while blocks in
        memory behind it remain: followers of its events have forgotten those."""
        cleared = False
        for event in events:
            if isinstance(event, BlockStored):
                self._store(event)
            elif isinstance(event, BlockRemoved):
                if event.locality != "REMOTE":
                    place = place_of(event)
                    for name in event.block_hashes:
                        self._held.pop((place, name), None)
            else:
                cleared = True
                self._held = {
                    key: block
                    for key, block in self._held.items()
                    if block.event.medium not in (None, _OWN_MEMORY)
                }
        return cleared and bool(self._held)

    def clear(self) -> None:
        self._held.clear()

    def stored(self) -> list[BlockStored]:
        """Return events that store all held blocks that can be used, parents first."""
        runs: list[list[_Block]] = []
        for block in self._parents_first():
            if runs and block.is_next_of(runs[-1][-1]):
                runs[-1].append(block)
            else:
                runs.append([block])
        return [_event(run) for run in runs]

    def _store(self, event: BlockStored) -> None:
        if not holds_prefix(event):
            return
        if len(event.token_ids) != len(event.block_hashes) * event.block_size:
            return  # malformed: no follower takes it
        try:
            tokens = np.array(event.token_ids, dtype=np.int32)
        except OverflowError:
            return
        place, bare = place_of(event), msgspec.structs.replace(event, token_ids=[])
        for at, name in enumerate(event.block_hashes):
            # The last position of a block that is stored again: behind a parent that came back.
            self._held.pop((place, name), None)
            self._held[place, name] = _Block(bare, tokens, at)

    def _parents_first(self) -> Iterator[_Block]:
        """Yield the held blocks whose prompts are held from the beginning: others cannot be used,
        and a follower could not place them."""
        by_name = {name: (place, name) for place, name in self._held}
        whole: set[BlockHash] = set()
        seen: set[_Key] = set()
        for key in self._held:
            chain: list[_Key] = []
            above: _Key | None = key
            while above is not None and above not in seen:
                seen.add(above)
                chain.append(above)
                parent = self._held[above].parent
                above = None if parent is None else by_name.get(parent)
            parent = self._held[chain[-1]].parent if chain else None
            if parent is None or parent in whole:
                whole.update(name for _, name in chain)
                yield from (self._held[each] for each in reversed(chain))


def _event(run: list[_Block]) -> BlockStored:
    first, (event, tokens, last) = run[0].at, run[-1]
    size, keys = event.block_size, event.extra_keys
    return msgspec.structs.replace(
        event,
        block_hashes=event.block_hashes[first : last + 1],
        parent_block_hash=run[0].parent,
        token_ids=tokens[first * size : (last + 1) * size].tolist(),
        extra_keys=None if keys is None else keys[first : last + 1],
    )
