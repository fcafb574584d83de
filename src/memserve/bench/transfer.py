"""Transfers between pools: each path against memcpy of the same bytes, and against a socket."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal

import msgspec
import numpy as np
from rich.markup import escape
from rich.table import Table

from memserve.bench.link import EmulatedLink, End
from memserve.bench.transfer_overhead import OverheadPoint, measure_overhead
from memserve.bench.transfer_process import (
    BenchProcess,
    Connect,
    Memcpy,
    Start,
    Stream,
    Timing,
    Write,
)
from memserve.errors import EmulationError, TransferError
from memserve.pool.layout import KVLayout
from memserve.transfer.nixl_agent import load_bindings

KIB, MIB = 1024, 1024 * 1024
BLOCK_BYTES = (64 * KIB, 1 * MIB)
PIECE_BYTES = (8 * KIB, 32 * KIB, 160 * KIB)
PIECES_TOTAL = 64 * MIB  # moved in each comparison of layouts
LINK_BITS = 10**9

OVERHEAD_BLOCKS = (1, 16, 256)
OVERHEAD_TURNS = 5  # for each repeat: turns are short, and the kernel's scheduler adds noise

PathName = Literal["memcpy", "memcpy by block", "shm", "nixl", "nixl tcp", "socket"]
_TRANSPORTS: tuple[PathName, ...] = ("shm", "nixl", "nixl tcp")
_BLOCK_TOKENS = 16
_LAYERS = 16


class PathSpeed(msgspec.Struct, frozen=True):
    """The median speed of one path. Baselines: one memcpy call, which bypasses the cache from some
    size on; one memcpy per block, as for scattered blocks; a TCP socket."""

    path: PathName
    bytes_per_second: float
    of_memcpy: float  # medians of the ratios to the memcpy of the same turn
    of_socket: float
    copies: float  # bytes that the sender's CPU copied, per byte moved


class BlockPoint(msgspec.Struct, frozen=True):
    """Speeds for scattered aggregated blocks of one size."""

    block_bytes: int
    blocks: int
    paths: tuple[PathSpeed, ...]


class LayoutPoint(msgspec.Struct, frozen=True):
    """Speeds for equal bytes in aggregated and in discrete blocks."""

    path: PathName
    piece_bytes: int
    aggregated: float  # bytes per second
    discrete: float
    ratio: float  # median of the ratios of each turn


class LinkPoint(msgspec.Struct, frozen=True):
    """Efficiency over an emulated link between two network namespaces."""

    bits_per_second: int
    block_bytes: int
    nixl: float  # speed as a share of the link's rate
    socket: float


class TransferBenchReport(msgspec.Struct, frozen=True):
    """Medians of all measurements. `missing`: measurements that were impossible, and why."""

    blocks: tuple[BlockPoint, ...]
    layouts: tuple[LayoutPoint, ...]
    overheads: tuple[OverheadPoint, ...]
    link: LinkPoint | None
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two connected processes with a pool each."""

    sender: BenchProcess
    source: list[int]  # all of the sender's blocks, in random order
    target: list[int]  # all of the target's blocks, in random order

    def write(self) -> Timing:
        return self.sender.run(Write(self.source, self.target))

    def stream(self) -> Timing:
        return self.sender.run(Stream(self.source))

    def memcpy(self, nbytes: int, piece: int) -> Timing:
        return self.sender.run(Memcpy(nbytes, piece))


def run_transfer_bench(
    *,
    blocks: int = 256,
    repeats: int = 9,
    link: bool = False,
    block_bytes: Sequence[int] = BLOCK_BYTES,
    piece_bytes: Sequence[int] = PIECE_BYTES,
    progress: Callable[[str], None] = lambda _: None,
) -> TransferBenchReport:
    """Measure every path that this machine has.

    `blocks`: in one transfer. `link`: also measure between network namespaces, which needs root.
    """
    missing = []
    transports = _TRANSPORTS
    try:
        load_bindings()
    except TransferError as error:
        missing.append(str(error))
        transports = ("shm",)
    block_points, layout_points, link_point = [], [], None
    for size in block_bytes:
        progress(f"blocks of {size // KIB} KiB")
        block_points.append(_measure_blocks(size, blocks, repeats, transports))
    for size, path in itertools.product(piece_bytes, transports):
        progress(f"pieces of {size // KIB} KiB, {path}")
        layout_points.append(_measure_layouts(size, repeats, path))
    progress("transfers with insert")
    overhead_blocks = sorted({min(count, blocks) for count in OVERHEAD_BLOCKS})
    overheads = measure_overhead(_layout(block_bytes[0]), overhead_blocks, OVERHEAD_TURNS * repeats)
    if link and "nixl tcp" in transports:
        progress("an emulated link")
        try:
            link_point = _measure_link(block_bytes[0], blocks, repeats)
        except EmulationError as error:
            missing.append(str(error))
    return TransferBenchReport(
        tuple(block_points), tuple(layout_points), overheads, link_point, tuple(missing)
    )


def _measure_blocks(
    size: int, blocks: int, repeats: int, transports: Sequence[PathName]
) -> BlockPoint:
    nbytes = blocks * size
    with ExitStack() as stack:
        pairs = {
            path: stack.enter_context(_pair(_layout(size), blocks, path)) for path in transports
        }
        runs: dict[PathName, Callable[[], Timing]] = {
            "memcpy": partial(pairs["shm"].memcpy, nbytes, nbytes),
            "memcpy by block": partial(pairs["shm"].memcpy, nbytes, size),
            **{path: pair.write for path, pair in pairs.items()},
            "socket": pairs["shm"].stream,
        }
        turns = _in_turns(list(runs.values()), repeats)
    speeds = []
    for path, timings in zip(runs, zip(*turns, strict=True), strict=True):
        of_memcpy, of_socket = (
            median(
                turn[beside].seconds / mine.seconds
                for turn, mine in zip(turns, timings, strict=True)
            )
            for beside in (0, -1)
        )
        copies = timings[0].copied / nbytes
        speeds.append(PathSpeed(path, _speed(timings), of_memcpy, of_socket, copies))
    return BlockPoint(size, blocks, tuple(speeds))


