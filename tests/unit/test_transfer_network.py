"""Between two network namespaces, through a cable that only TCP can pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from memserve import KVLayout
from memserve.bench.link import EmulatedLink
from memserve.errors import EmulationError
from tests.transfer_peer import PeerProcess, Spec

pytest.importorskip("nixl", reason="NIXL is not installed")

# 64 KiB in each block.
LAYOUT = KVLayout(layers=8, kv_heads=4, head_dim=32, dtype="float32", block_tokens=8)
BLOCKS = 64
GIGABIT = 10**9


@pytest.fixture
def link() -> Iterator[EmulatedLink]:
    try:
        with EmulatedLink(GIGABIT) as link:
            yield link
    except EmulationError as error:
        pytest.skip(f"no network namespaces: {error}")


@pytest.mark.parametrize("aggregated", [True, False])
def test_blocks_cross_the_network(link: EmulatedLink, aggregated: bool) -> None:
    other = replace(LAYOUT, aggregated=aggregated)
    ours = PeerProcess(Spec("ours", LAYOUT, BLOCKS, tls="tcp"), link.near.prefix)
    theirs = PeerProcess(Spec("theirs", other, BLOCKS, tls="tcp"), link.far.prefix)
    try:
        ours.fill(1)
        assert ours.connect(theirs) is None
        every = list(range(BLOCKS))
        end = ours.drain(ours.post(theirs, every, every))
        assert (end.outcome, end.target_drained) == ("done", True)
        assert theirs.same(1) == every
    finally:
        ours.kill()
        theirs.kill()
