"""Instances that are stopped, and go on later: silent for longer than any lease, and not dead."""

from __future__ import annotations

import signal
import time
from typing import Any

from memserve.types import Role
from tests.fault.conftest import Expected
from tests.fault.processes import Client, Processes, until, until_ready
from tests.fault.table import FaultTable
from tests.handoff_harness import prompt_of

LONG = prompt_of(500, seed=2)
SHORT = prompt_of(100, seed=1)
BLOCKS = len(LONG) // 16


def test_what_a_stopped_prefill_instance_may_still_write_to_is_not_given_away(
    processes: Processes, expected: Expected, table: FaultTable
) -> None:
    wanted = expected(LONG, 8)
    slow: dict[str, Any] = {"max_batch_tokens": 1, "mixed_batch_tokens": 1, "step_seconds": 0.002}
    prefill = processes.instance(Role.PREFILL, "prefill", **slow)
    decode = processes.instance(Role.DECODE, "decode")
    gateway = processes.gateway(prefill, decode)
    until_ready(gateway, "prefill", "decode")
    client = Client(gateway, LONG, 8)
    start = prefill.state.steps
    until(lambda: prefill.state.steps > start + 20, "the prompt at work")
    fault = time.monotonic()
    prefill.signal(signal.SIGSTOP)
    assert client.result() == wanted
    until(lambda: decode.state.quarantined == BLOCKS, "the quarantine")
    until_ready(gateway, "decode")
    assert Client(gateway, SHORT, 8).result() == expected(SHORT, 8)
    assert decode.stats["handoff"]["asked"] == 1
    pause = client.pause(fault)
    back = time.monotonic()
    prefill.signal(signal.SIGCONT)
    until(lambda: prefill.quiet and decode.quiet, "the end of all leases and quarantines")
    until_ready(gateway, "prefill", "decode")
    until(lambda: "prefill" in decode.state.peers, "P's word that it serves calls again")
    whole = time.monotonic() - back
    assert Client(gateway, LONG[:300], 8).result() == expected(LONG[:300], 8)
    handoff = decode.stats["handoff"]
    assert (handoff["asked"], handoff["failed"]) == (2, 1)
    happened = "D computed the prompt, and kept its blocks apart until P went on (whole: from then)"
    table.note("in prefill: P stopped, and let go on", happened, whole, pause)


def test_a_stopped_decode_instance_is_followed_by_another(
    processes: Processes, expected: Expected, table: FaultTable
) -> None:
    wanted = expected(SHORT, 50)
    prefill = processes.instance(Role.PREFILL, "prefill")
    decode = processes.instance(Role.DECODE, "decode", step_seconds=0.02)
    gateway = processes.gateway(prefill, decode)
    until_ready(gateway, "prefill", "decode")
    client = Client(gateway, SHORT, 50)
    client.wait(5)
    fault = time.monotonic()
    decode.signal(signal.SIGSTOP)
    assert client.result() == wanted
    until(lambda: prefill.quiet, "the end of all leases")
    until_ready(gateway, "prefill")
    back = time.monotonic()
    decode.signal(signal.SIGCONT)
    until(lambda: decode.quiet, "the end of what nobody waits for")
    until_ready(gateway, "prefill", "decode")
    whole = time.monotonic() - back
    assert Client(gateway, LONG, 8).result() == expected(LONG, 8)
    happened = "P went on behind what the client had (whole: from when D went on)"
    table.note("in decode: D stopped, and let go on", happened, whole, client.pause(fault))
