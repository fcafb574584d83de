"""Sequences of one call, and its answer in OpenAI's format made from the engine's outputs."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

import msgspec

from memserve.api import chunks
from memserve.api.answer.delta import joined
from memserve.api.answer.parser import AnswerParser
from memserve.api.chunks import Piece, StreamFormat
from memserve.api.errors import ApiError, grammar_failed, internal, invalid, unavailable
from memserve.api.generate import FinishReason, GenerateCall, SamplingParams
from memserve.api.limits import INLINE_LOGPROBS
from memserve.api.logprobs import TokenScore
from memserve.api.namespaces import private, salted
from memserve.api.request_stats import RequestStats
from memserve.api.status import Latencies
from memserve.api.stop_strings import StopStrings
from memserve.engine.constraint import CompiledGrammar
from memserve.engine.request import EngineInfo, EngineRequest, TokenLogprobs, TokenOutput
from memserve.instance.choice import Choice
from memserve.instance.sequence_stats import SequenceStats, combined
from memserve.models.tokenizer import Tokenizer
from memserve.tokens import NO_TOKENS
from memserve.tracing.span import Span
from memserve.types import Namespace, RequestId


def engine_requests(
    call: GenerateCall,
    run: int,
    shared: bool = True,
    over: Container[RequestId] = (),
    grammar: CompiledGrammar | None = None,
    span: Span | None = None,
) -> tuple[EngineRequest, ...]:
    """Return the engine requests of a call, except those whose ids are in `over`.

    `run`: number of this run of the call, see `sequence_id`. Samples of a prompt after the first
    wait for the first one's prefill and share its KV. If the call has a seed, each sample gets a
    different one. Without `shared`, every sequence computes its own KV and leaves none in the
    index. `grammar`: the call's, compiled. `span`: the call's, if it is traced.
    """
    requests = []
    common = shared_namespace(call)
    for p, prompt in enumerate(call.prompts):
        first: RequestId | None = None
        for j in range(call.n):
            request_id = sequence_id(call, run, p * call.n + j)
            if request_id in over:
                continue
            requests.append(
                EngineRequest(
                    id=request_id,
                    prompt=prompt,
                    sampling=_seeded(call.sampling, j),
                    namespace=common if shared else private(request_id),
                    ephemeral=not shared,
                    priority=call.priority,
                    output=call.resumed[p * call.n + j] if call.resumed else NO_TOKENS,
                    follows=first if shared else None,
                    grammar=grammar,
                    span=span,
                )
            )
            first = first or request_id
    return tuple(requests)


def sequence_id(call: GenerateCall, run: int, choice: int) -> RequestId:
    """Return the id of the sequence that answers a choice. `run` makes ids unique: a call whose
    stream was cut may return to an instance that still delivers outputs of its earlier run.
    """
    return RequestId(f"{call.id}.{run}-{choice // call.n}-{choice % call.n}")


def shared_namespace(call: GenerateCall) -> Namespace:
    """Return the namespace in which prompts with the call's `cache_salt` share KV. Never equal to
    a `private` one, whatever salt a client chooses.
    """
    return salted(call.cache_salt)


def _seeded(sampling: SamplingParams, sample: int) -> SamplingParams:
    if sampling.seed is None or sample == 0:
        return sampling
    seed = (sampling.seed + sample + 2**63) % 2**64 - 2**63  # stays a signed 64-bit integer
    return msgspec.structs.replace(sampling, seed=seed)


class Generation:
    """Turns the engine's outputs for one call into its answer. No I/O.

    `feed` returns the bytes to stream; without streaming it returns no bytes, and `body` returns
    the whole answer. The answer is finished after the `feed` that ends the last choice. If all
    choices are finished from the start, an empty `feed` finishes it.
    """

    def __init__(
        self,
        call: GenerateCall,
        tokenizer: Tokenizer,
        engine: EngineInfo,
        latencies: Latencies,
        now: float,
        run: int = 0,
        block_bytes: int = 0,
        ended: Container[int] = (),
    ) -> None:
        """`now`: arrival time of the call, seconds of the instance's clock. `run`: number of this
        run, see `sequence_id`. `block_bytes`: bytes of a transferred block, 0 without a link.
        `ended`: choices that the call's resumed tokens end by its grammar.

        Raises ApiError for a call that cannot be resumed.
        """
        self.failure: ApiError | None = None  # why the answer cannot be completed
        self.stopped: list[RequestId] = []  # ended by a stop string; the owner cancels them
        self.finished = False
        self._call = call
        self._latencies = latencies
        self._arrived = now
        self._block_bytes = block_bytes
        self._choices: dict[RequestId, Choice] = {}
        self._begin(call, tokenizer, run)
        if call.resumed:
            self._resume(call, engine.eos_token_ids, ended)
        self.over = frozenset(id for id, choice in self._choices.items() if choice.finished)
        # Statistics of the sequences that run here.
        self.stats = {id: SequenceStats(now) for id in self._choices if id not in self.over}
        # Unfinished sequences, with the time of each one's last output.
        self._last = dict.fromkeys(self.stats, now)
        self._format = StreamFormat(call) if call.stream else None
        self._pieces: list[list[Piece]] = [[] for _ in self._choices]  # without streaming
        # By choice, without streaming: `body` makes scores of them.
        self._prompt_logprobs: dict[int, Sequence[TokenLogprobs]] = {}

    def _begin(self, call: GenerateCall, tokenizer: Tokenizer, run: int) -> None:
        stops = StopStrings(call.stop, call.include_stop_str_in_output) if call.stop else None
        parser: AnswerParser | None = None
        if call.answer is not None:
            parser = AnswerParser(call.answer, tokenizer.response_template)
        for p, prompt in enumerate(call.prompts):
            lead = ""
            if call.echo:
                sent = call.echo[p]
                special = call.skip_special_tokens
                lead = tokenizer.decode(prompt.tolist(), special) if sent is None else sent
            for index in range(p * call.n, (p + 1) * call.n):
                own = None if stops is None else stops.anew()
                reader = None if parser is None else parser.anew()
                choice = Choice(index, call, tokenizer, prompt, own, reader, lead)
                self._choices[sequence_id(call, run, index)] = choice

    def _resume(
        self, call: GenerateCall, eos_token_ids: Sequence[int], ended: Container[int]
    ) -> None:
        if not call.stream:
            raise invalid("only streams can be resumed", "resumed")
        if len(call.resumed) != len(self._choices):
            raise invalid(
                f"{len(self._choices)} choices, but tokens for {len(call.resumed)}", "resumed"
            )
        for choice, token_ids in zip(self._choices.values(), call.resumed, strict=True):
            choice.resume(token_ids, eos_token_ids, choice.index in ended)

    @property
    def id(self) -> RequestId:
        return RequestId(self._call.id)

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self._call.prompts))

    @property
    def unfinished(self) -> list[RequestId]:
        return list(self._last)

    def feed(self, outputs: Sequence[TokenOutput], now: float) -> bytes:
        """Add outputs of the engine. Returns the bytes to stream."""
        call = self._call
        parts: list[bytes] = []
        for output in outputs:
            if output.id not in self._last:  # an output after a stop string
                continue
            if output.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED):
                del self._last[output.id]
                self.failure = _failure(output)
                self._latencies.ended.fail(output.finish_reason)
                continue
            choice = self._choices[output.id]
            first = not choice.started
            piece = choice.feed(output)
            self._measure(output, first, now)
            if choice.finished:
                del self._last[output.id]
                self._latencies.whole.observe(now - self._arrived)
                self.stats[output.id].end(self._latencies, now)
                self._latencies.ended.finish(
                    piece.finish_reason, choice.prompt_tokens, choice.tokens
                )
                if output.finish_reason is None:
                    self.stopped.append(output.id)
            if self._format is None:
                self._pieces[choice.index].append(piece)
                if first and call.sampling.prompt_logprobs is not None:
                    self._prompt_logprobs[choice.index] = output.prompt_logprobs
            else:
                if first and call.echo and call.sampling.logprobs is not None:
                    piece = _echoed(piece, choice.prompt_scores(output.prompt_logprobs), call)
                parts.append(self._format.event(piece, first))
        if not self._last and not self.finished:
            self.finished = True
            if self._format is not None and self.failure is None:
                if self._call.include_usage:
                    parts.append(self._format.usage(self._usage()))
                parts.append(chunks.DONE)
        return b"".join(parts)

    @property
    def large(self) -> bool:
        """Return whether `body` takes too long for an event loop."""
        sampling = self._call.sampling
        scores = 0 if sampling.logprobs is None else 1 + sampling.logprobs
        if sampling.prompt_logprobs is not None:
            positions = sum(map(len, self._prompt_logprobs.values()))
            if positions * (1 + sampling.prompt_logprobs) > INLINE_LOGPROBS:
                return True
        # A token without log-probabilities takes a tenth of the time of one log-probability.
        return self.generated_tokens * (10 * scores + 1) > 10 * INLINE_LOGPROBS

    def body(self) -> bytes:
        """Return the whole answer of a finished call without streaming. May run in any thread."""
        joined = [_joined(pieces) for pieces in self._pieces]
        for choice in self._choices.values():
            if choice.index in self._prompt_logprobs:
                joined[choice.index] = self._scored(choice, joined[choice.index])
        return chunks.body(self._call, joined, self._usage())

    def _scored(self, choice: Choice, piece: Piece) -> Piece:
        """Return a choice's complete piece with the scores of its prompt."""
        call = self._call
        scores = choice.prompt_scores(self._prompt_logprobs[choice.index])
        if call.echo and call.sampling.logprobs is not None:
            piece = _echoed(piece, scores, call)
        return replace(piece, prompt_scores=scores)

    def _measure(self, output: TokenOutput, first: bool, now: float) -> None:
        if first:
            self._latencies.first_token.observe(now - self._arrived)
        elif output.token_ids:
            count = len(output.token_ids)
            gap = (now - self._last[output.id]) / count
            self._latencies.inter_token.observe(gap, count)
        self._last[output.id] = now
        self.stats[output.id].take(output.usage, now, len(output.token_ids))

    @property
    def generated_tokens(self) -> int:
        """Tokens that all runs of this call generated."""
        if self._call.prompt_only:
            return 0
        return sum(choice.tokens for choice in self._choices.values())

    def totals(self) -> RequestStats:
        """Return the combined statistics of all sequences so far."""
        firsts: dict[int, SequenceStats] = {}
        for id, stats in self.stats.items():
            firsts.setdefault(self._choices[id].index // self._call.n, stats)
        return combined(self.stats.values(), firsts.values(), self._block_bytes)

    def __str__(self) -> str:
        how = "failed" if self.failure is not None else "done" if self.finished else "given up"
        return (
            f"{self._call.id} {how}: {self.prompt_tokens} prompt tokens, {self.generated_tokens} "
            f"generated; {self.totals()}"
        )

    def _usage(self) -> chunks.CompletionUsage:
        stats = self.totals()
        return chunks.usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.generated_tokens,
            cached_tokens=stats.cached_tokens_prefill,
            stats=stats,
        )


def _failure(output: TokenOutput) -> ApiError:
    if output.finish_reason is FinishReason.CANCELLED:  # the engine stopped
        return unavailable("The instance stopped before the answer was done.", "instance_stopped")
    if output.at_fault:
        return grammar_failed(output.error)
    return internal(output.error or "The engine failed.", "engine_error")


def _echoed(piece: Piece, scores: Sequence[TokenScore], call: GenerateCall) -> Piece:
    """Return a piece that begins with an echoed prompt, with the prompt's scores."""
    shown = [replace(score, top=score.top[: call.sampling.logprobs]) for score in scores]
    return replace(piece, scores=(*shown, *piece.scores))


def _joined(pieces: Sequence[Piece]) -> Piece:
    """Return the pieces of a choice as one piece."""
    if len(pieces) == 1:
        return pieces[0]
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=[token_id for piece in pieces for token_id in piece.token_ids],
        scores=[score for piece in pieces for score in piece.scores],
        delta=None
        if pieces[-1].delta is None
        else joined(piece.delta for piece in pieces if piece.delta is not None),
    )
