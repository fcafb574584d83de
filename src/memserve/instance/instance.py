"""An instance: an engine, its pool, and the calls that run on them. Belongs to one event loop."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np

from memserve.api.errors import invalid, queue_full, unavailable
from memserve.api.generate import GenerateCall, SamplingParams
from memserve.api.status import (
    EngineTotals,
    InstanceInfo,
    InstanceState,
    InstanceStats,
    Latencies,
    Limits,
    PoolTotals,
)
from memserve.clock import Clock
from memserve.engine.request import EngineProtocol, EngineRequest
from memserve.errors import EngineStopped, MemserveError, QueueFull, RequestError
from memserve.instance.dispatcher import Dispatcher, Mailbox
from memserve.instance.generation import Generation, engine_requests
from memserve.instance.throughput import FinishRate
from memserve.models.tokenizer import Tokenizer
from memserve.types import Epoch, InstanceId, RequestId, Role

# The first token may wait for kernels to be compiled and weights to be read from disk.
FIRST_TOKEN_SECONDS = 300.0
# An instance that has produced nothing for this long is asked for a token before it is called
# healthy; that token has less time than such a check's usual limit of 10 s.
IDLE_SECONDS = 10.0
HEALTH_SECONDS = 8.0


class SelfTestFailed(MemserveError):
    """The engine could not produce a token."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who an instance is, and which of its lives this is."""

    id: InstanceId
    epoch: Epoch
    role: Role
    model: str


@dataclass(frozen=True, slots=True)
class Parts:
    """What an instance is made of. It owns them: `close` is called when it ends."""

    engine: EngineProtocol
    tokenizer: Tokenizer
    pool_totals: Callable[[], PoolTotals]
    close: Callable[[], None]  # after the engine has stopped
    shared: bool = True  # KV outlives its sequence and serves others


class Run:
    """One call while it runs."""

    def __init__(
        self, generation: Generation, mailbox: Mailbox, engine: EngineProtocol, clock: Clock
    ) -> None:
        self.generation = generation
        self._mailbox = mailbox
        self._engine = engine
        self._clock = clock

    async def step(self) -> bytes:
        """Wait for the engine; the bytes to stream, if any.

        Raises ApiError where the answer cannot be completed.
        """
        outputs = await self._mailbox.take()
        data = self.generation.feed(outputs, self._clock.now())
        if self.generation.failure is not None:
            raise self.generation.failure
        if self.generation.stopped:
            self._engine.cancel(self.generation.stopped)
            self.generation.stopped = []
        return data


