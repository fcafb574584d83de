"""Loads of the comparison: Mooncake's conversations, ReAct's agents, and a day made of both."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memserve.errors import ConfigError
from memserve.sim.inputs import Encode, text_sessions, trace_sessions
from memserve.sim.prompt import BlockKeys, SimRequest, SimSession
from memserve.types import RequestId
from memserve.workloads.session import SessionLimits
from memserve.workloads.text import text_sessions as chosen_sessions
from memserve.workloads.trace import BLOCK_TOKENS, read_trace

Kind = Literal["conversations", "agents"]
TRACE = "mooncake/conversation_trace.jsonl"
AGENTS = "react"
_RUNS = 400  # of agents that differ, in random order: as many as the data has
_LIMITS = SessionLimits(max_turns=8, max_output_tokens=512, max_context_tokens=8192)


@dataclass(frozen=True, slots=True)
class Phase:
    """Requests of one kind for some time. `rate`: requests per second, in the mean."""

    kind: Kind
    seconds: float
    rate: float


class Day:
    """Requests of both kinds, read once. Equal phases and seeds give equal sessions."""

    def __init__(self, data: Path, room: int, encode: Encode) -> None:
        """`data`: the folder with both; `room`: tokens of an instance's HBM, which a request must
        fit. Raises ConfigError."""
        keys = BlockKeys(BLOCK_TOKENS)
        self.refused = 0  # conversations longer than `room`
        self._conversations: list[SimSession] = []
        for session in trace_sessions(read_trace(data / TRACE), keys):
            (request,) = session.requests
            if request.prompt_tokens + request.output_tokens <= room:
                self._conversations.append(session)
            else:
                self.refused += 1
        if not self._conversations:
            raise ConfigError(f"{data / TRACE}: no request fits {room} tokens")
        self._length = self._conversations[-1].arrival
        known: dict[str, Sequence[int]] = {}

        def encode_once(text: str) -> Sequence[int]:
            if text not in known:
                known[text] = encode(text)
            return known[text]

        texts = chosen_sessions(
            "react", str(data / AGENTS), _RUNS, 0, _LIMITS, lambda text: len(encode_once(text))
        )
        self._agents = list(text_sessions(texts, keys, encode_once, 1.0, 0))
        self._turns = sum(len(one.requests) for one in self._agents) / len(self._agents)

    def sessions(self, phases: Sequence[Phase], seed: int) -> list[SimSession]:
        """Return fresh sessions of phases that follow each other, in order of arrival. Raises
        ConfigError for more conversations than the trace has."""
        found: list[SimSession] = []
        begins = told = 0.0
        for number, phase in enumerate(phases):
            if phase.kind == "agents":
                found += self._of_agents(phase, begins, random.Random(f"{seed}-{number}"))
            else:
                speed = phase.rate * self._length / len(self._conversations)
                found += self._of_people(phase, begins, told, speed)
                told += phase.seconds * speed
            begins += phase.seconds
        return found

    def _of_people(
        self, phase: Phase, begins: float, told: float, speed: float
    ) -> Iterator[SimSession]:
        """Yield the trace from `told` seconds on, `speed` times as fast."""
        last = told + phase.seconds * speed
        if last > self._length:
            raise ConfigError(
                f"{last:.0f} s of the conversation trace, which has {self._length:.0f}: "
                "shorter phases, fewer instances or a lower rate"
            )
        for session in self._conversations:
            if told <= session.arrival < last:
                arrival = begins + (session.arrival - told) / speed
                yield SimSession(arrival, tuple(map(_fresh, session.requests)))

    def _of_agents(
        self, phase: Phase, begins: float, chance: random.Random
    ) -> Iterator[SimSession]:
        """Yield runs of agents in Poisson arrivals."""
        at, number = begins, 0
        while True:
            at += chance.expovariate(phase.rate / self._turns)
            if at >= begins + phase.seconds:
                return
            session = chance.choice(self._agents)
            name = f"{begins:.0f}-{number}"
            number += 1
            yield SimSession(at, tuple(_fresh(one, name) for one in session.requests))


def kind_of(request: SimRequest) -> Kind:
    return "conversations" if request.id.startswith("trace-") else "agents"


def _fresh(request: SimRequest, name: str | None = None) -> SimRequest:
    """Return a request as it was before it ran; `name`: of another run of the same agent."""
    return SimRequest(
        id=request.id if name is None else RequestId(f"{name}-{request.id}"),
        tokens=request.tokens,
        keys=request.keys,
        output_tokens=request.output_tokens,
        session=request.session if name is None else name,
        final_tokens=request.final_tokens,
        final_keys=request.final_keys,
    )
