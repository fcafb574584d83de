"""`EventStream`: orders one instance's KV events and applies them to the prompt trees. No I/O.

Batches may be lost, repeated or late. A batch that cannot be applied yet is kept. The caller checks
`gap`, and closes it with the missing batches (a replay), with a snapshot (`restore`), or, if
neither is available, by forgetting the instance's blocks (`skip`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import msgspec
import numpy as np

from memserve.api.kv_events import (
    MAX_NAMESPACE,
    AllBlocksCleared,
    BlockHash,
    BlockRemoved,
    BlockStored,
    EventBatch,
    KVSnapshot,
    ServerBlocks,
    StoredBlocks,
    holds_prefix,
    namespace_of,
    place_of,
    text_blocks,
)
from memserve.scheduler.prompt_tree import PromptTree
from memserve.types import InstanceId, Namespace, TokenArray

# Batches kept while a gap is open: some minutes' worth. A longer gap needs a snapshot anyway.
MAX_AHEAD = 20_000
MAX_AHEAD_ITEMS = 8_000_000  # tokens and hashes in the kept batches: up to 300 MB


class EventCounts(msgspec.Struct):
    """Counters of one instance's events since the gateway first followed it."""

    batches: int = 0  # applied
    events: int = 0
    duplicates: int = 0  # batches that were applied before
    gaps: int = 0
    unplaced: int = 0  # stored events whose parent is not known
    malformed: int = 0
    snapshots: int = 0
    replays: int = 0
    resets: int = 0  # times that the instance's blocks were forgotten
    foreign: int = 0  # batches and snapshots that name another instance


class EventStream:
    """The events of one instance in the trees, within one epoch, from a join to `close`."""

    def __init__(
        self,
        tree: PromptTree,
        instance: InstanceId,
        block_tokens: int,
        counts: EventCounts,
        position: int | None = None,
    ) -> None:
        """`position`: last sequence number that counts as applied; None: unknown until a
        snapshot."""
        self.position = position
        self.counts = counts
        self.newest = -1  # highest sequence number seen
        self.applied_at = 0.0  # `ts` of the last batch applied
        self._tree = tree
        self._instance = instance
        self._block_tokens = block_tokens
        self._closed = False
        self._ahead: dict[int, EventBatch] = {}
        self._ahead_items = 0  # upper bound of tokens and hashes in `_ahead`

    @property
    def gap(self) -> bool:
        """Whether batches or a snapshot are missing."""
        return self.position is None or bool(self._ahead)

    @property
    def lag(self) -> int:
        """Distance, in batches, from the last applied to the newest seen."""
        return max(0, self.newest - (-1 if self.position is None else self.position))

    def close(self) -> None:
        """Ignore all later batches: the instance has left, or another stream replaces this one."""
        self._closed = True

    def closed(self) -> bool:
        return self._closed

    def offer(self, sequence: int, batch: EventBatch) -> None:
        """Take a batch, live or replayed: apply it, keep it for later, or ignore it."""
        if self._closed:
            return
        self.newest = max(self.newest, sequence)
        if self.position is not None and sequence <= self.position:
            self.counts.duplicates += 1
        elif self.position is not None and sequence == self.position + 1:
            self._apply(sequence, batch)
            self._catch_up()
        else:
            if not self.gap:
                self.counts.gaps += 1
            self._ahead_items += _items(batch)
            if len(self._ahead) >= MAX_AHEAD or self._ahead_items > MAX_AHEAD_ITEMS:
                self._ahead.clear()
                self._ahead_items = _items(batch)
            self._ahead[sequence] = batch

    def restarted(self, sequence: int, batch: EventBatch) -> bool:
        """Return whether a batch is of a restarted engine that sends no epoch: its sequence number
        was applied before, but its timestamp is later."""
        seen = self.position is not None and sequence <= self.position
        return seen and batch.ts > self.applied_at

    def restore(self, snapshot: KVSnapshot) -> Iterator[None]:
        """Replace the instance's blocks by a snapshot, one run of blocks per iteration. Iterate to
        the end, with pauses if needed; until then call no method but `offer`. A snapshot older
        than `position` changes nothing."""
        late = self.position is not None and self.position >= snapshot.sequence
        if late or self.closed():
            return
        self.counts.snapshots += 1
        self.position = None  # so that `offer` keeps batches and applies none until the end
        self._tree.cleared(self._instance)
        runs: Iterable[StoredBlocks | ServerBlocks] = chain(snapshot.blocks, snapshot.server_blocks)
        for run in runs:
            self._store_run(run)
            yield
            if self.closed():
                return
        self.position = snapshot.sequence
        self.newest = max(self.newest, snapshot.sequence)
        self._ahead = {s: batch for s, batch in self._ahead.items() if s > snapshot.sequence}
        self._catch_up()

    def skip(self) -> None:
        """Give up on missing batches: forget the instance's blocks, and apply the kept batches."""
        if self._closed:
            return
        self.counts.resets += 1
        self._tree.cleared(self._instance)
        if self._ahead:
            self.position = min(self._ahead) - 1
            self._catch_up()

    # --- internal -------------------------------------------------------------------------

    def _store_run(self, run: StoredBlocks | ServerBlocks) -> None:
        try:
            hashes, tokens = run.hashes, run.token_array
        except ValueError:  # length is no multiple of a hash or token
            self.counts.malformed += 1
        else:
            self._store(run.namespace, run.parent, hashes, tokens, run.place)

    def _catch_up(self) -> None:
        while self._ahead and self.position is not None:
            batch = self._ahead.pop(self.position + 1, None)
            if batch is None:
                return
            self._apply(self.position + 1, batch)
        self._ahead_items = 0

    def _apply(self, sequence: int, batch: EventBatch) -> None:
        self.position = sequence
        self.applied_at = batch.ts
        self.counts.batches += 1
        self.counts.events += len(batch.events)
        for event in batch.events:
            if isinstance(event, BlockStored):
                self._apply_stored(event)
            elif isinstance(event, BlockRemoved):
                self._apply_removed(event)
            elif isinstance(event, AllBlocksCleared):
                self._tree.cleared(self._instance)

    def _apply_stored(self, event: BlockStored) -> None:
        if not holds_prefix(event):
            return
        count = text_blocks(event)
        if event.block_size != self._block_tokens:
            self.counts.malformed += 1
            return
        try:
            tokens = np.array(event.token_ids[: count * event.block_size], dtype=np.int32)
        except OverflowError:
            self.counts.malformed += 1
            return
        names = event.block_hashes[:count]
        space = namespace_of(event)
        self._store(space, event.parent_block_hash, names, tokens, place_of(event))

    def _store(
        self,
        namespace: Namespace,
        parent: BlockHash | None,
        names: list[BlockHash],
        tokens: TokenArray,
        place: str | None = None,
    ) -> None:
        if len(namespace) > MAX_NAMESPACE:
            self.counts.malformed += 1
            return
        try:
            placed = self._tree.stored(self._instance, namespace, parent, names, tokens, place)
        except ValueError:
            self.counts.malformed += 1
        else:
            self.counts.unplaced += not placed

    def _apply_removed(self, event: BlockRemoved) -> None:
        if event.locality == "REMOTE":
            return
        try:
            self._tree.removed(self._instance, event.block_hashes, place_of(event))
        except ValueError:
            self.counts.malformed += 1


def _items(batch: EventBatch) -> int:
    """Size of a batch: its number of tokens and hashes."""
    return sum(
        len(event.block_hashes) + (len(event.token_ids) if isinstance(event, BlockStored) else 0)
        for event in batch.events
        if not isinstance(event, AllBlocksCleared)
    )
