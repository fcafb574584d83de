"""A process with a pool and a transport, which times copies on its parent's commands."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self, TypeVar

import msgspec
import numpy as np

from memserve.errors import TransferError
from memserve.pool.layout import KVLayout
from memserve.pool.pool import BlockPool
from memserve.pool.segment import SHM_DIRECTORY
from memserve.transfer.base import Outcome, PoolRegions, Transport, WriteList, block_list
from memserve.transfer.mapping import PeerMemory
from memserve.transfer.nixl import NixlTransport
from memserve.transfer.regions import local_regions, pool_regions
from memserve.transfer.shm import ShmTransport
from memserve.types import Medium, Owner

# Pieces of one `sendmsg`, below the kernel's IOV_MAX of 1024.
_BATCH = 512
_HEADER_BYTES = 8

_Answer = TypeVar("_Answer")


class Start(msgspec.Struct, frozen=True):
    """Settings of a process. All of the pool's blocks are in HBM, and active."""

    instance: str
    layout: KVLayout
    blocks: int
    transport: Literal["shm", "nixl"]
    tls: str | None = None
    host: str = "127.0.0.1"  # address of the plain socket


class Address(msgspec.Struct, frozen=True):
    """The data of a process that its peer needs."""

    owner: Owner
    memory: PoolRegions
    description: bytes
    host: str
    port: int  # of the plain socket


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Connect to a peer."""

    peer: Address


class Write(msgspec.Struct, frozen=True, tag=True):
    """Copy blocks to the peer by the transport."""

    source: list[int]
    target: list[int]


class Memcpy(msgspec.Struct, frozen=True, tag=True):
    """Copy `nbytes` into the peer's mapped memory, one piece after the other."""

    nbytes: int
    piece: int  # bytes of one memcpy call


class Stream(msgspec.Struct, frozen=True, tag=True):
    """Send blocks through one TCP socket, as the baseline."""

    source: list[int]


Command = Connect | Write | Memcpy | Stream


class Timing(msgspec.Struct, frozen=True):
    """Time of one command."""

    seconds: float
    nbytes: int
    copied: int = 0  # bytes, by this process's CPU


class BenchProcess:
    """The parent's handle of one process, which it kills at the end of the context."""

    def __init__(self, start: Start, prefix: Sequence[str] = ()) -> None:
        """`prefix`: a command that runs the process, such as that of a network namespace."""
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.address = self._ask(start, Address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, command: Command) -> Timing:
        return self._ask(command, Timing)

    def _ask(self, message: Start | Command, kind: type[_Answer]) -> _Answer:
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        if pipe_in is None or pipe_out is None:
            raise TransferError("the process was started without pipes")
        pipe_in.write(msgspec.json.encode(message) + b"\n")
        pipe_in.flush()
        line = pipe_out.readline()
        if not line:
            raise TransferError(f"a process of the benchmark ended with {self._process.wait()}")
        return msgspec.json.decode(line, type=kind)


class _Worker:
    """The process's own side: runs commands."""

    def __init__(self, start: Start) -> None:
        self._pool = BlockPool(start.layout, start.blocks, 0, start.instance)
        self._pool.alloc_mem(start.blocks)
        self._local = local_regions(self._pool)
        memory = self._local[0].memory.numpy()
        memory[:] = 1  # touch the pages, as a cache in use has
        self._memory = memory.data
        self._block_bytes = start.layout.block_bytes
        self._transport: Transport = (
            ShmTransport(start.layout)
            if start.transport == "shm"
            else NixlTransport(self._pool.owner, start.layout, start.tls)
        )
        self._transport.register(self._local)
        listener = socket.create_server((start.host, 0))
        self.address = Address(
            self._pool.owner,
            pool_regions(start.layout, self._local),
            self._transport.describe(),
            start.host,
            listener.getsockname()[1],
        )
        threading.Thread(target=self._receive, args=(listener,), daemon=True).start()
        self._peer = self.address

    def run(self, command: Command) -> Timing:
        match command:
            case Connect(peer):
                return self._connect(peer)
            case Write(source, target):
                return self._write(source, target)
            case Memcpy(nbytes, piece):
                return self._memcpy(nbytes, piece)
            case Stream(source):
                return self._stream(source)

    def _connect(self, peer: Address) -> Timing:
        self._peer = peer
        self._transport.add_peer(peer.owner, peer.memory, peer.description)
        self._socket = socket.create_connection((peer.host, peer.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._mapping = PeerMemory(SHM_DIRECTORY, page_locked=False)
        return Timing(0.0, 0)

    def _write(self, source: list[int], target: list[int]) -> Timing:
        writes = WriteList(block_list(Medium.HBM, source), block_list(Medium.HBM, target))
        copied = self._transport.counters.bytes_copied
        begin = time.perf_counter()
        self._transport.post(self._peer.owner, writes)
        while not (ended := self._transport.poll()):
            if self._transport.poll_interval:  # as the pool's transfer thread does
                time.sleep(self._transport.poll_interval)
        seconds = time.perf_counter() - begin
        if ended[0].outcome is not Outcome.DONE:
            raise TransferError(f"a copy ended as {ended[0].outcome}: {ended[0].error}")
        copied = self._transport.counters.bytes_copied - copied
        return Timing(seconds, len(source) * self._block_bytes, copied)

    def _memcpy(self, nbytes: int, piece: int) -> Timing:
        theirs = self._mapping.open(self._peer.memory.regions[0]).bytes
        ours = self._local[0].memory.numpy()
        begin = time.perf_counter()
        for at in range(0, nbytes, piece):
            np.copyto(theirs[at : at + piece], ours[at : at + piece])
        return Timing(time.perf_counter() - begin, nbytes, nbytes)

    def _stream(self, source: list[int]) -> Timing:
        size = self._block_bytes
        begin = time.perf_counter()
        pieces = [self._memory[at * size : (at + 1) * size] for at in source]
        self._socket.sendall((len(source) * size).to_bytes(_HEADER_BYTES))
        for first in range(0, len(pieces), _BATCH):
            _send_all(self._socket, pieces[first : first + _BATCH])
        self._socket.recv(1)
        return Timing(time.perf_counter() - begin, len(source) * size)

    def _receive(self, listener: socket.socket) -> None:
        """Receive a peer's `Stream` into the pool's memory, and answer each with one byte."""
        connection, _ = listener.accept()
        while header := connection.recv(_HEADER_BYTES, socket.MSG_WAITALL):
            left = int.from_bytes(header)
            at = 0
            while left:
                got = connection.recv_into(self._memory[at : at + left])
                if not got:
                    return
                at, left = at + got, left - got
            connection.sendall(b"\0")


def _send_all(connection: socket.socket, pieces: list[memoryview]) -> None:
    while pieces:
        sent = connection.sendmsg(pieces)
        done = 0
        while done < len(pieces) and sent >= len(pieces[done]):
            sent -= len(pieces[done])
            done += 1
        pieces = pieces[done:]
        if pieces:
            pieces[0] = pieces[0][sent:]


def _main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # UCX prints its warnings there
    lines = iter(sys.stdin.buffer.readline, b"")
    worker = _Worker(msgspec.json.decode(next(lines), type=Start))
    answers.write(msgspec.json.encode(worker.address) + b"\n")
    for line in lines:
        timing = worker.run(msgspec.json.decode(line, type=Command))
        answers.write(msgspec.json.encode(timing) + b"\n")


if __name__ == "__main__":
    _main()