def _measure_layouts(piece: int, repeats: int, path: PathName) -> LayoutPoint:
    block = piece * 2 * _LAYERS
    blocks = PIECES_TOTAL // block
    with (
        _pair(_layout(block), blocks, path) as aggregated,
        _pair(_layout(block, aggregated=False), blocks, path) as discrete,
    ):
        turns = _in_turns([aggregated.write, discrete.write], repeats)
    whole, pieces = zip(*turns, strict=True)
    ratio = median(theirs.seconds / ours.seconds for ours, theirs in turns)
    return LayoutPoint(path, piece, _speed(whole), _speed(pieces), ratio)


def _measure_link(size: int, blocks: int, repeats: int) -> LinkPoint:
    with (
        EmulatedLink(LINK_BITS) as link,
        _pair(_layout(size), blocks, "nixl tcp", link.near, link.far) as pair,
    ):
        turns = _in_turns([pair.write, pair.stream], repeats)
    nixl, plain = zip(*turns, strict=True)
    line = LINK_BITS / 8
    return LinkPoint(LINK_BITS, size, _speed(nixl) / line, _speed(plain) / line)


def _in_turns(runs: Sequence[Callable[[], Timing]], repeats: int) -> list[tuple[Timing, ...]]:
    """Call all `runs` in turn, so that disturbances affect all alike. Return the timings of each
    turn, without two warm-up turns."""
    turns = [tuple(run() for run in runs) for _ in range(repeats + 2)]
    return turns[2:]


def _speed(timings: Sequence[Timing]) -> float:
    return median(timing.nbytes / timing.seconds for timing in timings)


def _layout(block_bytes: int, aggregated: bool = True) -> KVLayout:
    head_dim = block_bytes // (_LAYERS * 2 * _BLOCK_TOKENS)
    return KVLayout(_LAYERS, 1, head_dim, "int8", _BLOCK_TOKENS, aggregated, model="bench")


@contextmanager
def _pair(
    layout: KVLayout, blocks: int, path: PathName, near: End | None = None, far: End | None = None
) -> Iterator[_Pair]:
    """Start processes at both ends of a path, on this machine or at the ends of a link."""
    tls = "tcp" if path == "nixl tcp" else None
    kind: Literal["shm", "nixl"] = "shm" if path == "shm" else "nixl"
    with ExitStack() as stack:
        sender, target = (
            stack.enter_context(
                BenchProcess(
                    Start(name, layout, blocks, kind, tls, end.address if end else "127.0.0.1"),
                    end.prefix if end else (),
                )
            )
            for name, end in (("sender", near), ("target", far))
        )
        sender.run(Connect(target.address))
        rng = np.random.default_rng(0)
        yield _Pair(sender, *(rng.permutation(blocks).tolist() for _ in range(2)))


def transfer_bench_table(report: TransferBenchReport) -> Table:
    """Return the tables of blocks, layouts, overheads, link and missing paths, below each other."""
    table = Table.grid()
    table.add_row(_block_table(report))
    table.add_row(_layout_table(report))
    table.add_row(_overhead_table(report))
    if report.link is not None:
        table.add_row(_link_table(report.link))
    for reason in report.missing:
        table.add_row(f"not measured: {escape(reason)}")
    return table


def _overhead_table(report: TransferBenchReport) -> Table:
    table = Table(
        "transfer_with_insert", "whole us", "bare copy us", "overhead us", "copied / moved"
    )
    for point in report.overheads:
        table.add_row(
            f"{point.blocks} x {point.block_bytes // KIB} KiB",
            f"{point.transfer_seconds * 1e6:.0f}",
            f"{point.copy_seconds * 1e6:.0f}",
            f"{point.overhead_seconds * 1e6:.0f}",
            f"{point.copies:g}",
        )
    return table


def _link_table(link: LinkPoint) -> Table:
    table = Table("link", "block KiB", "nixl tcp, of the link", "socket, of the link")
    rate = f"{link.bits_per_second / 1e9:g} Gbit/s"
    table.add_row(rate, f"{link.block_bytes // KIB}", f"{link.nixl:.1%}", f"{link.socket:.1%}")
    return table


def _block_table(report: TransferBenchReport) -> Table:
    table = Table("blocks", "path", "GB/s", "of memcpy", "of socket", "bytes copied / moved")
    for point in report.blocks:
        for speed in point.paths:
            table.add_row(
                f"{point.blocks} x {point.block_bytes // KIB} KiB",
                speed.path,
                f"{speed.bytes_per_second / 1e9:.2f}",
                f"{speed.of_memcpy:.2f}",
                f"{speed.of_socket:.2f}",
                f"{speed.copies:g}",
            )
    return table


def _layout_table(report: TransferBenchReport) -> Table:
    table = Table("piece KiB", "path", "aggregated GB/s", "discrete GB/s", "ratio")
    for point in report.layouts:
        table.add_row(
            f"{point.piece_bytes // KIB}",
            point.path,
            f"{point.aggregated / 1e9:.2f}",
            f"{point.discrete / 1e9:.2f}",
            f"{point.ratio:.2f}",
        )
    return table