class Instance:
    """Runs calls on an engine and knows what state it is in."""

    def __init__(self, identity: Identity, clock: Clock) -> None:
        self.identity = identity
        self.state = InstanceState.STARTING
        self._clock = clock
        self._latencies = Latencies()
        self._rate = FinishRate(clock)
        self._running = 0
        self.died = asyncio.Event()  # the engine stopped by itself
        self._idle = asyncio.Event()
        self._idle.set()
        self._parts: Parts | None = None
        self._dispatcher = Dispatcher(asyncio.get_running_loop(), clock)
        self._probes = itertools.count()
        self._steps_seen = 0  # by the last health check that looked
        self._check: asyncio.Future[bool] | None = None  # the last one after a failure

    async def start(self, parts: Parts) -> None:
        """Start the engine and ask it for a token. Raises SelfTestFailed."""
        self._parts = parts
        parts.engine.start(self._dispatcher.sink)
        if not await self._probe(parts, FIRST_TOKEN_SECONDS):
            self._lost_engine()
            raise SelfTestFailed("the engine did not produce a first token")
        if self.state is InstanceState.STARTING:
            self.state = InstanceState.READY

    def drain(self) -> None:
        """Take no new calls. What runs goes on."""
        if self.state is not InstanceState.DEAD:
            self.state = InstanceState.DRAINING

    async def idle(self) -> None:
        """Returns when no call is running."""
        await self._idle.wait()

    def stop(self) -> None:
        """Stop the engine; calls that still run end with an error. Blocks for a step."""
        if self._parts is not None:
            self._parts.engine.stop()

    def close(self) -> None:
        """Give back what the instance holds, after `stop`."""
        if self._parts is not None:
            self._parts.close()

    @contextmanager
    def run(self, call: GenerateCall) -> Iterator[Run]:
        """Run a call; leaving the block early cancels its sequences.

        Raises ApiError where the instance does not take it.
        """
        parts = self._ready_parts()
        requests = engine_requests(call, parts.shared)
        ids = [request.id for request in requests]
        generation = Generation(call, requests, parts.tokenizer, self._latencies, self._clock.now())
        mailbox = self._dispatcher.open(ids)
        try:
            self._submit(parts.engine, requests)
            self._running += 1
            self._idle.clear()
            try:
                yield Run(generation, mailbox, parts.engine, self._clock)
            finally:
                if unfinished := generation.unfinished:
                    parts.engine.cancel(unfinished)
                self._rate.record(len(ids) - len(unfinished))
                if generation.failure is not None:
                    self._check = asyncio.ensure_future(self._probe(parts, HEALTH_SECONDS))
                self._running -= 1
                if not self._running:
                    self._idle.set()
        finally:
            self._dispatcher.close(ids)

    async def healthy(self) -> bool:
        """Whether a token can be produced now. An instance at rest is asked for one."""
        if self.state is not InstanceState.READY or self._parts is None:
            return False
        if self._clock.now() - self._dispatcher.last_output < IDLE_SECONDS:
            return True
        stats = self._parts.engine.stats()
        progress = stats.running and stats.steps != self._steps_seen
        self._steps_seen = stats.steps
        if progress:  # a long prompt takes steps without producing anything
            return True
        return await self._probe(self._parts, HEALTH_SECONDS)

    def info(self) -> InstanceInfo:
        identity = self.identity
        return InstanceInfo(
            id=identity.id,
            epoch=identity.epoch,
            role=identity.role,
            state=self.state,
            pid=os.getpid(),
            model=identity.model,
            limits=(
                None
                if self._parts is None
                else msgspec.convert(self._parts.engine.info, Limits, from_attributes=True)
            ),
        )

    def stats(self) -> InstanceStats | None:
        """None until the engine is there."""
        if self._parts is None:
            return None
        return InstanceStats(
            engine=msgspec.convert(self._parts.engine.stats(), EngineTotals, from_attributes=True),
            pool=self._parts.pool_totals(),
            latencies=self._latencies,
        )

    def _ready_parts(self) -> Parts:
        if self.state is InstanceState.READY and self._parts is not None:
            return self._parts
        raise unavailable(
            f"Instance {self.identity.id} is {self.state}.",
            f"instance_{self.state}",
            close=self.state is InstanceState.DRAINING,
        )

    def _submit(self, engine: EngineProtocol, requests: tuple[EngineRequest, ...]) -> None:
        try:
            engine.submit(requests)
        except RequestError as error:
            raise invalid(str(error), error.param) from error
        except QueueFull as error:
            if len(requests) > error.limit:
                raise invalid(
                    f"{len(requests)} sequences in one request, and at most {error.limit} may wait",
                    "n",
                ) from error
            raise queue_full(str(error), self._rate.retry_after(error.waiting)) from error
        except EngineStopped as error:
            self._lost_engine()
            raise unavailable(
                f"Instance {self.identity.id} has lost its engine.", "instance_dead"
            ) from error

    def _lost_engine(self) -> None:
        if self.state is not InstanceState.DRAINING:
            self.state = InstanceState.DEAD
            self.died.set()

    async def _probe(self, parts: Parts, seconds: float) -> bool:
        """Ask the engine for one token."""
        probe = EngineRequest(
            id=RequestId(f"self-test-{next(self._probes)}"),
            prompt=np.array([parts.tokenizer.bos_token_id or 0], dtype=np.int32),
            sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        )
        mailbox = self._dispatcher.open([probe.id])
        try:
            parts.engine.submit([probe])
            async with asyncio.timeout(seconds):
                (output,) = await mailbox.take()
            return bool(output.token_ids)
        except TimeoutError:
            parts.engine.cancel([probe.id])
            return False
        except EngineStopped:
            self._lost_engine()
            return False
        except QueueFull:
            return True  # there is work enough to show for
        finally:
            self._dispatcher.close([probe.id])
