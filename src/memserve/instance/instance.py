"""An instance: an engine, its pool, and the calls that run on them, on one event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import msgspec

import memserve
from memserve.api.control import conflict
from memserve.api.errors import ApiError, internal, invalid, queue_full, unavailable
from memserve.api.forward import Forward
from memserve.api.generate import GenerateCall
from memserve.api.handoff import (
    MeetCall,
    MeetResult,
    PrefillCall,
    PrefillResult,
    PushCall,
    PushResult,
)
from memserve.api.namespaces import private
from memserve.api.peer_client import PeerClient
from memserve.api.status import (
    FetchTotals,
    HandoffTotals,
    InstanceInfo,
    InstanceState,
    InstanceStats,
    Latencies,
    Limits,
    MemberKind,
)
from memserve.clock import Clock
from memserve.engine.request import EngineRequest
from memserve.errors import QueueFull, TransferError
from memserve.instance import request_trace
from memserve.instance.dispatcher import Dispatcher, Mailbox, Run
from memserve.instance.fetch import Fetcher
from memserve.instance.forwarded_run import ForwardedRun
from memserve.instance.generation import Generation, engine_requests, shared_namespace
from memserve.instance.grammars import Constraints
from memserve.instance.health import EngineHealth
from memserve.instance.lifecycle import InstanceLifecycle
from memserve.instance.parts import Identity, Parts
from memserve.instance.prefill import Prefiller
from memserve.instance.remote_prefill import RemotePrefill
from memserve.instance.submission import FinishRate, Submission
from memserve.instance.timelines import Timelines, forwarded_timeline, timeline_of
from memserve.scheduler.profiles import Profile
from memserve.tracing.span import Span
from memserve.types import Role
from memserve.vital import Vitals

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Served:
    """Parts of a started instance, and the helpers made from them."""

    parts: Parts
    submission: Submission
    health: EngineHealth
    prefiller: Prefiller | None  # computes prompts for decode instances
    remote: RemotePrefill | None  # has prompts computed by prefill instances
    fetcher: Fetcher | None  # fetches prefixes from other instances


class Instance:
    """Runs calls on an engine, and reports state, health and statistics. Used on one event loop."""

    def __init__(self, identity: Identity, clock: Clock, peers: PeerClient | None = None) -> None:
        """`peers`: HTTP client for other instances; without it the instance uses no link."""
        self.identity = identity
        self._peers = peers
        self.lifecycle = InstanceLifecycle(identity.id, identity.role)
        self._clock = clock
        self._latencies = Latencies()
        self.timelines = Timelines()
        self._rate = FinishRate(clock)
        self.died = asyncio.Event()  # the engine or another vital task or thread has ended
        self.vitals = Vitals(self._lost)
        self._served: _Served | None = None
        self._dispatcher = Dispatcher(asyncio.get_running_loop(), clock, self.vitals.fail)
        self._runs = itertools.count()
        self._linked: asyncio.Task[None] | None = None  # runs `KVLink.run`
        self._check: asyncio.Future[bool] | None = None  # self-check after the last failure

    async def start(self, parts: Parts) -> None:
        """Start the engine and ask it for one token. Raises SelfTestFailed if none comes."""
        served = self._served = self._serve(parts)
        await asyncio.to_thread(parts.engine.start, self._dispatcher.sink)
        await served.health.first_token()
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
        """Change the role. Raises ApiError (409) while starting, when dead, and for a vLLM instance
        without a link, whose role is always `colocated`."""
        alone = self._served is not None and self._served.fetcher is None
        server = self.identity.kind is not MemberKind.MEMSERVE
        if server and alone and role is not Role.COLOCATED:
            raise conflict(
                f"Instance {self.identity.id} has no link to other instances and hands no KV over; "
                "its role is 'colocated'.",
                "role_not_possible",
            )
        self.lifecycle.change_role(role)

    def _serve(self, parts: Parts) -> _Served:
        submission = Submission(parts.engine, self._rate, self._lost_engine)
        bos = parts.tokenizer.bos_token_id or 0
        health = EngineHealth(parts.engine, bos, self._dispatcher, self._clock, self._lost_engine)
        if parts.link is None or self._peers is None:
            return _Served(parts, submission, health, None, None, None)
        fetcher = Fetcher(self._peers, parts.link, parts.engine.stats, self._clock)
        return _Served(
            parts,
            submission,
            health,
            Prefiller(
                parts.link, self._dispatcher, submission, fetcher, self._clock, parts.grammars
            ),
            RemotePrefill(self._peers, parts.link, submission, fetcher, self._clock),
            fetcher,
        )

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
                f"The engine of instance {self.identity.id} does not support grammars.",
                grammar.param,
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
        `constraints`: result of the method for this call. `span`: the call's, if it is traced.

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
        requests = engine_requests(call, number, shared, generation.over, grammar, span)
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
            with self.lifecycle.counted():
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
        self.timelines.add(timeline_of(run.generation))
        if run.span is not None and run.span.recording:
            request_trace.ended(run.span, run.generation)
        self._rate.record(len(requests) - len(unfinished))
        if run.generation.failure is not None:
            self._check = self.vitals.errand("self-check", served.health.self_check())
        if served.remote is not None:
            busy = served.parts.engine.stats().waiting > 0
            for request in requests:
                produced = run.produced.get(request.id, ())
                served.remote.ended(request, produced, request.id not in unfinished, busy)

    @asynccontextmanager
    async def forward(
        self, call: GenerateCall, forward: Forward, span: Span | None = None
    ) -> AsyncIterator[ForwardedRun]:
        """Context of a call that goes to the vLLM server behind this instance, which has begun to
        answer. Leaving it early hangs up. `span`: the call's, if it is traced. Raises ApiError if
        the instance refuses the call."""
        served = self._ready()
        parts, remote = served.parts, served.remote
        if parts.forwarder is None:
            raise invalid(
                f"Instance {self.identity.id} has a built-in engine, which accepts token ids only.",
                "forward",
                "no_forwarding",
            )
        shared = self.lifecycle.role in parts.sharing
        namespace = shared_namespace(call) if shared else private(call.id)
        run = ForwardedRun(call, forward, self._clock, span)
        try:
            with self.lifecycle.counted(), run:
                if remote is not None and (call.prefill or call.fetch is not None):
                    run.brought = await remote.bring(call, namespace, span)
                try:
                    answering = parts.forwarder.answer(call, forward, namespace, run.sending)
                    async with answering as answer:
                        run.answered(answer)
                        log.info("%s %s: %d", call.id, forward.path, answer.status)
                        yield run
                except QueueFull as error:
                    raise queue_full(str(error), self._rate.retry_after(error.waiting)) from error
                finally:
                    if parts.link is not None and not shared:
                        parts.link.forget(namespace)
        finally:
            # Refused calls get no time line: many of them would displace other calls' time lines.
            if run.sent is not None or run.brought is not None:
                self.timelines.add(forwarded_timeline(run))
            request_trace.forwarded(run)
        self._rate.record(call.n)

    async def prefill(self, call: PrefillCall, span: Span | None = None) -> PrefillResult:
        """Compute a prompt for a decode instance and send its KV there. `span`: the call's, if it
        is traced. Raises ApiError."""
        served = self._ready()
        if served.prefiller is None:
            raise self._no_link()
        with self.lifecycle.counted():
            result = await served.prefiller.run(call, span)
        log.info(
            "%s: prefill for %s, %d of %d tokens cached; blocks: %d fetched, %d sent, %d present",
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
        fetcher = self._fetcher()
        with self.lifecycle.counted():
            return await fetcher.push(call)

    async def meet(self, call: MeetCall) -> MeetResult:
        """Test the KV transport to another instance. Raises ApiError if KV cannot go there."""
        return await self._fetcher().meet(call)

    def _fetcher(self) -> Fetcher:
        """Return the fetcher, also while draining. Raises ApiError without a link."""
        served = self._served
        if served is None or self.state not in (InstanceState.READY, InstanceState.DRAINING):
            raise self._unavailable()
        if served.fetcher is None:
            raise self._no_link()
        return served.fetcher

    async def healthy(self) -> bool:
        """Return whether the engine produces tokens now. An idle engine is asked for one token."""
        if self.state is not InstanceState.READY or self._served is None:
            return False
        return await self._served.health.check()

    def info(self) -> InstanceInfo:
        identity, served = self.identity, self._served
        parts = None if served is None else served.parts
        link = None if parts is None else parts.link
        return InstanceInfo(
            id=identity.id,
            epoch=identity.epoch,
            role=self.lifecycle.role,
            state=self.state,
            pid=os.getpid(),
            model=identity.model,
            limits=(
                None
                if parts is None
                else msgspec.convert(parts.engine.info, Limits, from_attributes=True)
            ),
            kind=identity.kind,
            pool=served is not None and served.fetcher is not None,
            kv=None if link is None else link.kv,
            pool_peer=None if link is None else link.address,
            version=memserve.__version__,
            kv_events=None if parts is None or parts.events is None else parts.events.info,
        )

    async def kv_snapshot(self) -> bytes:
        """Return an encoded `KVSnapshot`. Raises ApiError if none can be had."""
        events = None if self._served is None else self._served.parts.events
        if events is None:
            raise unavailable(f"Instance {self.identity.id} publishes no KV events.", "no_events")
        try:
            return await asyncio.to_thread(events.snapshot)
        except TransferError as error:
            raise unavailable(str(error), "no_events") from error

    def profile(self) -> Profile | None:
        """The engine's cost model. None before `start`, and if the instance has no cost model."""
        return None if self._served is None else self._served.parts.profile

    def stats(self) -> InstanceStats | None:
        """Totals since start. None before `start`."""
        if self._served is None:
            return None
        parts, remote, fetcher = self._served.parts, self._served.remote, self._served.fetcher
        return InstanceStats(
            engine=parts.engine.stats(),
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
        return unavailable(
            f"Instance {self.identity.id} has no link to other instances.", "no_link"
        )

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


def _tell_failure(handover: asyncio.Future[None], mailbox: Mailbox) -> None:
    """Fail the mailbox after an unexpected error of a hand-over: the call waits for tokens."""
    if not handover.cancelled() and (failure := handover.exception()) is not None:
        log.error("a hand-over failed", exc_info=failure)
        mailbox.fail(internal(f"The hand-over failed: {failure!r}", "handoff_error"))
