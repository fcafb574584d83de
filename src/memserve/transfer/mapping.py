"""A peer's shared memory, mapped into this process."""

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

# Segments up to this size get their page table at once, 40 ms for each GiB. One by one, the page
# faults of first writes take as long as the copy; but heartbeats must not wait for seconds.
POPULATE_BYTES = 4 * 1024 * 1024 * 1024
_MADV_POPULATE_WRITE = 23  # linux/mman.h
_libc = ctypes.CDLL(None)


def _populate(memory: NDArray[np.uint8]) -> None:
    """Map all pages now. MAP_POPULATE would do it with the interpreter's lock held, and every
    sequence that decodes here would stand still; calls through ctypes give the lock up. Kernels
    before 5.14 refuse, and pages are mapped when they are written to.
    """
    _libc.madvise(
        ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes), _MADV_POPULATE_WRITE
    )


class Mapping:
    """One segment. The memory stays as long as this object lives, whatever its owner does."""

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
        """Raises SegmentGone where the region cannot be mapped, now or ever."""
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
        """Unmap what the peer no longer has, as soon as no copy uses it."""
        kept = {region.segment for region in regions}
        for name in self._mappings.keys() - kept:
            del self._mappings[name]
