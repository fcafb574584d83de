"""An instance: an engine, its pool, and the calls that run on them, on one event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec
import numpy as np

import memserve
from memserve.api.control import conflict
from memserve.api.errors import ApiError, internal, invalid, queue_full, unavailable
from memserve.api.forward import Forward
from memserve.api.generate import GenerateCall, SamplingParams
from memserve.api.handoff import (
    MeetCall,
    MeetResult,
    PoolPeer,
    PrefillCall,
    PrefillResult,
    PushCall,
    PushResult,
)
from memserve.api.kv_events import KVEventsInfo
from memserve.api.namespaces import private
from memserve.api.peer_client import PeerClient
from memserve.api.status import (
    EngineTotals,
    FetchTotals,
    HandoffTotals,
    InstanceInfo,
    InstanceState,
    InstanceStats,
    Latencies,
    Limits,
    MemberKind,
    PoolTotals,
)
from memserve.clock import Clock
from memserve.engine.request import EngineProtocol, EngineRequest
from memserve.errors import EngineStopped, MemserveError, QueueFull, TransferError
from memserve.instance import request_trace
from memserve.instance.dispatcher import Dispatcher, Mailbox
from memserve.instance.fetch import Fetcher
from memserve.instance.generation import Generation, engine_requests, shared_namespace
from memserve.instance.grammars import Constraints, Grammars
from memserve.instance.lifecycle import InstanceLifecycle
from memserve.instance.link import KVLink
from memserve.instance.prefill import Prefiller
from memserve.instance.remote_prefill import RemotePrefill
from memserve.instance.submission import Submission
from memserve.instance.throughput import FinishRate
from memserve.instance.timelines import Timelines
from memserve.models.tokenizer import Tokenizer
from memserve.scheduler.profiles import Profile
from memserve.tracing.span import Span, SpanKind, headers_of, timed
from memserve.types import Epoch, InstanceId, RequestId, Role
from memserve.vital import Vitals
from memserve.vllm.forwarder import ForwardedAnswer, Forwarder

log = logging.getLogger(__name__)

# Limit of the self-test at start: kernels may be compiled and weights read from disk.
FIRST_TOKEN_SECONDS = 300.0
# If the engine has produced nothing for IDLE_SECONDS, a health check asks it for a token. The
# limit for that token, HEALTH_SECONDS, is below the usual timeout of a health probe, 10 s.
IDLE_SECONDS = 10.0
HEALTH_SECONDS = 8.0


class SelfTestFailed(MemserveError):
    """The engine could not produce a token."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Name, epoch, model and kind of an instance."""

    id: InstanceId
    epoch: Epoch
    role: Role  # at start; `InstanceLifecycle.role` is the current one
    model: str
    kind: MemberKind = MemberKind.MEMSERVE


class Events(Protocol):
    """Publisher of an instance's KV events, which tell gateways what prefixes it holds."""

    @property
    def info(self) -> KVEventsInfo: ...

    def snapshot(self) -> bytes:
        """Return an encoded `KVSnapshot`. Raises TransferError if there is none."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of an instance. The instance owns them and calls `close` when it ends."""

    engine: EngineProtocol
    tokenizer: Tokenizer
    pool_totals: Callable[[], PoolTotals]
    close: Callable[[], None]  # after the engine has stopped
    # Roles in which the KV of a sequence stays in the index for other sequences.
    sharing: frozenset[Role] = frozenset(Role)
    link: KVLink | None = None  # to the pools of other instances
    profile: Profile | None = None  # the engine's cost model
    events: Events | None = None  # publisher of KV events
    # Threads that the instance cannot do without; called once the engine runs.
    threads: Callable[[], Sequence[threading.Thread]] = lambda: ()
    forwarder: Forwarder | None = None  # to a vLLM server, which takes requests unchanged
    grammars: Grammars | None = None  # None: the engine takes none


class Run:
    """One running call: reads the engine's outputs and makes the bytes of the answer."""

    def __init__(
        self,
        generation: Generation,
        mailbox: Mailbox,
        submission: Submission,
        clock: Clock,
        span: Span | None = None,
    ) -> None:
        self.generation = generation
        self.span = span
        self.produced: dict[RequestId, list[int]] = {}  # token ids by sequence
        self._mailbox = mailbox
        self._submission = submission
        self._clock = clock

    async def step(self) -> bytes:
        """Wait for outputs of the engine. Returns the bytes to stream, possibly none.

        Raises ApiError if the answer cannot be completed.
        """
        # Without unfinished sequences the mailbox stays empty.
        outputs = await self._mailbox.take() if self.generation.unfinished else []
        for output in outputs:
            self.produced.setdefault(output.id, []).extend(output.token_ids)
        data = self.generation.feed(outputs, self._clock.now())
        if self.generation.failure is not None:
            raise self.generation.failure
        if self.generation.stopped:
            self._submission.cancel(self.generation.stopped)
            self.generation.stopped = []
        return data


