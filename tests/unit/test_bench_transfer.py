"""The transfer benchmark measures what it says, with no more than shared memory at hand."""

from __future__ import annotations

import pytest
from rich.console import Console

from memserve.bench import transfer
from memserve.bench.transfer import KIB, run_transfer_bench, transfer_bench_table
from memserve.errors import TransferError


def no_nixl() -> None:
    raise TransferError("NIXL cannot be imported")


def test_paths_are_compared_with_a_plain_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "load_bindings", no_nixl)
    monkeypatch.setattr(transfer, "PIECES_TOTAL", 1024 * KIB)
    report = run_transfer_bench(
        blocks=4, repeats=1, link=True, block_bytes=[64 * KIB], piece_bytes=[8 * KIB]
    )
    (blocks,) = report.blocks
    assert [speed.path for speed in blocks.paths] == ["memcpy", "memcpy by block", "shm", "socket"]
    assert [speed.copies for speed in blocks.paths] == [1, 1, 1, 0]
    assert [(point.path, point.piece_bytes) for point in report.layouts] == [("shm", 8 * KIB)]
    assert [(point.blocks, point.copies) for point in report.overheads] == [(1, 1), (4, 1)]
    assert report.missing == ("NIXL cannot be imported",)
    console = Console(record=True, width=200)
    console.print(transfer_bench_table(report))
    assert "not measured: NIXL cannot be imported" in console.export_text()
