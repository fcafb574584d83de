"""A pool in a process of its own, driven line by line: for tests that stop and kill it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import TracebackType

from memserve import KVLayout, MemPool
from memserve.clock import MonotonicClock
from memserve.transfer.base import Transport
from memserve.transfer.faulty import Drop, FaultyTransport, listed
from memserve.transfer.shm import ShmTransport
from memserve.types import Owner
from tests.transfer_harness import LAYOUT, LOCAL, filled, tokens_of

BLOCKS = 16


class Child:
    """The process, from the outside."""

    def __init__(self, instance: str, fault: str = "none", address: str = LOCAL) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.transfer_child", instance, fault, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
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


def main(instance: str, fault: str, address: str) -> None:
    make = {"none": None, "stuck": _stuck}[fault]
    with MemPool(LAYOUT, BLOCKS, instance=instance, transports=make) as pool:
        print(pool.serve(address), flush=True)
        for line in sys.stdin:
            command, *words = line.split()
            if command == "connect":
                pool.connect(words[0], words[1])
                print("connected", flush=True)
            elif command == "send":
                count = int(words[1])
                pool.transfer_with_insert(words[0], tokens_of(count), filled(pool, count))
                print("sending", flush=True)
            elif command == "hold":
                pool.alloc_mem(int(words[1]), instance=words[0])
                print("held", flush=True)
            elif command == "active":
                pool.check_integrity()
                print(pool.stats().hbm.active, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
