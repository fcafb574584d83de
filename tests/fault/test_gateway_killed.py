"""A gateway that is killed under load: what it knew comes back from the instances, which do not
notice."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from memserve.types import Role
from tests.fault.conftest import Expected
from tests.fault.processes import Client, Processes, Served, get, until, until_ready
from tests.fault.table import FaultTable
from tests.handoff_harness import prompt_of

# Less than what is asked for: blocks go to DRAM, and from there for good.
SMALL: dict[str, Any] = {"hbm_blocks": 40, "dram_blocks": 20}
SHARED = prompt_of(64, seed=50)
LAST = prompt_of(100, seed=1)
ROLES = {"prefill": Role.PREFILL, "decode": Role.DECODE, "colocated": Role.COLOCATED}


class Load:
    """Clients without a pause, also while there is no gateway."""

    def __init__(self, gateway: Served, clients: int = 3) -> None:
        self.answers = 0
        self.wrong: list[str] = []
        self.cut_off = 0
        self._gateway = gateway
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(number,)) for number in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def more(self, answers: int) -> None:
        wanted = self.answers + answers
        until(lambda: self.answers >= wanted, "answers")

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, client: int) -> None:
        for turn in itertools.count():
            if self._over.is_set():
                return
            prompt = SHARED + prompt_of(20 + turn % 60, seed=1000 * client + turn % 15)
            asked = Client(self._gateway, prompt, 12)
            asked.join()
            if asked.error is None:
                self.answers += 1
                if len(asked.tokens) != 12:
                    self.wrong.append(f"{len(asked.tokens)} tokens")
            elif asked.refused:
                time.sleep(0.05)  # nobody is there
            else:
                self.cut_off += 1


def test_the_trees_of_a_killed_gateway_come_back(
    processes: Processes, expected: Expected, table: FaultTable
) -> None:
    first = processes.gateway(policy="prompt-tree")
    port = urlsplit(first.url).port
    assert port is not None
    instances = {
        name: processes.instance(role, name, join=[first.url], **SMALL).begun()
        for name, role in ROLES.items()
    }
    until_ready(first, *ROLES)
    load = Load(first)
    load.more(30)
    lives = {name: each.life for name, each in instances.items()}
    before = {name: each.stats["engine"]["generated_tokens"] for name, each in instances.items()}
    fault = time.monotonic()
    first.signal(signal.SIGKILL)
    second = processes.gateway(policy="prompt-tree", port=port)
    until_ready(second, *ROLES)
    back = time.monotonic()
    load.more(10)
    load.end()

    def equal() -> bool:
        return second.trees == {name: each.indexed for name, each in instances.items()}

    until(equal, "trees that equal the indexes")
    whole = time.monotonic() - back
    assert load.wrong == []
    assert all(second.trees.values())
    assert {name: each.life for name, each in instances.items()} == lives
    for name, each in instances.items():
        assert each.stats["engine"]["generated_tokens"] >= before[name]
        until(lambda each=each: each.quiet, f"{name} at rest")  # type: ignore[misc]
    assert Client(second, LAST, 12).result() == expected(LAST, 12)
    until(equal, "trees that equal the indexes")
    again = Client(second, LAST, 12)
    assert again.result() == expected(LAST, 12)
    (decision,) = get(f"{second.url}/cluster/decisions?n=1")
    known = [candidate.get("cached_tokens", 0) for candidate in decision["candidates"]]
    assert max(known) == len(LAST) // 16 * 16
    cached = again.usage["prompt_tokens_details"]["cached_tokens"]
    assert cached >= decision["chosen"].get("cached_tokens", 0)
    happened = (
        f"{load.cut_off} streams were cut off; back with all members after {back - fault:.1f} s "
        "(whole: from then until its trees equalled the indexes, load included)"
    )
    table.note("under load: the gateway killed, and started again", happened, whole)
