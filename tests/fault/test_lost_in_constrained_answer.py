"""Instances that are killed in the middle of an answer that obeys a schema."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from memserve.models.tokenizer import Tokenizer
from memserve.types import Role
from tests.fakes import metric
from tests.fault.processes import Client, Processes, Served, until, until_ready
from tests.grammar_harness import check
from tests.handoff_harness import prompt_of

PROMPT = prompt_of(100, seed=1)
LENGTH = 400
SLOW = 0.02
ROW = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[a-f]{6}-[0-9]{4}$"},
        "ok": {"type": "boolean"},
        "size": {"type": "integer", "minimum": 1000, "maximum": 9999},
    },
    "required": ["id", "ok", "size"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ROW, "minItems": 3, "maxItems": 3}
FIELDS: dict[str, Any] = {
    "temperature": 2,
    "seed": 11,
    "ignore_eos": False,
    "structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True},
}


def ask(gateway: Served) -> Client:
    return Client(gateway, PROMPT, LENGTH, **FIELDS)


def lose(client: Client, *instances: Served) -> Served:
    """Kill the one of them that answers, in the middle. Returns the other."""
    client.wait(20)
    until(lambda: any(each.state.running for each in instances), "the request")
    lost = next(each for each in instances if each.state.running)
    assert client.error is None
    lost.signal(signal.SIGKILL)
    return next(each for each in instances if each is not lost)


def test_the_answer_of_a_lost_instance_goes_on_and_obeys(processes: Processes, model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    colocated = [processes.instance(Role.COLOCATED, f"c{n}", step_seconds=SLOW) for n in range(2)]
    gateway = processes.gateway(*colocated)
    until_ready(gateway, "c0", "c1")
    expected = ask(gateway).result()
    check(tokenizer.decode(expected), SCHEMA)
    client = ask(gateway)
    other = lose(client, *colocated)
    assert client.result() == expected
    assert metric(gateway.url, "memserve_failovers_total") == 1
    until(lambda: other.quiet, "the end of the request")


def test_and_so_does_one_whose_prompt_another_instance_computes(
    processes: Processes, model: Path
) -> None:
    tokenizer = Tokenizer.load(model)
    decodes = [processes.instance(Role.DECODE, f"d{n}", step_seconds=SLOW) for n in range(2)]
    prefill = processes.instance(Role.PREFILL, "p")
    gateway = processes.gateway(prefill, *decodes)
    until_ready(gateway, "p", "d0", "d1")
    expected = ask(gateway).result()
    check(tokenizer.decode(expected), SCHEMA)
    client = ask(gateway)
    other = lose(client, *decodes)
    assert client.result() == expected
    assert metric(gateway.url, "memserve_failovers_total") == 1
    until(lambda: prefill.quiet and other.quiet, "the end of all leases")
    assert other.stats["handoff"]["failed"] == 0
