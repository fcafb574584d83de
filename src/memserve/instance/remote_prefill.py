"""Decode side of a hand-over: request a prefill from another instance, continue from its token.

After a failure the next prefill instance is asked; if all fail, this instance computes the prompt.
The prefill request has no time limit, since it may wait in a long queue; instead, a prefill
instance is given up when the lease between the pools lapses.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from copy import copy
from dataclasses import replace

import msgspec
import numpy as np

from memserve.api import msgpack
from memserve.api.errors import GRAMMAR_FAILED, ApiError, grammar_failed
from memserve.api.generate import FinishReason, GenerateCall, PrefillPeer, SamplingParams
from memserve.api.handoff import PREFILL_PATH, PoolPeer, PrefillCall, PrefillResult
from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.status import HandoffTotals
from memserve.clock import Clock
from memserve.engine.request import EngineRequest, TokenLogprobs, TokenOutput, Usage
from memserve.errors import PoolError, TransferError
from memserve.instance.dispatcher import Mailbox
from memserve.instance.fetch import Fetcher
from memserve.instance.generation import shared_namespace
from memserve.instance.link import KVLink
from memserve.instance.request_trace import moved
from memserve.instance.sequence_stats import SequenceStats
from memserve.instance.submission import Submission
from memserve.tokens import from_ids
from memserve.tracing.span import Span, SpanKind, headers_of, timed
from memserve.types import Namespace, RequestId, TokenArray

log = logging.getLogger(__name__)

# Concurrent returns. More would compete with pushes that a client waits for.
MAX_RETURNS = 4
# The next turn of a conversation may come before the KV of the last answer is back at the prefill
# instance. A prefill waits up to this long for such returns: as long as a few pushes on one host,
# and less than computing the KV again.
RETURN_SECONDS = 0.1

_results = msgspec.msgpack.Decoder(PrefillResult)


class _Unanswered(Exception):
    """A prefill instance gave no result."""


class RemotePrefill:
    """Starts calls with prefills from other instances, and returns KV to them. Used on one event
    loop."""

    def __init__(
        self,
        peers: PeerClient,
        link: KVLink,
        submission: Submission,
        fetcher: Fetcher,
        clock: Clock,
    ) -> None:
        self._peers = peers
        self._link = link
        self._submission = submission
        self._fetcher = fetcher
        self._clock = clock
        self._counters = HandoffTotals(block_bytes=link.block_bytes)
        # By running sequence: the pool that gets its KV at the end.
        self._return_targets: dict[RequestId, PoolPeer] = {}
        self._returns: dict[asyncio.Task[None], TokenArray] = {}  # running returns: their prompts
        self._background: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    def totals(self) -> HandoffTotals:
        """Counters since start, in blocks and bytes."""
        return copy(self._counters)

    async def run(
        self,
        call: GenerateCall,
        requests: Sequence[EngineRequest],
        stats: Mapping[RequestId, SequenceStats],
        mailbox: Mailbox,
    ) -> None:
        """Start all sequences of a call, fill in their `stats`, and put ApiErrors into the
        mailbox."""
        leaders = [request for request in requests if request.follows is None]
        groups = [[leader, *(r for r in requests if r.follows == leader.id)] for leader in leaders]
        try:
            async with asyncio.TaskGroup() as group:
                for sequences in groups:
                    group.create_task(self._start(call, sequences, stats, mailbox))
        except* ApiError as errors:
            mailbox.fail(_first(errors))

    async def bring(
        self, call: GenerateCall, namespace: Namespace, span: Span | None = None
    ) -> SequenceStats:
        """Bring the KV of a call's first prompt into `namespace` of this instance's pool, by a
        remote prefill or else a fetch; return its statistics. The vLLM server then finds the KV
        cached when it gets the forwarded body."""
        prompt = call.prompts[0]
        request = EngineRequest(
            id=RequestId(f"{call.id}-forward"),
            prompt=prompt,
            # For max_tokens=1 a prefill instance sends no KV into a private namespace.
            sampling=SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True),
            namespace=namespace,
            priority=call.priority,
            span=span,
        )
        shared, own = shared_namespace(call), SequenceStats(self._clock.now())
        if call.prefill:
            await self._wait_for_returns(prompt)
            result = await self._prefill(call, request, shared)
            if result is not None:
                self._note(result, request, own)
                return own
        fetched = await self._fetcher.fetch(call.fetch, request.id, prompt, shared, namespace, span)
        own.blocks_fetched, own.fetch_seconds = fetched.blocks, fetched.seconds
        return own

    async def _start(
        self,
        call: GenerateCall,
        sequences: Sequence[EngineRequest],
        stats: Mapping[RequestId, SequenceStats],
        mailbox: Mailbox,
    ) -> None:
        leader, rest = sequences[0], list(sequences[1:])
        shared, own = shared_namespace(call), stats[leader.id]
        result: PrefillResult | None = None
        if call.prefill:
            await self._wait_for_returns(leader.prompt)
            result = await self._prefill(call, leader, shared)
        if result is None:
            fetched = await self._fetcher.fetch(
                call.fetch, leader.id, leader.tokens, shared, leader.namespace, leader.span
            )
            own.blocks_fetched, own.fetch_seconds = fetched.blocks, fetched.seconds
            received = fetched.blocks
        else:
            received = result.blocks_sent
        leader = replace(leader, received_tokens=received * self._link.block_tokens)
        if mailbox.closed:  # the call has ended, and the cancellation of this task is pending
            return
        for sequence in sequences:
            stats[sequence.id].submitted = self._clock.now()
        if result is None:
            self._submission.submit([leader, *rest])
            return
        self._note(result, leader, own)
        output = self._output(leader, result)
        behind = replace(leader, output=np.append(leader.output, np.int32(result.token)))
        # If the engine cannot continue after that token, it computes the token again, in one step
        # since the KV is here.
        takes = output.finish_reason is not None or self._submission.goes_on(behind)
        if not takes:
            rest.insert(0, leader)
        elif output.finish_reason is None:
            rest.insert(0, behind)
        if rest:
            self._submission.submit(rest)
        if takes:
            mailbox.put(output)
        self._prepare_returns(sequences, result)

    def _prepare_returns(self, sequences: Sequence[EngineRequest], result: PrefillResult) -> None:
        if result.pool is not None and self._link.caching == "full":
            self._return_targets.update(dict.fromkeys((s.id for s in sequences), result.pool))
            # Connect now, so that the return is not delayed past the conversation's next turn.
            self._in_background(self._meet(result.pool))

    def _output(self, leader: EngineRequest, result: PrefillResult) -> TokenOutput:
        finish = None
        if result.stop_token is not None or result.ended:
            finish = FinishReason.STOP
        else:
            output = len(leader.output) + 1
            whole = len(leader.prompt) + output >= self._submission.max_tokens
            if whole or output == leader.sampling.max_tokens:
                finish = FinishReason.LENGTH
        scores = result.logprobs
        return TokenOutput(
            id=leader.id,
            token_ids=(result.token,),
            usage=Usage(len(leader.prompt), result.cached_tokens, 0),
            logprobs=(
                () if scores is None else (TokenLogprobs(scores.chosen, scores.rank, scores.top),)
            ),
            finish_reason=finish,
            stop_token=result.stop_token,
        )

    # --- remote prefills ------------------------------------------------------------------

    def _note(self, result: PrefillResult, leader: EngineRequest, own: SequenceStats) -> None:
        own.handed_over = True
        own.cached_tokens_prefill = result.cached_tokens
        here = result.blocks_already_present * self._link.block_tokens
        own.cached_tokens_decode = min(here, len(leader.prompt))
        own.blocks_fetched = result.blocks_fetched
        own.blocks_received = result.blocks_sent
        own.blocks_already_present = result.blocks_already_present
        own.queue_seconds = result.queue_seconds
        own.fetch_seconds = result.fetch_seconds
        own.prefill_seconds = result.prefill_seconds - result.queue_seconds
        own.transfer_seconds = result.transfer_seconds
        own.chunks = result.chunks
        counters = self._counters
        counters.prompt_tokens += len(leader.prompt)
        counters.cached_tokens_prefill += own.cached_tokens_prefill
        counters.cached_tokens_decode += own.cached_tokens_decode
        counters.blocks_received += own.blocks_received
        counters.blocks_already_present += own.blocks_already_present
        counters.queue_seconds += result.queue_seconds
        counters.prefill_seconds += result.prefill_seconds
        counters.transfer_seconds += result.transfer_seconds

    async def _prefill(
        self, call: GenerateCall, request: EngineRequest, shared: Namespace
    ) -> PrefillResult | None:
        """Ask the prefill instances of a call in turn. Returns the first result, or None if all
        fail. `shared`: namespace in which prefill instances keep the KV, unless caching is off.
        """
        counters = self._counters
        body = msgpack.encode(
            PrefillCall(
                id=request.id,
                prompt=request.prompt,
                sampling=request.sampling,
                namespace=request.namespace if self._link.caching == "off" else shared,
                ephemeral=self._link.caching == "off",
                target=self._link.address,
                target_namespace=request.namespace,
                priority=request.priority,
                output=request.output,
                fetch=call.fetch,
            )
        )
        for peer in call.prefill:
            counters.asked += 1
            try:
                with timed(
                    request.span, "ask prefill", SpanKind.CLIENT, {"memserve.instance": peer.id}
                ) as span:
                    result = await self._ask(peer, body, span)
            except _Unanswered as error:
                counters.failed += 1
                log.warning("%s: no prefill from %s: %s", request.id, peer.id, error)
                continue
            log.info("%s: prefill at %s", request.id, peer.id)
            self._fetcher.moves.received(peer.id, result.blocks_sent * self._link.block_bytes)
            return result
        return None

    async def _ask(self, peer: PrefillPeer, body: bytes, span: Span | None) -> PrefillResult:
        if peer.pool is None:
            raise _Unanswered(f"{peer.id} has no pool")
        post = asyncio.ensure_future(self._post(peer, body, headers_of(span)))
        watch = asyncio.ensure_future(self._link.until_lost(PoolPeer(peer.id, peer.pool)))
        try:
            await asyncio.wait((post, watch), return_when=asyncio.FIRST_COMPLETED)
            if not post.done():
                raise _Unanswered(watch.result())
            return post.result()
        finally:
            post.cancel()
            watch.cancel()

    async def _post(
        self, peer: PrefillPeer, body: bytes, headers: Mapping[str, str]
    ) -> PrefillResult:
        try:
            return await self._peers.call(
                "POST",
                peer.address + PREFILL_PATH,
                _results.decode,
                body,
                media=msgpack.MEDIA,
                headers=headers,
            )
        except PeerError as error:
            if error.detail is not None and error.detail.code == GRAMMAR_FAILED:
                raise grammar_failed(error.detail.message) from error  # as it would anywhere
            raise _Unanswered(str(error)) from error

    # --- returns of KV --------------------------------------------------------------------

    def ended(
        self, request: EngineRequest, produced: Sequence[int], finished: bool, busy: bool
    ) -> None:
        """Handle the end of a sequence; `produced`: the tokens generated here.

        With caching `full`, return the KV of a `finished` sequence to the instance that computed
        its prompt, unless this instance is `busy` or MAX_RETURNS returns are running.
        """
        home = self._return_targets.pop(request.id, None)
        if request.ephemeral:  # the engine drops the namespace only of sequences that it has run
            self._link.forget(request.namespace)
        if home is None or not finished:
            return
        if busy or len(self._returns) >= MAX_RETURNS:
            self._counters.returns_dropped += 1
            return
        tokens = np.concatenate((request.tokens, from_ids(produced)))
        task = self._in_background(self._return_kv(request, home, tokens))
        self._returns[task] = request.prompt
        task.add_done_callback(self._returns.pop)

    async def _wait_for_returns(self, prompt: TokenArray) -> None:
        """Wait up to RETURN_SECONDS for returns whose prompt is a prefix of this prompt."""
        wanted = [
            task
            for task, start in self._returns.items()
            if len(start) <= len(prompt) and np.array_equal(start, prompt[: len(start)])
        ]
        if wanted:
            await asyncio.wait(wanted, timeout=RETURN_SECONDS)

    def _in_background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._ended_in_background)
        return task

    def _ended_in_background(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task of a hand-over failed", exc_info=error)

    async def _meet(self, peer: PoolPeer) -> None:
        try:
            await self._link.meet(peer)
        except (TransferError, PoolError) as error:
            log.warning("%s cannot be reached for KV: %s", peer.id, error)

    async def _return_kv(self, request: EngineRequest, home: PoolPeer, tokens: TokenArray) -> None:
        try:
            to = {"memserve.instance": home.id}
            with timed(request.span, "return", SpanKind.CLIENT, to) as span:
                pushed = await self._link.push(home, tokens, request.namespace, request.namespace)
                if span is not None:
                    span.attributes |= moved(pushed, self._link.block_bytes)
        except (TransferError, PoolError) as error:
            self._counters.returns_dropped += 1
            log.warning("%s: KV was not returned to %s: %s", request.id, home.id, error)
            return
        self._counters.returns += 1
        self._counters.blocks_returned += pushed.sent
        size = pushed.sent * self._link.block_bytes
        self._fetcher.moves.returned(home.id, size)
        log.info("%s: %d blocks (%d bytes) returned to %s", request.id, pushed.sent, size, home.id)


def _first(errors: BaseExceptionGroup[ApiError]) -> ApiError:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            return _first(error)
        return error
    raise AssertionError("an exception group is not empty")
