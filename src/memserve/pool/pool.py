"""BlockPool: the KV memory of one instance."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike

from memserve.clock import Clock, MonotonicClock
from memserve.errors import (
    ForeignBlock,
    LengthMismatch,
    NotOwned,
    PoolError,
    WrongMedium,
)
from memserve.pool import integrity
from memserve.pool.allocator import ACTIVE, NOTHING, BlockAllocator
from memserve.pool.blocks import Blocks, Part, as_refs
from memserve.pool.eviction import Eviction, make_eviction
from memserve.pool.layout import KVLayout
from memserve.pool.listener import IndexListener, StoredRun, stored_runs
from memserve.pool.moves import Mover, Moving
from memserve.pool.prefix_cache import PrefixCache
from memserve.pool.results import InsertResult, Match, MediumStats, PoolStats
from memserve.pool.segment import sweep
from memserve.pool.storage import BlockStore, Extent
from memserve.pool.tiers import Tiers
from memserve.tokens import as_tokens
from memserve.types import (
    SHARED,
    Epoch,
    IndexArray,
    InstanceId,
    Medium,
    Owner,
    RefArray,
    new_epoch,
    ref_medium,
    retire_owner,
)

T = TypeVar("T")

# Default size of a DRAM segment: few segments in all, each small enough to give back.
SEGMENT_BYTES = 64 * 1024 * 1024
MAX_INITIAL_SEGMENTS = 64


class BlockPool:
    """Fixed-size KV blocks in HBM and DRAM, and the index of the cached ones.

    References are int64 arrays (see `memserve.types`); tokens are anything that numpy turns
    into int32. Every error leaves the pool unchanged.

    Calls may come from any thread. The owner of an active block synchronises access to its
    bytes: the pool does not order `write`, `read` or a kernel on `layer_views` against each
    other. Bytes of inserted blocks never change.
    """

    def __init__(
        self,
        layout: KVLayout,
        hbm_blocks: int,
        dram_blocks: int = 0,
        instance: str = "p0",
        device: str | torch.device = "cpu",
        eviction: Literal["lru", "cost"] | Eviction = "lru",
        clock: Clock | None = None,
        dram_segment_blocks: int | None = None,
        epoch: int | None = None,
    ) -> None:
        """`epoch`: must differ from the epochs of the instance's earlier lives; default: a random
        one. Raises SharedMemoryFull if the host has no memory for the blocks.
        """
        self.layout = layout
        self.owner = Owner(InstanceId(instance), new_epoch() if epoch is None else Epoch(epoch))
        self.device = torch.device(device)
        self._lock = threading.RLock()
        self._mover = Mover(self._lock)
        self._closed = False
        self._matches: set[Match] = set()
        self._segment_blocks = dram_segment_blocks or max(
            1, SEGMENT_BYTES // layout.block_bytes, dram_blocks // MAX_INITIAL_SEGMENTS
        )
        sweep()
        self._hbm = BlockStore(layout, self.device, pinned=False)
        self._dram = BlockStore(layout, torch.device("cpu"), pinned=self.device.type == "cuda")
        self._blocks = Blocks(self.owner)
        policy = make_eviction(eviction, clock or MonotonicClock())
        self._tiers = Tiers(self._blocks, (self._hbm, self._dram), layout.block_tokens, policy)
        self._prefix_cache = PrefixCache(self._blocks, self._tiers, policy)
        self._index = self._tiers.index
        try:
            self._blocks.hbm.check_growth(hbm_blocks)
            self._hbm.grow(hbm_blocks)
            self._blocks.hbm.grow(hbm_blocks)
            self.grow_dram(dram_blocks)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the memory. Tensors from `layer_views` stay valid; references do not."""
        with self._mover.turn, self._lock:
            self._closed = True
            self._hbm.close()
            self._dram.close()
        retire_owner(self.owner)

    # --- memory ---------------------------------------------------------------------------

    def alloc_mem(
        self,
        n: int,
        medium: Medium = Medium.HBM,
        instance: str | None = None,
        *,
        private: bool = False,
    ) -> RefArray:
        """Return references [n] to blocks that the caller owns until `free_mem` or `insert`.

        Allocates all `n` or raises. Evicts unpinned cached blocks as needed: from HBM to DRAM
        if DRAM has room or colder blocks, else drops them. `private`: peers may not write to
        these blocks. Raises OutOfBlocks; ForeignBlock if `instance` is not this pool's.
        """
        if n < 0:
            raise LengthMismatch(f"cannot allocate {n} blocks")
        with self._lock:
            self._require_open()
            if instance is not None and instance != self.owner.instance:
                raise ForeignBlock(f"no peer {instance!r} is connected to {self.owner.instance!r}")
            blocks = self._blocks[medium]
            if n <= blocks.free or self._tiers.drop_for(medium, n):
                return blocks.ref[blocks.take(n, private)]
        return self._mover.run(self._while_open(self._tiers.allocate(medium, n, private)))

    def free_mem(self, refs: ArrayLike) -> None:
        """Free active blocks.

        Raises DoubleFree, StaleBlock, ForeignBlock; PinnedBlock or NotOwned for blocks that
        the index owns.
        """
        given = as_refs(refs)
        with self._lock:
            for blocks, _, index in self._blocks.freeable(given):
                blocks.free_active(index)

    def write(self, refs: ArrayLike, kv: torch.Tensor) -> None:
        """Copy `kv` [n, layers, 2, block_tokens, kv_heads, head_dim] into active blocks.

        Raises LengthMismatch, LayoutMismatch, StaleBlock, ForeignBlock; NotOwned for cached
        blocks, whose KV never changes.
        """
        given = as_refs(refs)
        self.layout.require_kv(len(given), values := torch.as_tensor(kv))
        with self._lock:
            self._require_open()
            parts, state = self._blocks.live(given)
            if (state != ACTIVE).any():
                at = int((state != ACTIVE).argmax())
                name = f"{self._blocks.name(int(given[at]))} (position {at})"
                raise NotOwned(f"{name} is cached; cached KV is immutable")
        for blocks, where, index in parts:
            part = values if isinstance(where, slice) else values[torch.from_numpy(where)]
            self._store(blocks).scatter(index, part)

    def read(self, refs: ArrayLike) -> torch.Tensor:
        """Return a copy of the blocks' KV [n, layers, 2, block_tokens, kv_heads, head_dim].

        The copy is on the pool's device if all blocks are in HBM, otherwise on the host.
        Raises StaleBlock, ForeignBlock.
        """
        given = as_refs(refs)
        with self._lock:
            self._require_open()
            parts, state = self._blocks.live(given)
            # `follows=False`: the copy below reads these blocks, even if the index moves the KV.
            reading = self._tiers.holds.open(np.unique(given[state != ACTIVE]), follows=False)
        try:
            if len(parts) == 1:
                return self._store(parts[0].blocks).gather(parts[0].indices)
            shape = (len(given), *self.layout.block_shape)
            out = torch.empty(shape, dtype=self.layout.torch_dtype)
            for blocks, where, index in parts:
                out[torch.from_numpy(where)] = self._store(blocks).gather(index).cpu()
            return out
        finally:
            with self._lock:
                self._tiers.let_go(reading)

    # --- index ----------------------------------------------------------------------------

    def match(self, tokens: ArrayLike, namespace: str = SHARED, *, in_hbm: bool = False) -> Match:
        """Return the longest cached prefix in whole blocks, pinned until `Match.release`.

        `in_hbm`: first move the prefix's DRAM blocks to HBM; cut the match where HBM is full.
        """
        data = as_tokens(tokens).tobytes()
        with self._lock:
            self._require_open()
            path = self._prefix_cache.find(namespace, data)
            if not (in_hbm and path.in_dram):
                return self._open_match(path.refs, path.in_dram)
        return self._mover.run(self._bringing_in(namespace, data))

    def insert(
        self, tokens: ArrayLike, refs: ArrayLike, namespace: str = SHARED, *, pin: bool = False
    ) -> InsertResult:
        """Put the KV of `tokens` [n * block_tokens], in blocks `refs` [n], into the index.

        The index becomes the owner of the `new` blocks. If it already has a block for a
        prefix, the caller's block is a `duplicate` and stays the caller's. Blocks that came
        from a match of the same prefix are in neither list.

        `pin`: also return a match of all the tokens, made under the same lock. Then a caller's
        HBM block replaces the index's DRAM block for the same prefix, and counts as `new`.

        Raises LengthMismatch; NotOwned for blocks that are cached for other tokens, or named
        twice; StaleBlock, ForeignBlock.
        """
        array, given = as_tokens(tokens), as_refs(refs)
        if len(array) != len(given) * self.layout.block_tokens:
            raise LengthMismatch(
                f"{len(given)} blocks of {self.layout.block_tokens} tokens for {len(array)} tokens"
            )
        data = array.tobytes()
        with self._lock:
            self._require_open()
            new, duplicate, known, rest = self._prefix_cache.insert(namespace, data, given, pin)
            if not pin:
                return InsertResult(new, duplicate)
            refs = np.concatenate((known, rest))
            return InsertResult(new, duplicate, self._open_match(refs, in_dram=True))

    def delete(self, tokens: ArrayLike, namespace: str = SHARED) -> int:
        """Free all cached prompts that begin with the whole blocks of `tokens`, except blocks
        that another cached prompt shares; return the number of freed blocks.

        Pinned blocks and the blocks before them stay. No tokens: the whole namespace.
        """
        array = as_tokens(tokens)
        with self._lock:
            whole = len(array) - len(array) % self.layout.block_tokens
            if len(array) and not whole:
                return 0  # `tokens` are less than one block
            return self._prefix_cache.delete(namespace, array[:whole].tobytes())

    # --- tiers ----------------------------------------------------------------------------

    def swap_out(self, n: int) -> int:
        """Move up to `n` unpinned cached blocks from HBM to DRAM, coldest first; return the
        number of moved blocks."""
        if n < 0:
            raise LengthMismatch(f"cannot swap out {n} blocks")
        return self._mover.run(self._while_open(self._tiers.swap_out(n)))

    def swap_in(self, refs: ArrayLike) -> RefArray:
        """Move DRAM blocks to HBM; return HBM references [n] in the order of `refs`.

        HBM blocks pass through. Active blocks stay the caller's; for cached ones the index names
        the HBM block, and matches keep the DRAM block. Raises OutOfBlocks, StaleBlock,
        ForeignBlock; NotOwned for detached blocks, and for blocks named twice.
        """
        return self._mover.run(self._while_open(self._prefix_cache.swap_in(as_refs(refs))))

    def grow_dram(self, blocks: int) -> None:
        """Add DRAM blocks. Raises SharedMemoryFull; PoolError above MAX_BLOCKS."""
        with self._mover.turn, self._lock:
            self._require_open()
            self._blocks.dram.check_growth(blocks)
            before = len(self._dram.extents)
            left = blocks
            try:
                while left > 0:
                    self._dram.grow(min(left, self._segment_blocks))
                    left -= self._segment_blocks
            except BaseException:
                while len(self._dram.extents) > before:
                    self._dram.shrink()
                raise
            self._blocks.dram.grow(blocks)

    def shrink_dram(self, blocks: int) -> int:
        """Release up to `blocks` DRAM blocks, in whole segments from the end; return the number
        of released blocks.

        Cached blocks move to other DRAM blocks, evicting the coldest if none is free. Stops at
        a segment with active or pinned blocks.
        """
        return self._mover.run(self._tiers.shrink_dram(blocks))

    # --- for engines and operators --------------------------------------------------------

    def layer_views(self) -> list[torch.Tensor]:
        """Return a view of HBM per layer: `[hbm_blocks, 2, block_tokens, kv_heads, head_dim]`."""
        layers = range(self.layout.layers)
        return [slab.view[:, layer] for slab in self._hbm.extents for layer in layers]

    def hbm_indices(self, refs: ArrayLike) -> IndexArray:
        """Return indices [n] into `layer_views`. Raises WrongMedium, StaleBlock, ForeignBlock."""
        given = as_refs(refs)
        with self._lock:
            parts, _ = self._blocks.live(given)
        if not parts:
            return NOTHING
        if len(parts) > 1 or parts[0].blocks.medium is not Medium.HBM:
            at = int((ref_medium(given) != Medium.HBM).argmax())
            raise WrongMedium(
                f"{self._blocks.name(int(given[at]))} (position {at}) is not in HBM; swap it in"
            )
        return parts[0].indices

    def extents(self, medium: Medium) -> tuple[Extent, ...]:
        """Return the medium's extents at this moment; DRAM grows and shrinks."""
        with self._lock:
            self._require_open()
            return tuple((self._hbm if medium is Medium.HBM else self._dram).extents)

    def listen(self, listener: IndexListener | None) -> None:
        """Set the one listener for changes of the index; it is called under the pool's lock."""
        with self._lock:
            self._index.listener = listener

    def indexed(self, mark: Callable[[], None]) -> list[StoredRun]:
        """Return all runs of the index, parents first; `mark` runs under the same lock."""
        with self._lock:
            mark()
            return list(stored_runs(self._index.roots))

    def evictable(self, medium: Medium = Medium.HBM) -> int:
        """Return the number of cached blocks that an allocation could evict."""
        with self._lock:
            return self._tiers.evictable(medium)

    def stats(self) -> PoolStats:
        with self._lock:
            return PoolStats(
                hbm=MediumStats.of(self._blocks.hbm),
                dram=MediumStats.of(self._blocks.dram),
                namespaces=len(self._index.roots),
                nodes=len(self._index.nodes),
                matches=len(self._matches),
                evictions=self._tiers.evictions,
                swapped_out=self._tiers.swapped_out,
                swapped_in=self._tiers.swapped_in,
            )

    def check_integrity(self) -> None:
        """Check that every block has exactly one owner. Raises IntegrityError.

        Reads the whole index and all block states: for tests and idle times.
        """
        with self._lock:
            pins = [part for match in self._matches for part in match._pinned]
            pins += self._tiers.holds.parts
            integrity.check(self._blocks, self._index, self._tiers.queues, pins)

    # --- inside ---------------------------------------------------------------------------

    def _while_open(self, moving: Moving[T]) -> Moving[T]:
        self._require_open()
        return (yield from moving)

    def _bringing_in(self, namespace: str, data: bytes) -> Moving[Match]:
        self._require_open()
        refs = yield from self._prefix_cache.bring_in(namespace, data)
        return self._match(refs, list(self._blocks.by_medium(refs)))

    def _require_open(self) -> None:
        if self._closed:
            raise PoolError(f"pool {self.owner.instance!r} is closed")

    def _store(self, blocks: BlockAllocator) -> BlockStore:
        return self._hbm if blocks.medium is Medium.HBM else self._dram

    def _open_match(self, refs: RefArray, in_dram: bool) -> Match:
        return self._match(refs, self._prefix_cache.pin(refs, in_dram))

    def _match(self, refs: RefArray, pinned: list[Part]) -> Match:
        match = Match(len(refs) * self.layout.block_tokens, refs, pinned, self._release_match)
        self._matches.add(match)
        return match

    def _release_match(self, match: Match) -> None:
        with self._lock:
            if match not in self._matches:
                return
            self._matches.remove(match)
            self._prefix_cache.unpin(match._pinned)
