"""Transfers from and to a GPU's memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memserve import KVLayout, Medium
from memserve.pool.pool import BlockPool
from memserve.transfer.base import Outcome
from memserve.transfer.shm import ShmTransport
from tests.copy_harness import connect, drain, fill, write_list
from tests.transfer_peer import PeerProcess, Spec

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LAYOUT = KVLayout(layers=4, kv_heads=2, head_dim=64, dtype="float32")
BLOCKS = 16


@pytest.mark.parametrize("aggregated", [True, False])
def test_a_gpu_writes_into_shared_memory(aggregated: bool) -> None:
    with (
        BlockPool(LAYOUT, BLOCKS, BLOCKS, "source", "cuda") as source,
        BlockPool(replace(LAYOUT, aggregated=aggregated), BLOCKS, BLOCKS, "target") as target,
    ):
        ours, theirs = fill(source, 1), fill(target, 2)
        transport = ShmTransport(LAYOUT)
        connect(transport, source, target, ShmTransport(target.layout))
        for medium in Medium:
            writes = write_list(ours[Medium.HBM], theirs[medium].copy()[::-1])
            ticket = transport.post(target.owner, writes)
            assert drain(transport, [ticket])[ticket].outcome is Outcome.DONE
            sent = source.read(ours[Medium.HBM]).cpu()
            assert torch.equal(target.read(theirs[medium]), sent.flip(0))
        assert transport.counters.bytes_copied == 0  # the GPU did it
        transport.close()


def test_a_gpu_writes_into_another_process() -> None:
    pytest.importorskip("nixl", reason="NIXL is not installed")
    ours = PeerProcess(Spec("ours", LAYOUT, BLOCKS, device="cuda"))
    theirs = PeerProcess(Spec("theirs", LAYOUT, BLOCKS, device="cuda"))
    try:
        ours.fill(1)
        assert ours.connect(theirs) is None
        assert ours.drain(ours.post(theirs, [3, 4, 9], [3, 4, 9])).outcome == "done"
        assert theirs.same(1) == [3, 4, 9]
    finally:
        ours.kill()
        theirs.kill()
