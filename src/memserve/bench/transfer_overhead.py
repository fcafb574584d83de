"""The overhead of a transfer with insert over its copy, to a pool in another process of this
host."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import msgspec
import numpy as np

from memserve.errors import TransferError
from memserve.pool.layout import KVLayout
from memserve.transfer.base import BlockList, Outcome, PoolRegions, WriteList
from memserve.transfer.mempool import MemPool
from memserve.transfer.regions import local_regions, pool_regions
from memserve.transfer.shm import ShmTransport
from memserve.types import Owner, RefArray

# Seconds until the benchmark fails: longer than any transfer takes.
_PATIENCE = 30.0
_WARM_UP = 3


class OverheadPoint(msgspec.Struct, frozen=True):
    """Time of `transfer_with_insert` against a bare copy of the same blocks in the same turn."""

    blocks: int
    block_bytes: int
    copy_seconds: float  # medians
    transfer_seconds: float
    overhead_seconds: float  # median of each turn's difference
    copies: float  # bytes that a CPU copied, per byte moved


class _Receiver(msgspec.Struct, frozen=True):
    """Owner, memory and address of the receiver's pool."""

    owner: Owner
    memory: PoolRegions
    address: str


def measure_overhead(
    layout: KVLayout, counts: Sequence[int], repeats: int
) -> tuple[OverheadPoint, ...]:
    """Return the overhead of transfers of each of `counts` blocks that the receiver lacks."""
    most = max(counts)
    with _receiver(layout, most) as (process, there), MemPool(layout, most, 0, "sender") as pool:
        pool.connect(there.owner.instance, there.address)
        source = np.random.default_rng(0).permutation(pool.alloc_mem(most))
        for view in pool.layer_views():
            view.fill_(1)  # touch the pages, as a cache in use has
        transport = ShmTransport(layout)
        transport.register(local_regions(pool))
        transport.add_peer(there.owner, there.memory, b"")
        points = [
            _measure(pool, transport, process, there, source[:count], repeats) for count in counts
        ]
        transport.close()
    return tuple(points)


def _measure(
    pool: MemPool,
    transport: ShmTransport,
    process: subprocess.Popen[bytes],
    there: _Receiver,
    source: RefArray,
    repeats: int,
) -> OverheadPoint:
    tokens = np.arange(len(source) * pool.layout.block_tokens, dtype=np.int32)
    turns = []
    copied, moved = transport.counters.bytes_copied, transport.counters.bytes_moved
    target: RefArray | None = None
    for turn in range(repeats + _WARM_UP):
        # The second of the two finds the blocks in the processor's caches, so the order alternates.
        # The target blocks of the turn before are free, so the bare copy may write to them.
        copy = None if target is None or turn % 2 else _copy(transport, there.owner, source, target)
        begin = time.perf_counter()
        transfer = pool.transfer_with_insert(there.owner.instance, tokens, source)
        target = transfer.result(_PATIENCE)
        whole = time.perf_counter() - begin
        if transfer.sent != len(source):
            raise TransferError(f"{transfer.sent} of {len(source)} blocks were sent")
        if copy is None:
            copy = _copy(transport, there.owner, source, target)
        turns.append((whole, copy))
        _ask(process, b"forget\n")
    turns = turns[_WARM_UP:]
    copied = transport.counters.bytes_copied - copied
    moved = transport.counters.bytes_moved - moved
    return OverheadPoint(
        len(source),
        pool.layout.block_bytes,
        median(copy for _, copy in turns),
        median(whole for whole, _ in turns),
        median(whole - copy for whole, copy in turns),
        copied / moved,
    )


def _copy(transport: ShmTransport, peer: Owner, source: RefArray, target: RefArray) -> float:
    """Copy the blocks to the same places without a transfer; return the seconds."""
    begin = time.perf_counter()
    transport.post(peer, WriteList(BlockList.of(source), BlockList.of(target)))
    while not (ended := transport.poll()):
        pass
    seconds = time.perf_counter() - begin
    if ended[0].outcome is not Outcome.DONE:
        raise TransferError(f"a copy ended as {ended[0].outcome}: {ended[0].error}")
    return seconds


@contextmanager
def _receiver(layout: KVLayout, blocks: int) -> Iterator[tuple[subprocess.Popen[bytes], _Receiver]]:
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(blocks)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        line = _ask(process, msgspec.json.encode(layout) + b"\n")
        yield process, msgspec.json.decode(line, type=_Receiver)
    finally:
        process.kill()
        process.wait()


def _ask(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    pipe_in, pipe_out = process.stdin, process.stdout
    if pipe_in is None or pipe_out is None:
        raise TransferError("the process was started without pipes")
    pipe_in.write(line)
    pipe_in.flush()
    answer = pipe_out.readline()
    if not answer:
        raise TransferError(f"a process of the benchmark ended with {process.wait()}")
    return answer


def _main(blocks: int) -> None:
    lines = iter(sys.stdin.buffer.readline, b"")
    layout = msgspec.json.decode(next(lines), type=KVLayout)
    with MemPool(layout, blocks, 0, "receiver") as pool:
        address = pool.serve("tcp://127.0.0.1:0")
        memory = pool_regions(layout, local_regions(pool))
        answer = msgspec.json.encode(_Receiver(pool.owner, memory, address))
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.flush()
        for _ in lines:
            pool.delete(())  # so that the next transfer finds no block present
            sys.stdout.buffer.write(b"forgotten\n")
            sys.stdout.flush()


if __name__ == "__main__":
    _main(int(sys.argv[1]))
