"""Blocks that a vLLM server has cached, according to its KV events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec
import numpy as np

from memserve.api.kv_events import (
    AllBlocksCleared,
    BlockHash,
    BlockRemoved,
    BlockStored,
    ServerBlocks,
    extra_keys,
    holds_prefix,
    namespace_of,
    place_of,
    text_blocks,
)
from memserve.tokens import to_wire
from memserve.types import Namespace

_OWN_MEMORY = ("GPU", "None")  # vLLM's name for its own cache, also on a CPU; a medium not told


class _Block(msgspec.Struct, frozen=True, gc=False):
    """A block. `namespace`: of its prompt, if `parent` is None. `tokens`: int32 [block_tokens]."""

    parent: BlockHash | None
    namespace: Namespace
    tokens: bytes


_Held = dict[str | None, dict[BlockHash, _Block]]  # by place and hash


class ServerCache:
    """Blocks held by one server. Takes some 200 bytes per block, and 4 per token."""

    def __init__(self) -> None:
        self._held: _Held = {}

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    def apply(self, events: Iterable[BlockStored | BlockRemoved | AllBlocksCleared]) -> bool:
        """Apply a batch. Returns whether the server has cleared its own memory and still has blocks
        in memory behind it, which the followers of its events have forgotten."""
        cleared = False
        for event in events:
            if isinstance(event, BlockStored):
                self._store(event)
            elif isinstance(event, BlockRemoved):
                if event.locality != "REMOTE":
                    held = self._held.get(place_of(event), {})
                    for name in event.block_hashes:
                        held.pop(name, None)
            else:
                cleared = True
                self._held = {p: held for p, held in self._held.items() if not _is_own(p)}
        return cleared and bool(len(self))

    def clear(self) -> None:
        self._held.clear()

    def copy(self) -> ServerCache:
        """Return a copy, for `stored` on another thread."""
        copy = ServerCache()
        copy._held = {place: dict(held) for place, held in self._held.items()}
        return copy

    def stored(self) -> list[ServerBlocks]:
        """Return runs of all held blocks that can be used, parents first."""
        runs: list[list[BlockHash]] = []
        places: list[str | None] = []
        for place, name in _parents_first(self._held):
            block = self._held[place][name]
            if runs and places[-1] == place and runs[-1][-1] == block.parent:
                runs[-1].append(name)
            else:
                runs.append([name])
                places.append(place)
        return [self._run(place, names) for place, names in zip(places, runs, strict=True)]

    def _run(self, place: str | None, names: list[BlockHash]) -> ServerBlocks:
        blocks = [self._held[place][name] for name in names]
        tokens = b"".join(block.tokens for block in blocks)
        return ServerBlocks(blocks[0].namespace, blocks[0].parent, names, tokens, place)

    def _store(self, event: BlockStored) -> None:
        size = event.block_size
        if not holds_prefix(event) or len(event.token_ids) != len(event.block_hashes) * size:
            return  # followers ignore such an event
        try:
            tokens = to_wire(np.array(event.token_ids, dtype=np.int32))
        except OverflowError:
            return
        held = self._held.setdefault(place_of(event), {})
        namespace, parent = namespace_of(event), event.parent_block_hash
        for at, name in enumerate(event.block_hashes[: text_blocks(event)]):
            held[name] = _Block(parent, namespace, tokens[at * 4 * size : (at + 1) * 4 * size])
            parent = name


def stored_event(run: ServerBlocks, block_tokens: int) -> BlockStored:
    """Return the event that stores a run."""
    begins = run.parent is None
    return BlockStored(
        block_hashes=run.hashes,
        parent_block_hash=run.parent,
        token_ids=run.token_array.tolist(),
        block_size=block_tokens,
        lora_id=None,
        medium=run.place,  # with the cache group, as `place_of` returns it
        lora_name=None,
        extra_keys=extra_keys(run.namespace, len(run.hashes)) if begins else None,
    )


def _is_own(place: str | None) -> bool:
    return place is None or place.partition("/")[0] in _OWN_MEMORY


def _parents_first(held: Mapping[str | None, Mapping[BlockHash, _Block]]) -> Iterator[_Key]:
    """Yield the place and hash of the held blocks whose prompts are held from the beginning. Other
    blocks cannot be used, and followers could not place them in their trees."""
    anywhere = {name: place for place, blocks in held.items() for name in blocks}
    whole: set[BlockHash] = set()
    seen: set[_Key] = set()
    for place, blocks in held.items():
        for name in blocks:
            chain: list[_Key] = []
            above: _Key | None = place, name
            parent: BlockHash | None = None
            while above is not None and above not in seen:
                seen.add(above)
                chain.append(above)
                at, _ = above
                parent = held[at][above[1]].parent
                above = None
                if parent is not None and (parent in held[at] or parent in anywhere):
                    above = at if parent in held[at] else anywhere[parent], parent
            if chain and (parent is None or parent in whole):
                whole.update(name for _, name in chain)
                yield from reversed(chain)


_Key = tuple[str | None, BlockHash]  # a copy of a block: its place and its hash
