"""Hand-overs whose prefill or decode instance is killed, or whose client leaves, at every step.

Each step is one that lasts until the test is done with it: a queue behind a long prompt, a long
prompt that is computed a token at a time, or a write that the transport does not end.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from memserve.config import TransferMode
from memserve.types import Role
from tests.fault.conftest import Expected
from tests.fault.processes import Client, Processes, Served, until, until_ready
from tests.fault.table import FaultTable
from tests.faulty_transport import Drop, Fault, Mute
from tests.handoff_harness import prompt_of

PROMPT = prompt_of(100, seed=1)
LONG = prompt_of(300, seed=2)
OTHER = prompt_of(40, seed=3)
SHORT_ANSWER, LONG_ANSWER = 8, 50
Who = Literal["prefill", "decode", "client"]


@dataclass(frozen=True, slots=True)
class Step:
    """A moment of a request, and how it is made to last."""

    prompt: list[int] = field(default_factory=lambda: PROMPT)
    tokens: int = SHORT_ANSWER
    mode: TransferMode = "by-request-agg"
    prefill: dict[str, Any] = field(default_factory=dict)  # settings
    prefill_faults: tuple[Fault | None, ...] = ()  # of writes
    decode: dict[str, Any] = field(default_factory=dict)
    decode_faults: tuple[Fault | None, ...] = ()


SLOW = {"max_batch_tokens": 1, "mixed_batch_tokens": 1, "step_seconds": 0.002}
STEPS = {
    "queued, before Prepare": Step(prefill={**SLOW, "max_running": 1}),
    "in prefill": Step(prompt=LONG, prefill=SLOW),
    "between layers": Step(mode="by-layer", prefill_faults=(None, Drop(), Drop())),
    "in transfer": Step(prefill_faults=(Drop(),)),
    "after the last write, before Commit": Step(prefill_faults=(Mute(),)),
    "in decode": Step(tokens=LONG_ANSWER, decode={"step_seconds": 0.02}),
    "in the back-transfer": Step(tokens=30, decode_faults=(Drop(),)),
}
# Something may be on its way, and D has nothing yet.
HALFWAY = tuple(STEPS)[1:5]
CASES = [
    pytest.param(step, who, id=f"{who} {step}")
    for step in STEPS
    for who in ("prefill", "decode", "client")
    if (step, who) != ("in the back-transfer", "client")  # who has its answer already
]


class Pair:
    """A prefill and a decode instance behind a gateway."""

    def __init__(self, processes: Processes, step: Step) -> None:
        self.prefill = processes.instance(
            Role.PREFILL, "prefill", *step.prefill_faults, mode=step.mode, **step.prefill
        )
        self.decode = processes.instance(
            Role.DECODE, "decode", *step.decode_faults, mode=step.mode, **step.decode
        )
        self.gateway = processes.gateway(self.prefill, self.decode)
        until_ready(self.gateway, "prefill", "decode")

    def begin(self, name: str, step: Step) -> list[Client]:
        """Ask, and wait for that step. The client of the request, and others."""
        p, d = self.prefill, self.decode
        others: list[Client] = []
        if name.startswith("queued"):
            others.append(Client(self.gateway, LONG, SHORT_ANSWER))
            until(lambda: p.state.running == 1, "one that is in the way")
        client = Client(self.gateway, step.prompt, step.tokens)
        match name:
            case "queued, before Prepare":
                until(lambda: p.state.waiting == 1, "the queue")
            case "in prefill":
                start = p.state.steps
                until(lambda: p.state.steps > start + 20, "the prompt at work")
            case "between layers":
                until(lambda: p.state.posted == 3, "the layers' writes")
            case "in transfer" | "after the last write, before Commit":
                until(lambda: p.state.posted == 1, "the write")
            case "in decode":
                client.wait(5)
                assert d.state.running == 1
            case "in the back-transfer":
                client.result()
                until(lambda: d.state.posted == 1, "the write")
        return [client, *others]


@pytest.mark.parametrize(("name", "who"), CASES)
def test_a_request_survives_what_ends(
    processes: Processes, expected: Expected, table: FaultTable, name: str, who: Who
) -> None:
    step = STEPS[name]
    wanted, also_wanted = expected(step.prompt, step.tokens), expected(LONG, SHORT_ANSWER)
    pair = Pair(processes, step)
    client, *others = pair.begin(name, step)
    survivors = {"prefill": pair.prefill, "decode": pair.decode}
    fault = time.monotonic()
    if who == "client":
        client.leave()
    else:
        survivors.pop(who).signal(signal.SIGKILL)
        assert client.result() == wanted
    for other in others:
        assert other.result() == also_wanted
    for each in survivors.values():
        until(lambda each=each: each.quiet, f"{each.name} at rest")  # type: ignore[misc]
    until_ready(pair.gateway, *survivors)
    whole = time.monotonic() - fault
    if name in HALFWAY and who == "client":
        assert pair.decode.state.cached == 0  # what has not all come is not to be seen
    if name == "in the back-transfer" and who == "decode":
        assert pair.prefill.state.cached == len(PROMPT) // 16
    serves_on(pair.gateway, expected, step)
    nothing_is_lost(*survivors.values())
    handoff = pair.decode.stats["handoff"] if who != "decode" else None
    table.note(
        f"{name}: {_fault(who)}",
        _happened(name, who, handoff),
        whole,
        client.pause(fault),
    )


def serves_on(gateway: Served, expected: Expected, step: Step) -> None:
    """The right tokens, of what had been cut off and of something new."""
    for prompt in (step.prompt, OTHER):
        again = Client(gateway, prompt, SHORT_ANSWER)
        assert again.result() == expected(prompt, SHORT_ANSWER)


def nothing_is_lost(*instances: Served) -> None:
    for each in instances:
        until(lambda each=each: each.quiet, f"{each.name} at rest")  # type: ignore[misc]
        assert each.state.blocks == 160 + 16


def _fault(who: Who) -> str:
    return "the client leaves" if who == "client" else f"{who[0].upper()} killed"


def _happened(name: str, who: Who, handoff: Any) -> str:
    answering = name in ("in decode", "in the back-transfer")
    if who == "client":
        return "cancelled on both sides"
    if who == "prefill":
        others = name.startswith("queued")  # which were asked for, too
        assert handoff["failed"] == (0 if answering else 1 + others)
        return "D went on undisturbed" if answering else "D computed the prompt"
    if name == "in the back-transfer":
        return "the client had its answer"
    return "P went on behind what the client had" if answering else "the gateway asked P instead"
