"""Copies of a pool with HBM on a GPU, beside what CUDA's own copies of as many bytes take."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch
from rich.table import Table

from evaluation.gpu.device_time import median_seconds, seconds_of, synchronize
from evaluation.gpu.llama import Size, config_of
from memserve.config import Positive, doc
from memserve.engine.devices import device_name
from memserve.models.resolve import Progress
from memserve.pool.layout import KVLayout
from memserve.pool.pool import BlockPool
from memserve.types import Medium

_BLOCK_TOKENS = 16

Direction = Literal["swap out", "swap in", "read in HBM"]


class CopiesConfig(msgspec.Struct, frozen=True):
    """What is measured."""

    size: Annotated[Size, doc("of the model whose blocks are copied")] = "8b"
    device: Annotated[str, doc("'cuda', 'cuda:1'; 'cpu' to try it")] = "cuda"
    blocks: Annotated[Positive, doc("that move at once, of 16 tokens")] = 512
    repeats: Annotated[Positive, doc("of every measurement; figures are medians")] = 7


class CopyTiming(msgspec.Struct, frozen=True):
    """Median GB/s of one direction: bytes of blocks, each counted once."""

    direction: Direction
    aggregated: bool
    pool: float
    cuda: float  # one asynchronous copy of as many bytes, from or to page-locked memory
    by_block: float  # such a copy for each block


class CopiesReport(msgspec.Struct, frozen=True):
    """The result of `run_copies`."""

    config: CopiesConfig
    card: str
    block_bytes: int
    timings: tuple[CopyTiming, ...]


def run_copies(config: CopiesConfig, progress: Progress) -> CopiesReport:
    """Measure swaps out and in, and a gather of blocks, in both layouts."""
    device = torch.device(config.device)
    timings: list[CopyTiming] = []
    for aggregated in (True, False):
        layout = _layout(config.size, aggregated)
        with BlockPool(layout, config.blocks, config.blocks, "gpu-copies", device) as pool:
            found = _measure(pool, config, device)
        for timing in found:
            progress(f"{timing.direction}, aggregated={aggregated}: {timing.pool:.1f} GB/s")
        timings += found
    return CopiesReport(
        config,
        device_name(device),
        _layout(config.size, True).block_bytes,
        tuple(timings),
    )


def _layout(size: Size, aggregated: bool) -> KVLayout:
    shape = config_of(size)
    return KVLayout(
        layers=shape.num_hidden_layers,
        kv_heads=shape.num_key_value_heads or shape.num_attention_heads,
        head_dim=shape.hidden_size // shape.num_attention_heads,
        dtype="bfloat16",
        block_tokens=_BLOCK_TOKENS,
        aggregated=aggregated,
    )


def _measure(pool: BlockPool, config: CopiesConfig, device: torch.device) -> list[CopyTiming]:
    layout = pool.layout
    count = config.blocks
    tokens = np.arange(count * _BLOCK_TOKENS, dtype=np.int32)
    refs = pool.alloc_mem(count, Medium.HBM)
    bits = torch.randint(0, 1 << 14, (4, *layout.block_shape), dtype=torch.int16)
    for first in range(0, count, len(bits)):  # finite numbers: a NaN equals nothing
        some = refs[first : first + len(bits)]
        pool.write(some, bits[: len(some)].view(torch.bfloat16))
    pool.insert(tokens, refs)
    before = pool.read(refs[:4]).cpu()
    out, back, read = [], [], []
    for _ in range(config.repeats + 1):
        out.append(seconds_of(partial(pool.swap_out, count), device))
        for view in pool.layer_views():  # what is read below has come back
            view.zero_()
        synchronize(device)
        started = time.perf_counter()
        with pool.match(tokens, in_hbm=True) as match:
            back.append(time.perf_counter() - started)
            read.append(seconds_of(partial(pool.read, match.refs), device))
            assert torch.equal(pool.read(match.refs[:4]).cpu(), before), "swaps changed bytes"
    pool.delete([])
    size = count * layout.block_bytes
    there = torch.empty(size, dtype=torch.uint8, device=device)
    other = torch.empty_like(there)
    here = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    timings = []
    for direction, seconds, target, source in (
        ("swap out", out, here, there),
        ("swap in", back, there, here),
        ("read in HBM", read, other, there),
    ):
        rates = [
            size / median_seconds(partial(_copy, target, source, n), device, config.repeats) / 1e9
            for n in (1, count)
        ]
        timings.append(
            CopyTiming(
                direction,  # type: ignore[arg-type]
                layout.aggregated,
                size / median(seconds[1:]) / 1e9,
                *rates,
            )
        )
    return timings


def _copy(target: torch.Tensor, source: torch.Tensor, pieces: int) -> None:
    for to, at in zip(target.view(pieces, -1), source.view(pieces, -1), strict=True):
        to.copy_(at, non_blocking=True)


def copies_table(report: CopiesReport) -> Table:
    """Return the report as a table."""
    table = Table(
        title=f"{report.config.blocks} blocks of {report.block_bytes / 2**20:.2f} MiB, "
        f"{report.card}, GB/s"
    )
    for column in ("", "layout", "pool", "one CUDA copy", "one a block", "of one copy"):
        table.add_column(column, justify="right")
    for timing in report.timings:
        table.add_row(
            timing.direction,
            "aggregated" if timing.aggregated else "discrete",
            f"{timing.pool:.1f}",
            f"{timing.cuda:.1f}",
            f"{timing.by_block:.1f}",
            f"{timing.pool / timing.cuda:.2f}",
        )
    return table
