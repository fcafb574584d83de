"""An instance's stream as a gateway and a client see it, for tests of streams that go on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from memserve.api.generate import GenerateCall
from memserve.instance.instance import Instance
from memserve.tokens import from_ids


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event: the tokens that its comment names, and its data."""

    choice: int | None
    token_ids: tuple[int, ...]
    data: bytes  # b"": none


def events_of(stream: bytes) -> list[Event]:
    """Parses what `chunks.py` describes, and nothing else."""
    *parts, rest = stream.split(b"\n\n")
    assert rest == b""
    return [_event(part) for part in parts]


def _event(part: bytes) -> Event:
    choice, token_ids = None, ()
    if part.startswith(b":"):
        comment, _, part = part.partition(b"\n")
        number, _, names = comment[1:].partition(b" ")
        choice, token_ids = int(number), tuple(map(int, names.split(b",")))
        assert token_ids
    assert b"\n" not in part
    assert not part or part.startswith(b"data: ")
    return Event(choice, token_ids, part[len(b"data: ") :])


async def stream_of(instance: Instance, call: GenerateCall) -> bytes:
    """All that an instance streams for a call."""
    stream = b""
    constraints = await instance.constraints(call)
    with instance.run(call, constraints) as run:
        while not run.generation.finished:
            stream += await run.step()
    return stream


def resumed(call: GenerateCall, seen: Sequence[Event]) -> GenerateCall:
    """The call that a gateway makes whose client has got so many events."""
    choices: list[list[int]] = [[] for _ in range(len(call.prompts) * call.n)]
    usage = call.include_usage
    for event in seen:
        if event.choice is not None:
            choices[event.choice] += event.token_ids
        elif event.data != b"[DONE]":
            usage = False
    return msgspec.structs.replace(call, resumed=tuple(map(from_ids, choices)), include_usage=usage)


def by_choice(call: GenerateCall, events: Sequence[Event]) -> list[list[Event]]:
    """The events of each choice, and at the end the others without what may differ."""
    lists: list[list[Event]] = [[] for _ in range(len(call.prompts) * call.n + 1)]
    for event in events:
        last = event.choice is None
        lists[-1 if event.choice is None else event.choice].append(
            Event(None, (), _comparable(event.data)) if last else event
        )
    return lists


def _comparable(data: bytes) -> bytes:
    if data == b"[DONE]":
        return data
    chunk: dict[str, Any] = json.loads(data)
    del chunk["usage"]["prompt_tokens_details"], chunk["usage"]["memserve"]
    return json.dumps(chunk).encode()
