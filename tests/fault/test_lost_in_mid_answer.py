"""Instances that are killed where there are others of their kind."""

from __future__ import annotations

import signal
import time
from typing import Any

from memserve.types import Role
from tests.fakes import metric
from tests.fault.conftest import Expected
from tests.fault.processes import Client, Processes, Served, until, until_ready
from tests.fault.table import FaultTable
from tests.handoff_harness import prompt_of

PROMPT = prompt_of(100, seed=1)
LENGTH = 50
# An answer lasts a second, so that there is time to end the instance that makes it.
SLOW = 0.02
LONG = prompt_of(300, seed=2)


def busy(*instances: Served) -> Served:
    """The one that has the request."""
    until(lambda: any(each.state.running for each in instances), "the request")
    return next(each for each in instances if each.state.running)


def test_another_decode_instance_goes_on_with_the_prefill_instances_prefix(
    processes: Processes, expected: Expected, table: FaultTable
) -> None:
    wanted = expected(PROMPT, LENGTH)
    decodes = [processes.instance(Role.DECODE, f"decode-{n}", step_seconds=SLOW) for n in range(2)]
    prefill = processes.instance(Role.PREFILL, "prefill")
    gateway = processes.gateway(prefill, *decodes)
    until_ready(gateway, "prefill", "decode-0", "decode-1")
    client = Client(gateway, PROMPT, LENGTH)
    client.wait(5)
    lost = busy(*decodes)
    (other,) = [each for each in decodes if each is not lost]
    fault = time.monotonic()
    lost.signal(signal.SIGKILL)
    until_ready(gateway, "prefill", other.name)
    assert client.result() == wanted
    until(lambda: prefill.quiet and other.quiet, "the end of all leases")
    whole = time.monotonic() - fault
    handoff = other.stats["handoff"]
    assert (handoff["asked"], handoff["failed"]) == (1, 0)
    assert handoff["cached_tokens_prefill"] >= len(PROMPT) // 16 * 16
    assert metric(gateway.url, "memserve_failovers_total") == 1
    assert metric(gateway.url, "memserve_failover_pause_seconds_count") == 1
    happened = "the other D went on, with the prompt's KV from P"
    table.note("in decode: one of two D killed", happened, whole, client.pause(fault))


def test_another_colocated_instance_goes_on(
    processes: Processes, expected: Expected, table: FaultTable
) -> None:
    wanted = expected(PROMPT, LENGTH)
    names = ("colocated-0", "colocated-1")
    both = [processes.instance(Role.COLOCATED, name, step_seconds=SLOW) for name in names]
    gateway = processes.gateway(*both)
    until_ready(gateway, *names)
    client = Client(gateway, PROMPT, LENGTH)
    client.wait(5)
    lost = busy(*both)
    (other,) = [each for each in both if each is not lost]
    fault = time.monotonic()
    lost.signal(signal.SIGKILL)
    until_ready(gateway, other.name)
    assert client.result() == wanted
    until(lambda: other.quiet, "the end of the request")
    whole = time.monotonic() - fault
    assert Client(gateway, LONG, 8).result() == expected(LONG, 8)
    assert metric(gateway.url, "memserve_failovers_total") == 1
    table.note(
        "in decode: one of two colocated instances killed",
        "the other one computed the prompt and went on",
        whole,
        client.pause(fault),
    )


def test_another_prefill_instance_computes_the_prompt(
    processes: Processes, expected: Expected, table: FaultTable
) -> None:
    wanted = expected(LONG, 8)
    small: dict[str, Any] = {"max_batch_tokens": 1, "mixed_batch_tokens": 1, "step_seconds": 0.002}
    prefills = [processes.instance(Role.PREFILL, f"prefill-{n}", **small) for n in range(2)]
    decode = processes.instance(Role.DECODE, "decode")
    gateway = processes.gateway(*prefills, decode)
    until_ready(gateway, "prefill-0", "prefill-1", "decode")
    client = Client(gateway, LONG, 8)
    lost = busy(*prefills)
    (other,) = [each for each in prefills if each is not lost]
    fault = time.monotonic()
    lost.signal(signal.SIGKILL)
    until_ready(gateway, "decode", other.name)
    assert client.result() == wanted
    until(lambda: decode.quiet and other.quiet, "the end of all leases")
    whole = time.monotonic() - fault
    handoff = decode.stats["handoff"]
    assert (handoff["asked"], handoff["failed"]) == (2, 1)
    assert handoff["blocks_received"] == len(LONG) // 16
    happened = "D asked the other P"
    table.note("in prefill: one of two P killed", happened, whole, client.pause(fault))


def test_the_only_instance_goes_on_when_it_is_back(
    processes: Processes, expected: Expected, table: FaultTable
) -> None:
    wanted = expected(PROMPT, LENGTH)
    only = processes.instance(Role.COLOCATED, "only", step_seconds=SLOW)
    gateway = processes.gateway(only)
    until_ready(gateway, "only")
    client = Client(gateway, PROMPT, LENGTH)
    client.wait(5)
    fault = time.monotonic()
    only.signal(signal.SIGKILL)
    until_ready(gateway)
    meanwhile = Client(gateway, PROMPT, LENGTH)
    back = processes.instance(Role.COLOCATED, "only", join=[gateway.url]).begun()
    assert client.result() == wanted
    assert meanwhile.result() == wanted
    until(lambda: back.quiet, "the end of all leases")
    whole = time.monotonic() - fault
    assert metric(gateway.url, "memserve_failovers_total") == 1
    happened = "the stream went on when it was back, and the next request waited for it"
    table.note(
        "in decode: the only instance killed, and started again",
        happened,
        whole,
        client.pause(fault),
    )


def test_where_no_other_comes_the_client_is_told(processes: Processes, table: FaultTable) -> None:
    wait = 2.0
    only = processes.instance(Role.COLOCATED, "only", step_seconds=SLOW)
    gateway = processes.gateway(only, instance_wait=wait)
    until_ready(gateway, "only")
    client = Client(gateway, PROMPT, LENGTH)
    client.wait(5)
    fault = time.monotonic()
    only.signal(signal.SIGKILL)
    client.join()
    assert client.error == "instance_lost"
    told = time.monotonic() - fault
    until_ready(gateway)
    refused = Client(gateway, PROMPT, 8)
    refused.join()
    assert refused.refused
    table.note(
        f"in decode: the only instance killed, `instance_wait_seconds` {wait:g}",
        "the stream ended with `instance_lost` (pause: until then), the next was answered 503",
        time.monotonic() - fault,
        told,
    )
