"""Prefill side of a hand-over: compute a prompt, send its KV, return the first token."""

from __future__ import annotations

import asyncio
import itertools
import logging
from dataclasses import replace

from memserve.api.errors import grammar_failed, internal, unavailable
from memserve.api.generate import FinishReason
from memserve.api.handoff import PrefillCall, PrefillResult, TokenScores
from memserve.api.namespaces import is_private
from memserve.clock import Clock
from memserve.engine.request import EngineRequest, TokenOutput
from memserve.errors import PoolError, TransferError
from memserve.instance.dispatcher import Dispatcher
from memserve.instance.fetch import Fetcher
from memserve.instance.grammars import Grammars
from memserve.instance.link import KVLink, PrefillStream
from memserve.instance.request_trace import prefilled
from memserve.instance.submission import Submission
from memserve.tracing.span import Span
from memserve.transfer.kv_link import Pushed
from memserve.types import RequestId, TokenArray

log = logging.getLogger(__name__)


class Prefiller:
    """Runs `PrefillCall`s. Cancelling `run` stops the call's sequence and transfer."""

    def __init__(
        self,
        link: KVLink,
        dispatcher: Dispatcher,
        submission: Submission,
        fetcher: Fetcher,
        clock: Clock,
        grammars: Grammars | None = None,
    ) -> None:
        """`grammars`: None if the engine does not support them."""
        self._grammars = grammars
        self._link = link
        self._dispatcher = dispatcher
        self._submission = submission
        self._fetcher = fetcher
        self._clock = clock
        self._numbers = itertools.count()

    async def run(self, call: PrefillCall, span: Span | None = None) -> PrefillResult:
        """Compute a prompt. Raises ApiError if that fails. `span`: the call's, if it is traced.

        A failed transfer is no error: the decode instance computes the missing KV itself.
        """
        request = self._request(call, span)
        if call.sampling.grammar is not None and self._grammars is not None:
            request = replace(request, grammar=await self._grammars.compile(call.sampling.grammar))
        # After a failover, `tokens` includes the lost instance's output.
        tokens = request.tokens
        self._submission.check([request])
        fetched = await self._fetcher.fetch(
            call.fetch, call.id, tokens, call.namespace, call.namespace, span
        )
        started = self._clock.now()
        stream = await self._stream(call, tokens)
        try:
            output = await self._compute(replace(request, observer=stream))
            computed = self._clock.now()
            pushed = await self._deliver(call, output, stream)
        finally:
            if stream is not None:
                stream.close()
            if call.ephemeral:
                self._link.forget(call.namespace)
        result = PrefillResult(
            token=output.token_ids[0],
            pool=None if call.ephemeral else self._link.address,
            cached_tokens=output.usage.cached_tokens or 0,
            stop_token=output.stop_token,
            logprobs=_scores(output),
            blocks_sent=pushed.sent,
            blocks_already_present=pushed.already_present,
            prefill_seconds=computed - started,
            transfer_seconds=self._clock.now() - computed,
            queue_seconds=output.usage.queue_seconds,
            fetch_seconds=fetched.seconds,
            blocks_fetched=fetched.blocks,
            ended=output.finish_reason is FinishReason.STOP,
            chunks=tuple(output.usage.chunks),
        )
        if span is not None and span.recording:
            prefilled(span, call, result, started, pushed, self._link.block_bytes)
        return result

    def _request(self, call: PrefillCall, span: Span | None) -> EngineRequest:
        # The number makes the id unique: after a failover, another decode instance sends the same
        # call id while the first one's sequence may still be queued here.
        request_id = RequestId(f"{call.id}-prefill-{next(self._numbers)}")
        return EngineRequest(
            id=request_id,
            prompt=call.prompt,
            sampling=call.sampling,
            namespace=call.namespace,
            priority=call.priority,
            output=call.output,
            prefill_only=True,
            span=span,
        )

    async def _compute(self, request: EngineRequest) -> TokenOutput:
        with self._dispatcher.mailbox([request.id]) as mailbox:
            self._submission.submit([request])
            try:
                (output,) = await mailbox.take()
            except asyncio.CancelledError:
                self._submission.cancel([request.id])
                raise
        if output.at_fault:
            raise grammar_failed(output.error)
        if output.finish_reason is FinishReason.ERROR:
            raise internal(output.error or "The engine failed.", "engine_error")
        if output.finish_reason is FinishReason.CANCELLED:
            raise unavailable("The instance stopped before the prefill was done.", "stopped")
        return output

    async def _stream(self, call: PrefillCall, tokens: TokenArray) -> PrefillStream | None:
        """Return the observer that sends the KV while it is computed. None: no KV is sent (no
        whole block, no use at the decode instance, or the instance is out of reach)."""
        last = len(call.output) + 1 >= call.sampling.max_tokens
        if len(tokens) < self._link.block_tokens or (last and not _is_kept(call)):
            return None
        try:
            return await self._link.stream(
                call.target, tokens, call.namespace, call.target_namespace
            )
        except (TransferError, PoolError) as error:
            log.warning("%s: %s cannot be reached for KV: %s", call.id, call.target.id, error)
            return None

    async def _deliver(
        self, call: PrefillCall, output: TokenOutput, stream: PrefillStream | None
    ) -> Pushed:
        ended = output.finish_reason is FinishReason.STOP
        if stream is None or (ended and not _is_kept(call)):
            return Pushed()
        try:
            return await stream.deliver()
        except (TransferError, PoolError) as error:
            log.warning("%s: KV did not reach %s: %s", call.id, call.target.id, error)
            return Pushed()


def _is_kept(call: PrefillCall) -> bool:
    """Return whether the decode instance keeps the KV after the end of the answer."""
    return not is_private(call.target_namespace)


def _scores(output: TokenOutput) -> TokenScores | None:
    if not output.logprobs:
        return None
    (entry,) = output.logprobs
    return TokenScores(entry.chosen, entry.rank, entry.top)
