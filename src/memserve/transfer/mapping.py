"""`PeerMemory`: a peer's shared memory segments, mapped into this process."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from memserve.errors import SegmentGone
from memserve.pool.segment import is_segment_name
from memserve.pool.storage import lock_pages, unlock_pages
from memserve.transfer.base import Region

# Segments up to this size are mapped with all their pages, 40 ms for each GiB: page faults of first
# writes take as long as the copy. Larger ones would delay heartbeats for seconds.
POPULATE_BYTES = 4 * 1024 * 1024 * 1024
_MADV_POPULATE_WRITE = 23  # linux/mman.h
_libc = ctypes.CDLL(None)


def _populate(memory: NDArray[np.uint8]) -> None:
    """Map all pages now. Unlike MAP_POPULATE this releases the GIL, so that decoding goes on.
    Kernels before 5.14 refuse; pages are then mapped at their first write."""
    _libc.madvise(
        ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes), _MADV_POPULATE_WRITE
    )


class Mapping:
    """One mapped segment. The memory stays mapped as long as this object exists."""

    def __init__(self, path: Path, nbytes: int, page_locked: bool) -> None:
        """`page_locked`: for direct copies from a GPU. Raises SegmentGone."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as error:
            raise SegmentGone(f"shared memory {path}: {error.strerror}") from error
        self._close = weakref.finalize(self, os.close, descriptor)
        self._descriptor = descriptor
        self.path = path
        size = os.fstat(descriptor).st_size
        if size != nbytes:
            raise SegmentGone(f"shared memory {path} has {size} bytes, {nbytes} were announced")
        self.bytes: NDArray[np.uint8] = np.frombuffer(
            mmap.mmap(descriptor, nbytes, mmap.MAP_SHARED), dtype=np.uint8
        )
        if nbytes <= POPULATE_BYTES:
            _populate(self.bytes)
        if page_locked:
            memory = torch.from_numpy(self.bytes)
            lock_pages(memory)
            self._unlock = weakref.finalize(self, unlock_pages, memory)

    def require_current(self) -> None:
        """Raise SegmentGone if the owner has given the segment back."""
        if not os.fstat(self._descriptor).st_nlink:
            raise SegmentGone(f"shared memory {self.path}: its owner has given it back")


class PeerMemory:
    """The segments of one peer, mapped when they are first written to."""

    def __init__(self, directory: Path, page_locked: bool) -> None:
        self._directory = directory
        self._page_locked = page_locked
        self._mappings: dict[str, Mapping] = {}

    def open(self, region: Region) -> Mapping:
        """Return the mapping of a region. Raises SegmentGone if it cannot be mapped."""
        if region.segment is None:
            raise SegmentGone(f"{region.medium.name} of the peer is not shared memory")
        if not is_segment_name(region.segment):
            raise SegmentGone(f"{region.segment!r} is not the name of a segment")
        mapping = self._mappings.get(region.segment)
        if mapping is None:
            path = self._directory / region.segment
            mapping = Mapping(path, region.nbytes, self._page_locked)
            self._mappings[region.segment] = mapping
        mapping.require_current()
        return mapping

    def keep_only(self, regions: list[Region]) -> None:
        """Drop the mappings of other regions; they are unmapped when no copy uses them."""
        kept = {region.segment for region in regions}
        for name in self._mappings.keys() - kept:
            del self._mappings[name]
