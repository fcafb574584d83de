"""One call's way through the engine: its sequences, and the answer in OpenAI's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from memserve.api import chunks
from memserve.api.chunks import Piece, StreamFormat
from memserve.api.errors import ApiError, internal, unavailable
from memserve.api.generate import CallKind, FinishReason, GenerateCall, SamplingParams
from memserve.api.status import Latencies
from memserve.engine.request import EngineRequest, TokenOutput
from memserve.instance.choice import Choice
from memserve.models.tokenizer import Tokenizer
from memserve.types import SHARED, Namespace, RequestId


def engine_requests(call: GenerateCall, shared: bool = True) -> tuple[EngineRequest, ...]:
    """The sequences of a call: choice `p * n + j` is `{id}-{p}-{j}`.

    Samples after the first wait for its prefill and share it. Each has a seed of its own.
    Without `shared`, every sequence computes its own KV and leaves none.
    """
    requests = []
    common = shared_namespace(call)
    for p, ids in enumerate(call.prompts):
        prompt = np.array(ids, dtype=np.int32)
        first = RequestId(f"{call.id}-{p}-0")
        requests += [
            EngineRequest(
                id=RequestId(f"{call.id}-{p}-{j}"),
                prompt=prompt,
                sampling=_seeded(call.sampling, j),
                namespace=common if shared else _own_namespace(f"{call.id}-{p}-{j}"),
                ephemeral=not shared,
                priority=call.priority,
                follows=first if j and shared else None,
            )
            for j in range(call.n)
        ]
    return tuple(requests)


def shared_namespace(call: GenerateCall) -> Namespace:
    """Of prompts that reuse each other's KV. Clients choose their salts, so salts and the ids
    of sequences are kept apart.
    """
    return Namespace(f"salt:{call.cache_salt}") if call.cache_salt else SHARED


def _own_namespace(sequence: str) -> Namespace:
    return Namespace(f"sequence:{sequence}")


def _seeded(sampling: SamplingParams, sample: int) -> SamplingParams:
    if sampling.seed is None or sample == 0:
        return sampling
    seed = (sampling.seed + sample + 2**63) % 2**64 - 2**63  # stays a signed 64-bit integer
    return msgspec.structs.replace(sampling, seed=seed)


class Generation:
    """Turns the engine's outputs for one call into its answer. No I/O.

    `feed` returns the bytes to stream; without streaming it returns none and `body` has all.
    """

    def __init__(
        self,
        call: GenerateCall,
        requests: Sequence[EngineRequest],
        tokenizer: Tokenizer,
        latencies: Latencies,
        now: float,
    ) -> None:
        """`requests` are the call's `engine_requests`; `now` is when it arrived."""
        self.failure: ApiError | None = None  # why the answer cannot be completed
        self.stopped: list[RequestId] = []  # ended by a stop string: the owner cancels them
        self._call = call
        self._latencies = latencies
        self._arrived = now
        self._choices = {
            request.id: Choice(index, call, tokenizer, call.prompts[index // call.n])
            for index, request in enumerate(requests)
        }
        self._last = dict.fromkeys(self._choices, now)  # when each had its last token
        self._format = StreamFormat(call) if call.stream else None
        self._pieces: list[list[Piece]] = [[] for _ in self._choices]  # without streaming

    @property
    def finished(self) -> bool:
        return not self._last

    @property
    def unfinished(self) -> list[RequestId]:
        return list(self._last)

    def feed(self, outputs: Sequence[TokenOutput], now: float) -> bytes:
        """Take in what the engine produced for this call."""
        parts: list[bytes] = []
        for output in outputs:
            if output.id not in self._last:  # what came after a stop string
                continue
            if output.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED):
                del self._last[output.id]
                self.failure = _failure(output)
                continue
            choice = self._choices[output.id]
            first = not choice.started
            piece = choice.feed(output)
            self._measure(output, first, now)
            if choice.finished:
                del self._last[output.id]
                self._latencies.whole.observe(now - self._arrived)
                if output.finish_reason is None:
                    self.stopped.append(output.id)
            if self._format is None:
                self._pieces[choice.index].append(piece)
            else:
                parts += self._events(self._format, piece, first)
        if self._format is not None and self.finished and self.failure is None:
            if self._call.include_usage:
                parts.append(self._format.usage(self._usage()))
            parts.append(chunks.DONE)
        return b"".join(parts)

    def body(self) -> bytes:
        """The whole answer, once finished (without streaming)."""
        return chunks.body(self._call, [_joined(pieces) for pieces in self._pieces], self._usage())

    def _events(self, form: StreamFormat, piece: Piece, first: bool) -> list[bytes]:
        events = []
        if first and self._call.kind is CallKind.CHAT:
            events.append(form.role(piece.choice))
        # Held-back text makes pieces without any; their token ids and scores still matter.
        wanted = self._call.return_token_ids or piece.scores
        if piece.text or piece.finish_reason is not None or wanted:
            events.append(form.chunk(piece))
        return events

    def _measure(self, output: TokenOutput, first: bool, now: float) -> None:
        if first:
            self._latencies.first_token.observe(now - self._arrived)
        elif output.token_ids:
            count = len(output.token_ids)
            gap = (now - self._last[output.id]) / count
            self._latencies.inter_token.observe(gap, count)
        self._last[output.id] = now

    def _usage(self) -> chunks.CompletionUsage:
        choices = list(self._choices.values())
        return chunks.usage(
            prompt_tokens=sum(map(len, self._call.prompts)),
            completion_tokens=sum(choice.tokens for choice in choices),
            # Later samples share the first one's prefill: that saving is not the cache's.
            cached_tokens=sum(choice.cached_tokens for choice in choices[:: self._call.n]),
        )


def _failure(output: TokenOutput) -> ApiError:
    if output.finish_reason is FinishReason.CANCELLED:  # by a stop of the engine, not by us
        return unavailable("The instance stopped before the answer was done.", "instance_stopped")
    return internal(output.error or "The engine failed.", "engine_error")


def _joined(pieces: Sequence[Piece]) -> Piece:
    """A choice's pieces as one."""
    if len(pieces) == 1:
        return pieces[0]
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=[token_id for piece in pieces for token_id in piece.token_ids],
        scores=[score for piece in pieces for score in piece.scores],
        text_offset=pieces[0].text_offset,
    )
