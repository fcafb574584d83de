"""Processes with a pool and a transport each, driven by a test through lines of JSON."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from memserve import KVLayout, Medium
from memserve.errors import MemserveError
from memserve.pool.pool import BlockPool
from memserve.transfer.base import PoolRegions, Ticket, Transport, WriteList, block_list
from memserve.transfer.nixl import NixlTransport
from memserve.transfer.regions import local_regions, pool_regions
from memserve.transfer.shm import ShmTransport
from memserve.types import Owner
from tests.copy_harness import drain, random_kv

ROOT = Path(__file__).parents[1]


class Spec(msgspec.Struct):
    """The process to start."""

    instance: str
    layout: KVLayout
    blocks: int  # in HBM
    transport: str = "nixl"
    tls: str | None = None
    device: str = "cpu"


class Address(msgspec.Struct):
    """What a peer must know."""

    owner: Owner
    memory: PoolRegions
    description: bytes


class Ended(msgspec.Struct):
    """A completion."""

    outcome: str
    error: str | None
    target_drained: bool


class PeerProcess:
    """A process, from the test's side."""

    def __init__(self, spec: Spec, prefix: Sequence[str] = ()) -> None:
        """`prefix`: a command to run it under."""
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", __name__],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "NIXL_LOG_LEVEL": "FATAL"},
        )
        self.address = msgspec.convert(self._call(spec), Address)

    def connect(self, peer: PeerProcess) -> str | None:
        """Returns why not, or None."""
        return msgspec.convert(self._call("connect", peer.address), str | None)

    def resize_dram(self, blocks: int) -> None:
        """Have so many blocks of DRAM; peers must connect again to know."""
        self.address = msgspec.convert(self._call("resize_dram", blocks), Address)

    def post(
        self,
        peer: PeerProcess,
        source: list[int],
        target: list[int],
        medium: Medium = Medium.HBM,
    ) -> int:
        """Begin to write HBM blocks into the peer's blocks of a medium."""
        answer = self._call("post", peer.address.owner, source, target, medium)
        return msgspec.convert(answer, int)

    def drain(self, ticket: int) -> Ended:
        """Poll until the ticket has ended."""
        return msgspec.convert(self._call("drain", ticket), Ended)

    def poll_for(self, seconds: float) -> int:
        """Poll so long; returns how many tickets ended."""
        return msgspec.convert(self._call("poll_for", seconds), int)

    def cancel(self, ticket: int) -> None:
        self._call("cancel", ticket)

    def remove(self, peer: PeerProcess) -> None:
        self._call("remove", peer.address.owner)

    def fill(self, seed: int) -> None:
        """Give all blocks the contents that belong to a seed."""
        self._call("fill", seed)

    def same(self, seed: int, medium: Medium = Medium.HBM) -> list[int]:
        """The blocks of a medium whose contents belong to a seed."""
        return msgspec.convert(self._call("same", seed, medium), list[int])

    def close_transport(self) -> None:
        self._call("close_transport")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _call(self, *message: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(message) + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the peer process ended with {self.process.wait()}"
        return msgspec.json.decode(line)


class _Commands:
    """The same, inside of the process."""

    def __init__(self, spec: Spec) -> None:
        self.pool = BlockPool(spec.layout, spec.blocks, 0, spec.instance, spec.device)
        self.refs = {Medium.HBM: self.pool.alloc_mem(spec.blocks)}
        self.local = local_regions(self.pool)
        self.transport: Transport = (
            NixlTransport(self.pool.owner, spec.layout, spec.tls)
            if spec.transport == "nixl"
            else ShmTransport(spec.layout)
        )
        self.transport.register(self.local)

    def address(self) -> Address:
        memory = pool_regions(self.pool.layout, self.local)
        return Address(self.pool.owner, memory, self.transport.describe())

    def connect(self, peer: object) -> str | None:
        known = msgspec.convert(peer, Address)
        try:
            self.transport.add_peer(known.owner, known.memory, known.description)
        except MemserveError as error:
            return str(error)
        return None

    def resize_dram(self, blocks: int) -> Address:
        if Medium.DRAM in self.refs:
            self.pool.free_mem(self.refs[Medium.DRAM])
        present = self.pool.stats().dram.total
        self.pool.shrink_dram(max(0, present - blocks))
        self.pool.grow_dram(max(0, blocks - present))
        self.refs[Medium.DRAM] = self.pool.alloc_mem(blocks, Medium.DRAM)
        known, self.local = self.local, local_regions(self.pool)
        names = {each.region for each in known}, {each.region for each in self.local}
        self.transport.register([each for each in self.local if each.region not in names[0]])
        self.transport.unregister([each for each in known if each.region not in names[1]])
        return self.address()

    def post(self, peer: object, source: list[int], target: list[int], medium: int) -> Ticket:
        blocks = block_list(Medium.HBM, source), block_list(Medium(medium), target)
        return self.transport.post(msgspec.convert(peer, Owner), WriteList(*blocks))

    def drain(self, ticket: Ticket) -> Ended:
        end = drain(self.transport, [ticket])[ticket]
        error = None if end.error is None else f"{type(end.error).__name__}: {end.error}"
        return Ended(end.outcome, error, end.target_drained)

    def poll_for(self, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        ended = 0
        while time.monotonic() < deadline:
            ended += len(self.transport.poll())
            time.sleep(self.transport.poll_interval)
        return ended

    def cancel(self, ticket: Ticket) -> None:
        self.transport.cancel(ticket)

    def remove(self, peer: object) -> None:
        self.transport.remove_peer(msgspec.convert(peer, Owner))

    def fill(self, seed: int) -> None:
        refs = self.refs[Medium.HBM]
        self.pool.write(refs, random_kv(self.pool.layout, len(refs), seed))

    def same(self, seed: int, medium: int) -> list[int]:
        wanted = random_kv(self.pool.layout, len(self.refs[Medium.HBM]), seed)
        there = self.pool.read(self.refs[Medium(medium)]).cpu()
        return [at for at in range(len(there)) if torch.equal(there[at], wanted[at])]

    def close_transport(self) -> None:
        self.transport.close()


def _main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # UCX prints its warnings there
    lines = iter(sys.stdin.readline, "")
    commands = _Commands(msgspec.json.decode(next(lines), type=tuple[Spec])[0])
    answers.write(msgspec.json.encode(commands.address()) + b"\n")
    for line in lines:
        name, *arguments = msgspec.json.decode(line)
        answer = getattr(commands, name)(*arguments)
        answers.write(msgspec.json.encode(answer) + b"\n")


if __name__ == "__main__":
    _main()
