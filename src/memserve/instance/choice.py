"""One choice of an answer: detokenisation, stop strings, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

from memserve.api.answer.delta import Delta
from memserve.api.answer.format import ToolFormat
from memserve.api.answer.parser import AnswerParser, markers_of
from memserve.api.chunks import Piece
from memserve.api.detokenizer import Decode, Detokenizer
from memserve.api.errors import invalid
from memserve.api.generate import FinishReason, GenerateCall
from memserve.api.logprobs import ScoredToken, TokenScore
from memserve.api.stop_strings import StopStrings
from memserve.engine.request import TokenLogprobs, TokenOutput
from memserve.models.tokenizer import Tokenizer
from memserve.tokens import NO_TOKENS
from memserve.types import TokenArray


class Choice:
    """Turns one sequence's outputs into pieces of text, and ends at a stop string.

    After a piece with `finish_reason` the choice is finished. If a stop string ended it, the
    engine still runs the sequence, and the owner cancels it.
    """

    def __init__(
        self,
        index: int,
        call: GenerateCall,
        tokenizer: Tokenizer,
        prompt: TokenArray,
        stops: StopStrings | None = None,
        parser: AnswerParser | None = None,
        lead: str = "",
    ) -> None:
        """`stops`: a stop-string search for this choice only. `parser`: the parser of its answer,
        if the call has a format for it. `lead`: text before the generated text (`echo`)."""
        self.index = index
        self.started = False  # an output was added, or resumed
        self.finished = False
        self.tokens = 0  # generated so far, resumed ones included
        self.prompt_tokens = len(prompt)
        self._call = call
        self._tokenizer = tokenizer
        self._stops = stops
        self._lead = lead
        self._parser = parser
        self._skipped: frozenset[int] = frozenset()  # special tokens, where others are kept
        if call.answer is not None:
            seen = tokenizer.special_among(markers_of(call.answer))
            if call.answer.tools is ToolFormat.RESPONSE_TEMPLATE:
                seen |= tokenizer.response_ids
            if seen:
                self._skipped = tokenizer.special_ids - seen
        self._detokenizer = Detokenizer(self._decode, prompt)
        self._prompt = prompt
        self._texts: dict[int, tuple[str, bytes]] = {}  # of tokens in scores
        # Characters so far, stop strings included: the text offset of the next token.
        self._length = len(self._lead)

    def feed(self, output: TokenOutput) -> Piece:
        """Add an output. Returns its piece; tokens after a stop string are dropped."""
        if self._call.prompt_only:
            return self._only_prompt(output.token_ids)
        return self._add(output.token_ids, output.finish_reason, output.stop_token, output.logprobs)

    def prompt_scores(self, logprobs: Sequence[TokenLogprobs]) -> list[TokenScore]:
        """Return the scores of the prompt's tokens; `logprobs`: of all but the first. Takes some
        microseconds per token."""
        ids = self._prompt.tolist()
        echo = self._call.echo
        text = echo[self.index // self._call.n] if echo else None
        offsets = token_offsets(self._tokenizer, self._prompt, text, self._decode)
        first = TokenScore(self._scored(ids[0], 0.0), (), offsets[0], None)
        return [first, *self._scores(ids[1:], offsets[1:], logprobs)]

    def _only_prompt(self, ids: Sequence[int]) -> Piece:
        """Return the piece of a choice whose only token is dropped; a stream's comment names it,
        so that another instance knows that the choice is finished."""
        self.started = self.finished = True
        self.tokens += len(ids)
        text, self._lead = self._lead, ""
        return Piece(self.index, text, ids, finish_reason=FinishReason.LENGTH)

    def resume(self, tokens: TokenArray, eos_token_ids: Sequence[int], ended: bool = False) -> None:
        """Begin after `tokens` [n], which the client has already. They may finish the choice.

        `eos_token_ids` are the model's. `ended`: no token may follow by the call's grammar. Raises
        ApiError for tokens after the end of the choice.
        """
        params = self._call.sampling
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        for at, token_id in enumerate(tokens.tolist(), 1):
            if self.finished:
                raise invalid(f"choice {self.index} ends before its last token", "resumed")
            stop_token = token_id if token_id in ends else None
            reason = None
            if stop_token is not None or (ended and at == len(tokens)):
                reason = FinishReason.STOP
            elif self.tokens + 1 == params.max_tokens:
                reason = FinishReason.LENGTH
            self._add((token_id,), reason, stop_token, ())

    def _add(
        self,
        ids: Sequence[int],
        reason: FinishReason | None,
        stop_token: int | None,
        logprobs: Sequence[TokenLogprobs],
    ) -> Piece:
        self.started = True
        parser = self._parser
        text, self._lead = [self._lead], ""
        stop: str | None = None
        silent = stop_token is not None and not self._call.include_stop_str_in_output
        offsets: list[int] = []
        for position, token_id in enumerate(ids):
            self.tokens += 1
            offsets.append(self._length)
            if silent and position == len(ids) - 1:
                break
            new, stop = self._search(self._detokenizer.push(token_id))
            text.append(new)
            if parser is not None:
                parser.push(new)
                if parser.over:
                    reason = FinishReason.STOP
            if stop is not None or (parser is not None and parser.over):
                ids = ids[: position + 1]
                break
        read = len(text)
        if stop is None and reason is not None:
            rest, stop = self._search(self._detokenizer.flush())
            text.append(rest)
            if stop is None and self._stops is not None:
                text.append(self._stops.flush())
        if stop is not None:
            reason = FinishReason.STOP
        self.finished = reason is not None
        delta = None
        if parser is not None:
            delta = self._parsed(parser, "".join(text[read:]))
            if reason is FinishReason.STOP and parser.calls_end:
                reason = FinishReason.TOOL_CALLS
        return Piece(
            choice=self.index,
            text="".join(text),
            token_ids=ids,
            scores=self._scores(ids, offsets, logprobs),
            finish_reason=reason,
            stop_reason=stop if stop is not None else self._named(stop_token),
            delta=delta,
        )

    def _parsed(self, parser: AnswerParser, rest: str) -> Delta:
        """Return the parsed delta since the last piece. `rest`: text not given to `parser` yet."""
        parser.push(rest)
        if self.finished:
            parser.finish()
        return parser.take()

    def _search(self, text: str) -> tuple[str, str | None]:
        self._length += len(text)
        if self._stops is None or not text:
            return text, None
        # As in vLLM: a stop string may begin within `min_tokens`, but not end there.
        return self._stops.push(text, ends=self.tokens > self._call.sampling.min_tokens)

    def _named(self, stop_token: int | None) -> int | None:
        """Return the stop token if the client asked for it. An end token of the model is no
        `stop_reason`."""
        if stop_token is None:
            return None
        return stop_token if stop_token in self._call.sampling.stop_token_ids else None

    def _scores(
        self, ids: Sequence[int], offsets: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> tuple[TokenScore, ...]:
        return tuple(
            TokenScore(
                self._scored(token_id, entry.chosen),
                tuple(self._scored(other, logprob) for other, logprob in entry.top),
                offset,
                entry.rank,
            )
            for token_id, offset, entry in zip(ids, offsets, logprobs, strict=False)
        )

    def _scored(self, token_id: int, logprob: float) -> ScoredToken:
        found = self._texts.get(token_id)
        if found is None:
            if self._call.return_tokens_as_token_ids:
                text = f"token_id:{token_id}"
                found = text, text.encode()
            else:
                text = self._tokenizer.token_text(token_id)
                found = text, self._tokenizer.token_bytes(token_id, text)
            self._texts[token_id] = found
        return ScoredToken(token_id, *found, logprob)

    def _decode(self, ids: Sequence[int]) -> str:
        if self._skipped and self._call.skip_special_tokens:
            shown = [token_id for token_id in ids if token_id not in self._skipped]
            return self._tokenizer.decode(shown, skip_special_tokens=False)
        return self._tokenizer.decode(ids, self._call.skip_special_tokens)


def token_offsets(
    tokenizer: Tokenizer, prompt: TokenArray, text: str | None, decode: Decode
) -> list[int]:
    """Return the offset of each token of `prompt` [tokens], in characters of `text`, which it was
    made from; if `text` is None, of the text that `decode` returns for the tokens."""
    ids = prompt.tolist()
    if text is not None and (offsets := tokenizer.offsets(text, ids)) is not None:
        return offsets
    detokenizer = Detokenizer(decode, NO_TOKENS)
    offsets, length = [], 0
    for token_id in ids:
        offsets.append(length)
        length += len(detokenizer.push(token_id))
    return offsets
