"""A pool on a device whose copies run when somebody waits for them. Protects: nothing is handed on,
inserted or freed before the kernels that write or read it have run.

The device is PyTorch's `meta`, which has shapes and no bytes; copies to the host do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memserve.pool import storage
from memserve.pool.pool import BlockPool
from tests.pool_harness import LAYOUT

BLOCK = LAYOUT.block_tokens


class Device(TorchDispatchMode):
    """The queue of a device's kernels (`Kernels`). Every operation on its tensors stays pending
    until somebody waits for a mark behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.queued = self.run = 0
        self.lost = False

    @property
    def pending(self) -> bool:
        return self.run < self.queued

    def mark(self) -> Mark:
        return Mark(self, self.queued)

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = [*args, *(kwargs or {}).values()]
        if not any(isinstance(each, torch.Tensor) and each.is_meta for each in given):
            return func(*args, **(kwargs or {}))
        self.queued += 1
        if func is torch.ops.aten.copy_.default and not args[0].is_meta:
            return args[0]  # there are no bytes to copy
        return func(*args, **(kwargs or {}))


class Mark:
    def __init__(self, device: Device, place: int) -> None:
        self._device = device
        self._place = place

    def synchronize(self) -> None:
        if self._device.lost:
            raise RuntimeError("the device is lost")
        self._device.run = max(self._device.run, self._place)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made, host = Device(), storage.kernels_of(torch.device("cpu"))
    monkeypatch.setattr(storage, "kernels_of", lambda at: host if at.type == "cpu" else made)
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
    device.run = device.queued  # what was lost writes nothing, either
    pool.check_integrity()
    assert pool.stats().dram.free == pool.stats().dram.total
    with pool.match(tokens) as match:
        assert match.tokens == 2 * BLOCK