@dataclass(frozen=True, slots=True)
class _Served:
    """Parts and helpers that calls run on, from `start` on."""

    parts: Parts
    submission: Submission
    prefiller: Prefiller | None  # computes prompts for decode instances
    remote: RemotePrefill | None  # has prompts computed by prefill instances
    fetcher: Fetcher | None  # fetches prefixes from other instances


class Instance:
    """Runs calls on an engine, and reports state, health and statistics. One event loop's."""

    def __init__(self, identity: Identity, clock: Clock, peers: PeerClient | None = None) -> None:
        """`peers`: HTTP client for other instances; without it the instance uses no link."""
        self.identity = identity
        self._peers = peers
        self.lifecycle = InstanceLifecycle(identity.id, identity.role)
        self._clock = clock
        self._latencies = Latencies()
        self.timelines = Timelines()
        self._rate = FinishRate(clock)
        self._running = 0
        self.died = asyncio.Event()  # the engine or another vital task or thread has ended
        self.vitals = Vitals(self._lost)
        self._idle = asyncio.Event()
        self._idle.set()
        self._served: _Served | None = None
        self._dispatcher = Dispatcher(asyncio.get_running_loop(), clock, self.vitals.fail)
        self._probes = itertools.count()
        self._runs = itertools.count()
        self._steps_seen = 0  # the engine's step count at the last health check that read it
        self._linked: asyncio.Task[None] | None = None  # runs `KVLink.run`
        self._check: asyncio.Future[bool] | None = None  # self-check after the last failure

    async def start(self, parts: Parts) -> None:
        """Start the engine and ask it for one token. Raises SelfTestFailed if none comes."""
        self._served = self._serve(parts)
        parts.engine.start(self._dispatcher.sink)
        if not await self._probe(parts, FIRST_TOKEN_SECONDS):
            self._lost_engine()
            raise SelfTestFailed("the engine did not produce a first token")
        for thread in parts.threads():
            self.vitals.thread(thread)
        if parts.link is not None:
            self._linked = self.vitals.task("link to the pool", parts.link.run())
        if self.state is InstanceState.STARTING:
            self.lifecycle.become(InstanceState.READY)

    @property
    def state(self) -> InstanceState:
        return self.lifecycle.state

    def change_role(self, role: Role) -> None:
        """Change the role. Raises ApiError (409) while starting, when dead, and if the instance is
        a vLLM one without a link, whose role is `colocated`."""
        alone = self._served is not None and self._served.fetcher is None
        server = self.identity.kind is not MemberKind.MEMSERVE
        if server and alone and role is not Role.COLOCATED:
            raise conflict(
                f"Instance {self.identity.id} has no link to others and hands no KV over; its "
                "role is 'colocated'.",
                "role_not_possible",
            )
        self.lifecycle.change_role(role)

    def _serve(self, parts: Parts) -> _Served:
        submission = Submission(parts.engine, self._rate, self._lost_engine)
        if parts.link is None or self._peers is None:
            return _Served(parts, submission, None, None, None)
        fetcher = Fetcher(self._peers, parts.link, parts.engine.stats, self._clock)
        longest = parts.engine.info.max_tokens
        return _Served(
            parts,
            submission,
            Prefiller(
                parts.link, self._dispatcher, submission, fetcher, self._clock, parts.grammars
            ),
            RemotePrefill(self._peers, parts.link, submission, fetcher, self._clock, longest),
            fetcher,
        )

    async def idle(self) -> None:
        """Wait until no call is running."""
        await self._idle.wait()

    async def stop(self) -> None:
        """Stop the engine, which takes up to one step; running calls end with an error."""
        self.vitals.close()
        if self._linked is not None:
            self._linked.cancel()
        if self._served is not None:
            await asyncio.to_thread(self._served.parts.engine.stop)

    async def close(self) -> None:
        """Close link, forwarder and pool. Call `stop` before."""
        if self._served is None:
            return
        if self._served.remote is not None:
            await self._served.remote.close()
        if self._served.parts.link is not None:
            self._served.parts.link.close()
        if self._served.parts.forwarder is not None:
            await self._served.parts.forwarder.close()
        await asyncio.to_thread(self._served.parts.close)

    async def constraints(self, call: GenerateCall) -> Constraints | None:
        """Return the compiled grammar of a call, None if it has none. Raises ApiError."""
        grammar = call.sampling.grammar
        if grammar is None:
            return None
        grammars = self._ready().parts.grammars
        if grammars is None:
            raise invalid(
                f"Instance {self.identity.id} has an engine that takes no grammar.", grammar.param
            )
        return await grammars.constraints(grammar, call.resumed)

    @contextmanager
    def run(
        self,
        call: GenerateCall,
        constraints: Constraints | None = None,
        span: Span | None = None,
    ) -> Iterator[Run]:
        """Context of a running call. Leaving it early cancels the call's sequences.
        `constraints`: what `constraints` has returned for it. `span`: the call's, if it is traced.

        Raises ApiError if the instance refuses the call.
        """
        served = self._ready()
        parts, link = served.parts, served.parts.link
        number = next(self._runs)
        generation = Generation(
            call,
            parts.tokenizer,
            parts.engine.info,
            self._latencies,
            self._clock.now(),
            number,
            0 if link is None else link.block_bytes,
            () if constraints is None else constraints.ended,
        )
        grammar = None if constraints is None else constraints.grammar
        shared = self.lifecycle.role in parts.sharing
        requests = engine_requests(call, number, shared, generation.over, grammar)
        if span is not None:
            requests = tuple([replace(request, span=span) for request in requests])
        with self._dispatcher.mailbox([request.id for request in requests]) as mailbox:
            handover: asyncio.Future[None] | None = None
            if served.remote is not None and (call.prefill or call.fetch is not None):
                served.submission.check(requests)
                start = served.remote.run(call, requests, generation.stats, mailbox)
                handover = asyncio.ensure_future(start)
                handover.add_done_callback(lambda done: _tell_failure(done, mailbox))
            elif requests:
                served.submission.submit(requests)
            run = Run(generation, mailbox, served.submission, self._clock, span)
            with self._counted():
                try:
                    yield run
                finally:
                    if handover is not None:
                        handover.cancel()
                    self._end(served, requests, run)

    def _end(self, served: _Served, requests: Sequence[EngineRequest], run: Run) -> None:
        unfinished = set(run.generation.unfinished)
        if unfinished:
            served.submission.cancel(list(unfinished))
            self._latencies.ended.abort += len(unfinished)
        log.info("%s", run.generation)
        self.timelines.add(run.generation)
        if run.span is not None and run.span.recording:
            request_trace.ended(run.span, run.generation)
        self._rate.record(len(requests) - len(unfinished))
        if run.generation.failure is not None:
            check = self._probe(served.parts, HEALTH_SECONDS)
            self._check = self.vitals.errand("self-check", check)
        if served.remote is not None:
            busy = served.parts.engine.stats().waiting > 0
            for request in requests:
                produced = run.produced.get(request.id, ())
                served.remote.ended(request, produced, request.id not in unfinished, busy)

    @asynccontextmanager
    async def forward(
        self, call: GenerateCall, forward: Forward, span: Span | None = None
    ) -> AsyncIterator[ForwardedAnswer]:
        """Context of a call that goes to the vLLM server behind this instance. Leaving it early
        hangs up. `span`: the call's, if it is traced. Raises ApiError if the instance refuses the
        call."""
        served = self._ready()
        parts, remote = served.parts, served.remote
        if parts.forwarder is None:
            raise invalid(
                f"Instance {self.identity.id} has a built-in engine, which takes token ids only.",
                "forward",
                "no_forwarding",
            )
        shared = self.lifecycle.role in parts.sharing
        namespace = shared_namespace(call) if shared else private(call.id)
        with self._counted():
            if remote is not None and (call.prefill or call.fetch is not None):
                await remote.bring(call, namespace, span)
            try:
                with timed(span, "vllm", SpanKind.CLIENT) as asking:
                    answering = parts.forwarder.answer(call, forward, namespace, headers_of(asking))
                    async with answering as answer:
                        if asking is not None:
                            asking.attributes["http.response.status_code"] = answer.status
                        log.info("%s %s: %d", call.id, forward.path, answer.status)
                        yield answer
            except QueueFull as error:
                raise queue_full(str(error), self._rate.retry_after(error.waiting)) from error
            finally:
                if parts.link is not None and not shared:
                    parts.link.forget(namespace)
        self._rate.record(call.n)

    async def prefill(self, call: PrefillCall, span: Span | None = None) -> PrefillResult:
        """Compute a prompt for a decode instance and send its KV there. `span`: the call's, if it
        is traced. Raises ApiError."""
        served = self._ready()
        if served.prefiller is None:
            raise self._no_link()
        with self._counted():
            result = await served.prefiller.run(call, span)
        log.info(
            "%s: prefill for %s, %d of %d tokens cached, %d blocks fetched, %d sent, %d were there",
            call.id,
            call.target.id,
            result.cached_tokens,
            len(call.prompt),
            result.blocks_fetched,
            result.blocks_sent,
            result.blocks_already_present,
        )
        return result

    async def push(self, call: PushCall) -> PushResult:
        """Send KV from this instance's index to another instance. Raises ApiError."""
        served = self._served
        if served is None or self.state not in (InstanceState.READY, InstanceState.DRAINING):
            raise self._unavailable()
        if served.fetcher is None:
            raise self._no_link()
        with self._counted():
            return await served.fetcher.push(call)

    async def meet(self, call: MeetCall) -> MeetResult:
        """Test the KV transport to another instance. Raises ApiError if KV cannot go there."""
        served = self._served
        if served is None or self.state not in (InstanceState.READY, InstanceState.DRAINING):
            raise self._unavailable()
        if served.fetcher is None:
            raise self._no_link()
        return await served.fetcher.meet(call)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def healthy(self) -> bool:
        """Whether the engine produces tokens now. An idle engine is asked for one token."""
        if self.state is not InstanceState.READY or self._served is None:
            return False
        if self._clock.now() - self._dispatcher.last_output < IDLE_SECONDS:
            return True
        parts = self._served.parts
        stats = parts.engine.stats()
        progress = stats.running and stats.steps != self._steps_seen
        self._steps_seen = stats.steps
        if progress:  # a long prompt takes steps without producing anything
            return True
        return await self._probe(parts, HEALTH_SECONDS)

    def info(self) -> InstanceInfo:
        identity = self.identity
        return InstanceInfo(
            id=identity.id,
            epoch=identity.epoch,
            role=self.lifecycle.role,
            state=self.state,
            pid=os.getpid(),
            model=identity.model,
            limits=(
                None
                if self._served is None
                else msgspec.convert(self._served.parts.engine.info, Limits, from_attributes=True)
            ),
            kind=identity.kind,
            pool=self._served is not None and self._served.fetcher is not None,
            kv=self._kv(),
            pool_peer=self._pool_peer(),
            version=memserve.__version__,
            kv_events=None if (events := self._events()) is None else events.info,
        )

    def _kv(self) -> str | None:
        link = None if self._served is None else self._served.parts.link
        return None if link is None else link.kv

    def _pool_peer(self) -> PoolPeer | None:
        served = self._served
        return None if served is None or served.parts.link is None else served.parts.link.address

    async def kv_snapshot(self) -> bytes:
        """Return an encoded `KVSnapshot`. Raises ApiError if none can be had."""
        events = self._events()
        if events is None:
            raise unavailable(f"Instance {self.identity.id} publishes no KV events.", "no_events")
        try:
            return await asyncio.to_thread(events.snapshot)
        except TransferError as error:
            raise unavailable(str(error), "no_events") from error

    def _events(self) -> Events | None:
        return None if self._served is None else self._served.parts.events

    def profile(self) -> Profile | None:
        """The engine's cost model. None before `start`, and if the instance has no cost model."""
        return None if self._served is None else self._served.parts.profile

    def stats(self) -> InstanceStats | None:
        """Totals since start. None before `start`."""
        if self._served is None:
            return None
        parts, remote, fetcher = self._served.parts, self._served.remote, self._served.fetcher
        return InstanceStats(
            engine=msgspec.convert(parts.engine.stats(), EngineTotals, from_attributes=True),
            pool=parts.pool_totals(),
            latencies=self._latencies,
            handoff=HandoffTotals() if remote is None else remote.totals(),
            fetch=FetchTotals() if fetcher is None else fetcher.totals(),
            moves={} if fetcher is None else fetcher.moves.totals(),
        )

    def _ready(self) -> _Served:
        if self.state is InstanceState.READY and self._served is not None:
            return self._served
        raise self._unavailable()

    def _no_link(self) -> ApiError:
        return unavailable(f"Instance {self.identity.id} has no link to others.", "no_link")

    def _unavailable(self) -> ApiError:
        return unavailable(
            f"Instance {self.identity.id} is {self.state}.",
            f"instance_{self.state}",
            close=self.state is InstanceState.DRAINING,
        )

    def _lost_engine(self) -> None:
        self.vitals.fail("engine", None)
        self._lost()

    def _lost(self) -> None:
        if not self.lifecycle.ending.is_set():
            self.lifecycle.become(InstanceState.DEAD)
            self.died.set()

    async def _probe(self, parts: Parts, seconds: float) -> bool:
        """Ask the engine for one token. False if none comes within `seconds`."""
        probe = EngineRequest(
            id=RequestId(f"self-test-{next(self._probes)}"),
            prompt=np.array([parts.tokenizer.bos_token_id or 0], dtype=np.int32),
            sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        )
        with self._dispatcher.mailbox([probe.id]) as mailbox:
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
                return True  # a full queue is no sign of a broken engine


def _tell_failure(handover: asyncio.Future[None], mailbox: Mailbox) -> None:
    """Fail the mailbox after an unexpected error of a hand-over: its call waits for tokens."""
    if not handover.cancelled() and (failure := handover.exception()) is not None:
        log.error("a hand-over failed", exc_info=failure)
        mailbox.fail(internal(f"The hand-over failed: {failure!r}", "handoff_error"))
