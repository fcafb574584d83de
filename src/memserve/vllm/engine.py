"""A vLLM server as the engine of an instance.

An instance gives its engine token ids and gets token ids back (`EngineProtocol`). Here each
sequence is a streaming request to the server's `/v1/completions`. Cancelling a sequence closes its
stream, and vLLM drops the sequence within a step.

One thread with an event loop of its own does all requests. The thread ends when the server cannot
be reached any more; the instance, which watches the thread, then ends, too.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

import aiohttp

from memserve.api.generate import FinishReason
from memserve.api.status import EngineTotals, MediumTotals, PoolTotals
from memserve.engine.request import (
    EngineInfo,
    EngineRequest,
    OutputSink,
    TokenOutput,
    validate_requests,
)
from memserve.errors import EngineStopped, QueueFull
from memserve.tracing.span import headers_of
from memserve.types import RequestId
from memserve.vllm.answers import (
    COMPLETIONS_PATH,
    AnswerReader,
    MalformedAnswer,
    completion_body,
    require_exact,
)
from memserve.vllm.metrics import ServerLoad, UnknownMetrics, read_load
from memserve.vllm.place import ServerPlace

log = logging.getLogger(__name__)

# The load is polled as often as a gateway polls members. A server counts as lost after MAX_MISSES
# polls in a row without an answer.
POLL_SECONDS = 1.0
POLL_TIMEOUT_SECONDS = 5.0
MAX_MISSES = 3
MAX_ERROR_BYTES = 2048
_EVERY_SEQUENCE = 0.9  # share of the running sequences that steps have to give a token each


class _Run:
    """One sequence in flight."""

    def __init__(self, request: EngineRequest, body: bytes) -> None:
        self.request = request
        self.body = body
        self.task: asyncio.Task[None] | None = None
        self.begun = asyncio.Event()  # set after the prompt is computed, or the sequence has ended
        self.tokens = 0  # generated


class VllmEngine:
    """An `EngineProtocol` that runs sequences at a vLLM server."""

    def __init__(self, place: ServerPlace, info: EngineInfo) -> None:
        """`info`: of the server at `place`; `model` is the name in its API."""
        self._place = place
        self._info = info
        self._thread = threading.Thread(target=self._main, name="vllm-engine", daemon=True)
        self._lock = threading.Lock()  # guards `_runs`, `_stopped` and `_loop`
        self._runs: dict[RequestId, _Run] = {}
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._end: asyncio.Event | None = None
        self._sink: OutputSink = lambda outputs: None
        self._load = ServerLoad()
        self._others_waiting = 0  # other clients' sequences, as of the last poll
        self._computed = self._cached = self._received = 0
        self._generated = self._finished = self._cancelled = 0
        self._busy = 0.0
        self._decoded = Decoded()

    @property
    def thread(self) -> threading.Thread:
        return self._thread

    @property
    def info(self) -> EngineInfo:
        return self._info

    def start(self, sink: OutputSink) -> None:
        self._sink = sink
        self._thread.start()
        self._ready.wait()

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        validate_requests(requests, self._info)
        runs = [_Run(request, completion_body(request, self._info.model)) for request in requests]
        with self._lock:
            self._make_sure_of_room(len(requests))
            assert self._loop is not None  # started, and not stopped
            self._runs.update({run.request.id: run for run in runs})
            self._loop.call_soon_threadsafe(self._begin, runs)

    def check(self, requests: Sequence[EngineRequest]) -> None:
        validate_requests(requests, self._info)
        for request in requests:
            require_exact(request)
        with self._lock:
            self._make_sure_of_room(len(requests))

    def cancel(self, ids: Sequence[RequestId]) -> None:
        with self._lock:
            runs = [run for each in ids if (run := self._runs.pop(each, None)) is not None]
            self._cancelled += len(runs)
            if runs and self._loop is not None:
                self._loop.call_soon_threadsafe(_cancel, runs)

    def stats(self) -> EngineTotals:
        """Return the counts of this engine. `running` and `waiting` include other clients'
        sequences, and `steps` is the server's."""
        with self._lock:
            begun = sum(run.tokens > 0 for run in self._runs.values())
            waiting = len(self._runs) - begun
        load = self._load
        return EngineTotals(
            running=max(begun, load.running),
            waiting=max(0, waiting - max(0, load.running - begun)) + self._others_waiting,
            steps=load.steps,
            computed_prompt_tokens=self._computed,
            cached_prompt_tokens=self._cached,
            generated_tokens=self._generated,
            finished=self._finished,
            cancelled=self._cancelled,
            busy_seconds=self._busy,
            received_prompt_tokens=self._received,
            decode_steps=self._decoded.steps,
            decode_tokens=self._decoded.tokens,
            decode_context_tokens=self._decoded.context_tokens,
            decode_seconds=self._decoded.seconds,
        )

    def pool_totals(self) -> PoolTotals:
        """Return the use of the server's KV memory in blocks. vLLM does not tell how many blocks
        are cached and unused; they count as free."""
        total = self._info.pool_tokens // self._info.block_tokens
        active = round(self._load.kv_used * total)
        return PoolTotals(hbm=MediumTotals(total=total, active=active, free=total - active))

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._loop is not None and self._end is not None:
                self._loop.call_soon_threadsafe(self._end.set)
        if self._thread.ident is not None:
            self._thread.join()

    # --- refusals -------------------------------------------------------------------------

    def _make_sure_of_room(self, count: int) -> None:
        if self._stopped:
            raise EngineStopped("the vLLM server is not there any more")
        waiting = sum(not run.tokens for run in self._runs.values())
        if waiting + count > self._info.max_waiting:
            raise QueueFull(waiting, self._info.max_waiting)

    # --- the thread -----------------------------------------------------------------------

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        finally:
            self._ready.set()
            with self._lock:
                self._stopped, self._loop = True, None
                left, self._runs = list(self._runs.values()), {}
            self._sink([AnswerReader(run.request).cancelled() for run in left])

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        place = self._place
        timeout = aiohttp.ClientTimeout(total=None)  # an answer has no maximum duration
        async with aiohttp.ClientSession(
            connector=place.connector(), timeout=timeout, headers=place.headers
        ) as session:
            self._session = session
            self._ready.set()
            polling = asyncio.create_task(self._poll())
            ended = asyncio.create_task(self._end.wait())
            await asyncio.wait((polling, ended), return_when=asyncio.FIRST_COMPLETED)
            with self._lock:  # other threads do not call this loop after this
                self._stopped, self._loop = True, None
            tasks = [run.task for run in list(self._runs.values()) if run.task is not None]
            for task in (polling, ended, *tasks):
                task.cancel()
            await asyncio.gather(polling, ended, *tasks, return_exceptions=True)

    async def _poll(self) -> None:
        """Ask the server for its load every POLL_SECONDS; return when the server is lost."""
        misses, last = 0, time.monotonic()
        while misses < MAX_MISSES:
            own = len(self._runs)
            try:
                async with asyncio.timeout(POLL_TIMEOUT_SECONDS):
                    load = read_load(await self._get("/metrics"))
            except (aiohttp.ClientError, OSError, TimeoutError, UnknownMetrics) as error:
                misses += 1
                log.warning("the vLLM server does not tell its load: %s", error or "in time")
            else:
                now = time.monotonic()
                if load.running and self._load.running:
                    self._busy += now - last
                    self._decoded.add(self._load, load, now - last, self._info.pool_tokens)
                misses, last, self._load = 0, now, load
                # Own sequences that waited then are counted as of now, in `stats`: many have ended
                # or begun by the next poll.
                self._others_waiting = max(0, load.waiting - max(own, len(self._runs)))
            await asyncio.sleep(POLL_SECONDS)
        log.error("the vLLM server is lost: it has not answered %d times", misses)

    async def _get(self, path: str) -> str:
        async with self._session.get(self._place.url + path) as response:
            response.raise_for_status()
            return await response.text()

    def _begin(self, runs: Sequence[_Run]) -> None:
        for run in runs:
            if self._runs.get(run.request.id) is run:  # not cancelled by now
                run.task = asyncio.create_task(self._run(run))

    async def _run(self, run: _Run) -> None:
        """Run one sequence to its last output. A cancelled one gives no more outputs."""
        reader = AnswerReader(run.request)
        try:
            leader = self._runs.get(run.request.follows) if run.request.follows else None
            if leader is not None:  # wait until its prompt is cached
                await leader.begun.wait()
            await self._read(run, reader)
        except (MalformedAnswer, aiohttp.ClientError, OSError) as error:
            await self._failed(run, reader, f"the vLLM server: {error}")
        finally:
            run.begun.set()

    async def _read(self, run: _Run, reader: AnswerReader) -> None:
        headers = {"content-type": "application/json", **headers_of(run.request.span)}
        url = self._place.url + COMPLETIONS_PATH
        async with self._session.post(url, data=run.body, headers=headers) as response:
            if response.status != HTTPStatus.OK:
                said = (await response.content.read(MAX_ERROR_BYTES)).decode(errors="replace")
                raise MalformedAnswer(f"status {response.status}: {said}")
            async for data in response.content.iter_any():
                outputs = reader.feed(data)
                failure = None
                if outputs and outputs[-1].finish_reason is FinishReason.ERROR:
                    failure = outputs.pop()
                if outputs:
                    self._give(outputs, run)
                if failure is not None:
                    await self._failed(run, reader, failure.error or "it does not say why")
                if reader.ended:
                    return
        raise MalformedAnswer("it broke off its answer")

    async def _failed(self, run: _Run, reader: AnswerReader, why: str) -> None:
        """Give the sequence's last output: an error, or, if the server is lost, a cancellation,
        after which another instance may continue the sequence; the engine then ends."""
        if await self._is_healthy():
            self._give([reader.failed(why)], run)
            return
        log.error("the vLLM server is lost: %s", why)
        self._give([reader.cancelled()], run)
        assert self._end is not None  # on the loop
        self._end.set()

    async def _is_healthy(self) -> bool:
        try:
            async with asyncio.timeout(POLL_TIMEOUT_SECONDS):
                await self._get("/health")
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False
        return True

    def _give(self, outputs: Sequence[TokenOutput], run: _Run) -> None:
        with self._lock:
            if self._runs.get(run.request.id) is not run:  # cancelled: gives no more outputs
                return
            for output in outputs:
                run.tokens += len(output.token_ids)
                self._generated += len(output.token_ids)
                if output.finish_reason is not None:
                    del self._runs[run.request.id]
                    self._finished += output.finish_reason is not FinishReason.ERROR
                    cached = output.usage.cached_tokens or 0
                    received = min(cached, run.request.received_tokens)
                    self._received += received
                    self._cached += cached - received
                    self._computed += output.usage.prompt_tokens - cached
        run.begun.set()
        self._sink(outputs)


@dataclass(slots=True)
class Decoded:
    """Steps of the server between polls that saw no prompt computed.

    vLLM counts a prompt when all of it is computed, and a step only if it has outputs. So every
    sequence must also have got a token from each step: one in its prefill has not.
    """

    steps: int = 0
    tokens: int = 0
    context_tokens: int = 0
    seconds: float = 0.0  # of one engine

    def add(self, last: ServerLoad, now: ServerLoad, seconds: float, pool_tokens: int) -> None:
        """Count the steps between two polls, `seconds` apart, during which sequences ran.
        `pool_tokens`: that KV memory holds."""
        steps = now.steps - last.steps
        tokens = now.generated_tokens - last.generated_tokens
        running = max(last.running, now.running) / now.engines
        if now.prompt_tokens is None or now.prompt_tokens != last.prompt_tokens:
            return
        if steps <= 0 or tokens < _EVERY_SEQUENCE * steps * running:
            return
        self.steps += steps
        self.tokens += tokens
        self.context_tokens += round(steps * now.kv_used * pool_tokens)
        self.seconds += seconds * now.engines


def _cancel(runs: Sequence[_Run]) -> None:
    for run in runs:
        if run.task is not None:
            run.task.cancel()
        run.begun.set()
