"""A pool in a process of its own, driven line by line: for tests that stop and kill it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

import torch

from memserve import KVLayout, MemPool
from memserve.clock import MonotonicClock
from memserve.errors import TransferError
from memserve.secrets import SECRET_VARIABLE
from memserve.transfer.base import Transport
from memserve.transfer.handles import Transfer
from memserve.transfer.regions import PathName
from memserve.transfer.shm import ShmTransport
from memserve.types import Owner
from tests.faulty_transport import Drop, FaultyTransport, listed
from tests.transfer_harness import LAYOUT, LOCAL, PATIENCE, filled, kv_blocks

BLOCKS = 16
# A block of 1 MiB: all of them take seconds through a slow cable.
WIDE = KVLayout(layers=16, kv_heads=4, head_dim=128, dtype="float32", model="wide")


# Who is reached from other hosts needs a secret.
_FAR = {SECRET_VARIABLE: "of the tests", "NIXL_LOG_LEVEL": "FATAL"}


class Child:
    """The process, from the outside."""

    def __init__(
        self,
        instance: str,
        fault: str = "none",
        address: str = LOCAL,
        prefix: Sequence[str] = (),
    ) -> None:
        """`prefix`: a command to run it under."""
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.transfer_child", instance, fault, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(_FAR if fault == "tcp" else {})},
        )
        self.address = self._answer()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def ask(self, line: str) -> str:
        self.say(line)
        return self._answer()

    def stop(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _stuck(owner: Owner, layout: KVLayout) -> list[Transport]:
    """The first write does not end before it is cancelled."""
    return [FaultyTransport(ShmTransport(layout), listed(Drop()), MonotonicClock())]


def _tcp(owner: Owner, layout: KVLayout) -> list[Transport]:
    """What a cable between hosts can carry, though both are one."""
    from memserve.transfer.nixl import NixlTransport

    return [NixlTransport(owner, layout, "tcp")]


def main(instance: str, fault: str, address: str) -> None:
    make = {"none": None, "stuck": _stuck, "tcp": _tcp}[fault]
    layout = WIDE if fault == "tcp" else LAYOUT
    path: PathName = "nixl" if fault == "tcp" else "auto"
    with MemPool(layout, BLOCKS, instance=instance, transports=make, path=path) as pool:
        print(pool.serve(address), flush=True)
        transfer: Transfer | None = None
        for line in sys.stdin:
            command, *words = line.split()
            if command == "connect":
                pool.connect(words[0], words[1])
                print("connected", flush=True)
            elif command == "send":
                count = int(words[1])
                tokens = list(range(count * layout.block_tokens))
                transfer = pool.transfer_with_insert(words[0], tokens, filled(pool, count))
                print("sending", flush=True)
            elif command == "result":
                assert transfer is not None
                try:
                    transfer.result(PATIENCE)
                    print("done", flush=True)
                except TransferError as error:
                    print(f"{type(error).__name__}: {error}", flush=True)
            elif command == "whole":
                count = int(words[0])
                with pool.match(list(range(count * layout.block_tokens))) as match:
                    expected = kv_blocks(count, layout=layout)[: len(match.refs)]
                    right = torch.equal(pool.read(match.refs), expected)
                    print(len(match.refs) if right else "wrong", flush=True)
            elif command == "left":
                pool.check_integrity()
                peers = pool.peer_stats()
                print(peers.outgoing, peers.quarantined, pool.stats().hbm.active, flush=True)
            elif command == "hold":
                pool.alloc_mem(int(words[1]), instance=words[0])
                print("held", flush=True)
            elif command == "active":
                pool.check_integrity()
                print(pool.stats().hbm.active, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
