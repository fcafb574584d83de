"""Shared memory where it reaches, the network elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from memserve import KVLayout
from memserve.errors import TransferError
from memserve.pool.pool import BlockPool
from memserve.transfer.base import PoolRegions
from memserve.transfer.host import host_id
from memserve.transfer.regions import choose_transport, local_regions, pool_regions

BOTH = ("shm", "nixl")


@pytest.fixture
def here() -> Iterator[PoolRegions]:
    layout = KVLayout(layers=1, kv_heads=1, head_dim=1, dtype="float32")
    with BlockPool(layout, 1, 1) as pool:
        yield pool_regions(layout, local_regions(pool))


@pytest.fixture
def elsewhere(here: PoolRegions) -> PoolRegions:
    other = msgspec.structs.replace(host_id(), shm_device=-1)  # another container, say
    return msgspec.structs.replace(here, host=other)


@pytest.fixture
def on_gpu(here: PoolRegions) -> PoolRegions:
    device = msgspec.structs.replace(here.regions[0], segment=None, device=0)
    return msgspec.structs.replace(here, regions=(device, *here.regions[1:]))


def test_one_host_shares_memory(here: PoolRegions) -> None:
    assert choose_transport(BOTH, BOTH, here) == "shm"


def test_anything_else_is_a_network(elsewhere: PoolRegions, on_gpu: PoolRegions) -> None:
    assert choose_transport(BOTH, BOTH, elsewhere) == "nixl"
    assert choose_transport(BOTH, BOTH, on_gpu) == "nixl"


def test_a_path_can_be_forced(here: PoolRegions, elsewhere: PoolRegions) -> None:
    assert choose_transport(BOTH, BOTH, here, "nixl") == "nixl"
    with pytest.raises(TransferError, match="cannot be mapped"):
        choose_transport(BOTH, BOTH, elsewhere, "shm")


def test_both_sides_need_it(here: PoolRegions, elsewhere: PoolRegions, on_gpu: PoolRegions) -> None:
    assert choose_transport(["shm"], BOTH, here) == "shm"
    assert choose_transport(["shm"], ["shm"], on_gpu) == "shm"  # its DRAM
    with pytest.raises(TransferError, match=r"pool has \['nixl', 'shm'\], the peer \['shm'\]"):
        choose_transport(BOTH, ["shm"], elsewhere)
