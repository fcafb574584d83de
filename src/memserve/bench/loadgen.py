"""A load generator for sessions.

Open loop: sessions arrive as a Poisson process, whatever the server does. Within a session, the
next turn is sent as soon as the answer before it has ended, because its prompt contains that
answer. A late sender would make a slow server look fast (coordinated omission), so times count
from the schedule, and lateness is reported.

Closed loop: a fixed number of sessions at a time; the next one begins when one has ended. The
server sets the pace, so such runs measure its throughput, and not the waits of real clients.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from memserve.api.request_stats import RequestStats
from memserve.bench.openai_client import Answer, OpenAIClient
from memserve.clock import Clock
from memserve.workloads.session import Session, TokenRequest

_WARM_UP_TOKENS = 4


class RequestRecord(msgspec.Struct, frozen=True):
    """One request. Times are seconds since the run began."""

    session: str
    turn: int
    scheduled: float  # planned time of sending
    sent: float
    first_token: float | None  # None: no token arrived
    chunk_times: tuple[float, ...]
    end: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    error: str | None
    figures: RequestStats | None = None  # `usage.memserve`, if the server sends it


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """Settings of the load."""

    rate: float  # sessions per second, mean
    seed: int
    replay_answers: bool = False  # history from the data's answers instead of the server's
    concurrency: int | None = None  # sessions at a time: a closed loop, without a rate


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Records of all requests, by session and turn."""

    records: tuple[RequestRecord, ...]
    unsent: int  # turns behind a failed one, whose prompts need its answer


def arrival_times(count: int, rate: float, seed: int) -> tuple[float, ...]:
    """Return the arrival times in seconds of `count` sessions of a Poisson process with `rate` per
    second."""
    gaps = random.Random(seed)
    times: list[float] = []
    now = 0.0
    for _ in range(count):
        now += gaps.expovariate(rate)
        times.append(now)
    return tuple(times)


async def warm_up(client: OpenAIClient, requests: int) -> str | None:
    """Send short requests one after the other, so that the server has made its first allocations,
    compilations and connections. Stop at an error and return it; None: no error.
    """
    for index in range(requests):
        messages = [{"role": "user", "content": f"This is warm-up request number {index}."}]
        answer = await client.chat(messages, _WARM_UP_TOKENS)
        if answer.error is not None:
            return answer.error
    return None


async def generate_load(
    client: OpenAIClient,
    work: Sequence[Session | TokenRequest],
    settings: LoadSettings,
    clock: Clock,
    finished: Callable[[RequestRecord], None] = lambda _: None,
) -> LoadResult:
    """Send every session at its time and wait for the last answer.

    A TokenRequest has its own arrival time, which a closed loop ignores. `finished` is called after
    each request. A failed request ends its session.
    """
    run = _Run(client, settings.replay_answers, clock, clock.now(), finished)
    if settings.concurrency is None:
        records = await _open_loop(run, work, settings)
    else:
        records = await _closed_loop(run, work, settings.concurrency)
    return LoadResult(tuple(records), unsent=sum(map(request_count, work)) - len(records))


async def _open_loop(
    run: _Run, work: Sequence[Session | TokenRequest], settings: LoadSettings
) -> list[RequestRecord]:
    times = arrival_times(len(work), settings.rate, settings.seed)
    tasks = []
    async with asyncio.TaskGroup() as group:
        for item, arrival in zip(work, times, strict=True):
            at = arrival if isinstance(item, Session) else item.arrival
            tasks.append(group.create_task(run.item(item, at)))
    return [record for task in tasks for record in task.result()]


async def _closed_loop(
    run: _Run, work: Sequence[Session | TokenRequest], concurrency: int
) -> list[RequestRecord]:
    found: list[list[RequestRecord]] = [[] for _ in work]
    waiting = iter(enumerate(work))

    async def user() -> None:
        for index, item in waiting:  # one iterator for all tasks: each takes the next session
            found[index] = await run.item(item, run.elapsed())

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(work))):
            group.create_task(user())
    return [record for records in found for record in records]


def request_count(item: Session | TokenRequest) -> int:
    """Return the number of requests of a session, or 1."""
    return len(item.turns) if isinstance(item, Session) else 1


class _Run:
    """Sends sessions, turn after turn, and requests. Times are seconds since `start`."""

    def __init__(
        self,
        client: OpenAIClient,
        replay_answers: bool,
        clock: Clock,
        start: float,
        finished: Callable[[RequestRecord], None],
    ) -> None:
        self._client = client
        self._replay_answers = replay_answers
        self._clock = clock
        self._start = start
        self._finished = finished

    def elapsed(self) -> float:
        return self._clock.now() - self._start

    async def item(self, item: Session | TokenRequest, arrival: float) -> list[RequestRecord]:
        await asyncio.sleep(max(0.0, arrival - self.elapsed()))
        if isinstance(item, Session):
            return await self._session(item, arrival)
        answer = await self._client.complete(item.prompt, item.output_tokens)
        return [self._record(item.id, 0, arrival, answer)]

    async def _session(self, session: Session, arrival: float) -> list[RequestRecord]:
        records: list[RequestRecord] = []
        past: list[str] = []  # prompts and answers, alternating
        scheduled = arrival
        for index, turn in enumerate(session.turns):
            past.append(turn.prompt)
            answer = await self._ask(session, past, turn.output_tokens)
            record = self._record(session.id, index, scheduled, answer)
            records.append(record)
            if record.error is not None:
                break
            scheduled = record.end
            past.append(turn.answer if self._replay_answers else answer.text)
        return records

    async def _ask(self, session: Session, past: Sequence[str], output_tokens: int) -> Answer:
        if not session.chat:
            return await self._client.complete("".join(past), output_tokens, session.id)
        roles = itertools.cycle(("user", "assistant"))
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, past, strict=False)
        ]
        return await self._client.chat(messages, output_tokens, session.id)

    def _record(self, session: str, turn: int, scheduled: float, answer: Answer) -> RequestRecord:
        times = tuple(time - self._start for time in answer.chunk_times)
        record = RequestRecord(
            session=session,
            turn=turn,
            scheduled=scheduled,
            sent=answer.sent - self._start,
            first_token=times[0] if times else None,
            chunk_times=times,
            end=answer.end - self._start,
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            output_tokens=answer.output_tokens,
            error=answer.error,
            figures=answer.figures,
        )
        self._finished(record)
        return record
