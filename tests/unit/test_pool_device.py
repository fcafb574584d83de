"""A pool on a device whose copies run when somebody waits for them. Protects: nothing is handed on,
inserted or freed before the kernels that write or read it have run.

The device is PyTorch's `meta`, which has shapes and no bytes; copies to the host do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memserve.pool import storage
from memserve.pool.pool import BlockPool
from tests.pool_harness import LAYOUT

BLOCK = LAYOUT.block_tokens


class Stream:
    """A queue of kernels, counted."""

    def __init__(self) -> None:
        self.queued = self.run = 0

    @property
    def pending(self) -> bool:
        return self.run < self.queued


class Device(TorchDispatchMode):
    """The queue of a device's kernels (`Kernels`), and one of copies beside it. Every operation on
    its tensors stays pending until somebody waits for a mark behind it."""

    where = torch.device("meta")

    def __init__(self) -> None:
        super().__init__()
        self.compute, self.copies = Stream(), Stream()
        self.current = self.compute
        self.lost = False

    @property
    def queued(self) -> int:
        return self.compute.queued + self.copies.queued

    @property
    def pending(self) -> bool:
        return self.compute.pending or self.copies.pending

    def mark(self) -> Mark:
        return Mark(self, self.current)

    @contextmanager
    def copy_stream(self) -> Iterator[None]:
        self.current = self.copies
        try:
            yield
        finally:
            self.current = self.compute

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        given = [each for each in (*args, *options.values()) if isinstance(each, torch.Tensor)]
        here = options.get("device") == self.where or any(each.is_meta for each in given)
        if not here or func.is_view:
            return func(*args, **options)
        self.current.queued += 1
        if func is torch.ops.aten.copy_.default and not args[0].is_meta:
            return args[0]  # there are no bytes to copy
        return func(*args, **options)


class Mark:
    def __init__(self, device: Device, stream: Stream) -> None:
        self._device = device
        self._stream = stream
        self._place = stream.queued

    def synchronize(self) -> None:
        if self._device.lost:
            raise RuntimeError("the device is lost")
        self._stream.run = max(self._stream.run, self._place)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made, host = Device(), storage.kernels_of(torch.device("cpu"))
    monkeypatch.setattr(storage, "kernels_of", lambda at: host if at.type == "cpu" else made)
    beside = lambda at: nullcontext if at.type == "cpu" else made.copy_stream  # noqa: E731
    monkeypatch.setattr(storage, "copy_stream_of", beside)
    for name in ("insert", "free_mem"):
        inner = getattr(BlockPool, name)

        def behind(
            pool: BlockPool, *given: object, inner: Callable[..., object] = inner, **options: object
        ) -> object:
            assert not made.pending, "copies may still read or write these blocks"
            return inner(pool, *given, **options)

        monkeypatch.setattr(BlockPool, name, behind)
    with made:
        yield made


@pytest.fixture
def pool(device: Device) -> Iterator[BlockPool]:
    with BlockPool(LAYOUT, 8, 8, "p0", "meta") as made:
        yield made


def kv(blocks: int) -> torch.Tensor:
    return torch.zeros(blocks, *LAYOUT.block_shape, dtype=LAYOUT.torch_dtype)


def test_memory_is_zeroed_before_anybody_has_it(device: Device, pool: BlockPool) -> None:
    """A copy on another stream could come first."""
    assert device.compute.queued
    assert not device.pending


def test_a_swap_waits_for_its_own_copies_alone(device: Device, pool: BlockPool) -> None:
    tokens = np.arange(4 * BLOCK)
    refs = pool.alloc_mem(4)
    pool.write(refs, kv(4))
    pool.insert(tokens, refs)
    pool.layer_views()[0][7].add_(1)  # a step that runs
    assert device.compute.pending
    assert pool.swap_out(4) == 4
    out = device.copies.queued
    assert out >= 1  # neighbours go together
    assert not device.copies.pending
    with pool.match(tokens) as match:
        pool.swap_in(match.refs)
    assert device.copies.queued > out
    assert not device.copies.pending
    assert device.compute.pending
    pool.check_integrity()


def test_what_was_written_is_there_when_the_call_returns(device: Device, pool: BlockPool) -> None:
    refs = pool.alloc_mem(3)
    before = device.queued
    pool.write(refs, kv(3))
    assert device.queued > before  # something was queued, and has run
    assert not device.pending
    pool.insert(np.arange(3 * BLOCK), refs)


def test_a_read_lets_go_of_blocks_that_it_has_read(device: Device, pool: BlockPool) -> None:
    refs = pool.alloc_mem(2)
    pool.write(refs, kv(2))
    pool.insert(np.arange(2 * BLOCK), refs)
    holds, let_go = pool._tiers, []

    class Watched:
        """The pool's tiers, which tell what is pending when a hold is closed."""

        def __getattr__(self, name: str) -> Any:
            return getattr(holds, name)

        def let_go(self, hold: Any) -> None:
            let_go.append(device.pending)
            holds.let_go(hold)

    pool._tiers = Watched()  # type: ignore[assignment]
    before = device.queued
    pool.read(refs)
    pool._tiers = holds
    assert device.queued > before
    assert let_go == [False]


def test_swapped_blocks_change_hands_when_their_bytes_are_there(
    device: Device, pool: BlockPool
) -> None:
    tokens = np.arange(4 * BLOCK)
    refs = pool.alloc_mem(4)
    pool.write(refs, kv(4))
    pool.insert(tokens, refs)
    before = device.queued
    assert pool.swap_out(4) == 4
    assert device.queued > before
    assert not device.pending
    with pool.match(tokens) as match:
        assert len(match.refs) == 4
        before = device.queued
        back = pool.swap_in(match.refs)
        assert device.queued > before
        assert not device.pending
    assert len(back) == 4
    pool.check_integrity()
    assert pool.stats().hbm.free < pool.stats().hbm.total


def test_a_swap_on_a_lost_device_fails_and_moves_nothing(device: Device, pool: BlockPool) -> None:
    tokens = np.arange(2 * BLOCK)
    refs = pool.alloc_mem(2)
    pool.write(refs, kv(2))
    pool.insert(tokens, refs)
    device.lost = True
    with pytest.raises(RuntimeError, match="lost"):
        pool.swap_out(2)
    device.lost = False
    device.copies.run = device.copies.queued  # what was lost writes nothing, either
    pool.check_integrity()
    assert pool.stats().dram.free == pool.stats().dram.total
    with pool.match(tokens) as match:
        assert match.tokens == 2 * BLOCK
