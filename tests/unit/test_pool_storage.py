"""The copies that a GPU makes between two stores, made here by a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from memserve.pool.layout import KVLayout
from memserve.pool.storage import BlockStore

EXTENTS = (3, 1, 4)
BLOCKS = sum(EXTENTS)
CPU = torch.device("cpu")


class Copies(TorchDispatchMode):
    """Counts copies, and refuses those that are no run of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.count += 1
            assert args[0].is_contiguous()
            assert args[1].is_contiguous()
        return func(*args, **(kwargs or {}))


def layout_of(aggregated: bool) -> KVLayout:
    return KVLayout(3, 2, 4, "bfloat16", 2, aggregated)


def stores(stack: ExitStack, layout: KVLayout) -> Iterator[BlockStore]:
    """Stores of random bytes in several extents."""
    for seed in range(2):
        store = stack.enter_context(closing(BlockStore(layout, CPU, pinned=False)))
        made = torch.Generator().manual_seed(seed)
        for blocks in EXTENTS:
            store.grow(blocks)
            memory = store.extents[-1].memory
            memory.copy_(torch.randint(0, 100, memory.shape, generator=made, dtype=torch.uint8))
        yield store


@settings(max_examples=60, deadline=None)
@given(
    source=st.permutations(range(BLOCKS)) | st.just(list(range(BLOCKS))),
    target=st.permutations(range(BLOCKS)) | st.just(list(range(BLOCKS))),
    count=st.integers(0, BLOCKS),
    aggregated=st.booleans(),
)
def test_blocks_arrive_and_others_stay(
    source: list[int], target: list[int], count: int, aggregated: bool
) -> None:
    at, to = np.array(source[:count], np.int64), np.array(target[:count], np.int64)
    with ExitStack() as stack:
        here, there = stores(stack, layout_of(aggregated))
        everything = np.arange(BLOCKS)
        expected = there.gather(everything)
        expected[torch.from_numpy(to)] = here.gather(at)
        with Copies():
            there._queue_copies(here, at, to)
        assert torch.equal(there.gather(everything), expected)


@pytest.mark.parametrize(("aggregated", "planes"), [(True, 1), (False, 6)])
def test_neighbours_go_together(aggregated: bool, planes: int) -> None:
    with ExitStack() as stack:
        here, there = stores(stack, layout_of(aggregated))
        for at, to, runs in (
            ([0, 1, 2], [4, 5, 6], 1),
            ([0, 1, 2, 3], [4, 5, 6, 7], 2),  # into the next extent
            ([2, 1, 0], [4, 5, 6], 3),
            ([4, 5, 7], [0, 1, 2], 2),
        ):
            with Copies() as copies:
                there._queue_copies(here, np.array(at), np.array(to))
            assert copies.count == runs * planes
