"""Sessions for the simulator, from traces and from text workloads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from memserve.errors import ConfigError
from memserve.sim.prompt import BlockKeys, SimRequest, SimSession
from memserve.types import RequestId
from memserve.workloads.session import Session
from memserve.workloads.trace import (
    MOONCAKE,
    TraceFormat,
    TraceLine,
    TracePrompts,
    TraceScale,
    conversations,
)

Encode = Callable[[str], Sequence[int]]


def trace_sessions(
    lines: Iterable[TraceLine],
    keys: BlockKeys,
    speed: float = 1.0,
    form: TraceFormat = MOONCAKE,
) -> Iterator[SimSession]:
    """Sessions of one request each, at the trace's arrival times divided by `speed`. A request's
    `session` names its conversation."""
    scale = TraceScale(keys.block_tokens, trace_block_tokens=form.block_tokens)
    prompts = TracePrompts(scale)
    for number, (name, line) in enumerate(conversations(lines)):
        tokens = prompts.of(line)
        request = SimRequest(
            id=RequestId(f"trace-{number}"),
            tokens=tokens,
            keys=keys.of(tokens),
            output_tokens=max(1, line.output_length),
            session=name,
        )
        yield SimSession(line.timestamp / 1000 / speed, (request,))


def text_sessions(
    sessions: Sequence[Session], keys: BlockKeys, encode: Encode, rate: float, seed: int
) -> Iterator[SimSession]:
    """Sessions of text, with the data's answers, in Poisson arrivals of `rate` per second. Raises
    ConfigError for a rate that is not positive."""
    if rate <= 0:
        raise ConfigError(f"a rate of {rate} sessions per second")
    gaps = random.Random(seed)
    now = 0.0
    for number, session in enumerate(sessions):
        now += gaps.expovariate(rate)
        requests = []
        past: list[int] = []
        for index, turn in enumerate(session.turns):
            past += encode(turn.prompt)
            prompt = np.array(past, dtype=np.int32)
            answer = list(encode(turn.answer))[: turn.output_tokens]
            past += answer
            # The last token of an answer is not fed to the model, so it has no KV.
            final = np.array(past[:-1], dtype=np.int32)
            requests.append(
                SimRequest(
                    id=RequestId(f"{session.id}-{number}-{index}"),
                    tokens=prompt,
                    keys=keys.of(prompt),
                    output_tokens=max(1, len(answer)),
                    session=f"{session.id}-{number}",
                    final_tokens=final,
                    final_keys=keys.of(final),
                )
            )
        yield SimSession(now, tuple(requests))
