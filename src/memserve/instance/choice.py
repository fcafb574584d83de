"""One choice of an answer: engine outputs in, pieces of text out."""

from __future__ import annotations

from collections.abc import Sequence

from memserve.api.chunks import Piece, TokenScore
from memserve.api.detokenizer import Detokenizer
from memserve.api.generate import FinishReason, GenerateCall
from memserve.api.stop_strings import StopStrings
from memserve.engine.request import TokenLogprobs, TokenOutput
from memserve.models.tokenizer import Tokenizer


class Choice:
    """Detokenises one sequence and ends it at a stop string.

    After a piece with `finish_reason` the choice is over, even where the engine does not know
    yet: the owner cancels the sequence then.
    """

    def __init__(
        self, index: int, call: GenerateCall, tokenizer: Tokenizer, prompt: Sequence[int]
    ) -> None:
        self.index = index
        self.started = False
        self.finished = False
        self.tokens = 0  # generated so far
        self.cached_tokens = 0  # of the prompt
        self._call = call
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(self._decode, prompt)
        self._stops = StopStrings(call.stop, call.include_stop_str_in_output) if call.stop else None
        self._lead = self._decode(prompt) if call.echo else ""
        self._text_offset = len(self._lead)

    def feed(self, output: TokenOutput) -> Piece:
        """What an output adds. A stop string drops the tokens that came after it."""
        if not self.started:
            # What comes later may have gone on from KV that somebody computed for this answer.
            self.cached_tokens = output.usage.cached_tokens
        self.started = True
        text, self._lead = [self._lead], ""
        stop: str | None = None
        ids = output.token_ids
        silent = output.stop_token is not None and not self._call.include_stop_str_in_output
        for position, token_id in enumerate(ids):
            self.tokens += 1
            if silent and position == len(ids) - 1:
                break
            new, stop = self._search(self._detokenizer.push(token_id))
            text.append(new)
            if stop is not None:
                ids = ids[: position + 1]
                break
        reason = output.finish_reason
        if stop is None and reason is not None:
            rest, stop = self._search(self._detokenizer.flush())
            text.append(rest)
            if stop is None and self._stops is not None:
                text.append(self._stops.flush())
        if stop is not None:
            reason = FinishReason.STOP
        self.finished = reason is not None
        scores = self._scores(ids, output.logprobs)
        offset = self._text_offset
        self._text_offset += sum(len(score.token) for score in scores)
        return Piece(
            choice=self.index,
            text="".join(text),
            token_ids=ids,
            scores=scores,
            text_offset=offset,
            finish_reason=reason,
            stop_reason=stop if stop is not None else self._named(output.stop_token),
        )

    def _search(self, text: str) -> tuple[str, str | None]:
        # As in vLLM, what min_tokens forces out is not searched.
        if self._stops is None or not text or self.tokens <= self._call.sampling.min_tokens:
            return text, None
        return self._stops.push(text)

    def _named(self, stop_token: int | None) -> int | None:
        """The stop token if the client named it; the model's own end token needs no reason."""
        return stop_token if stop_token in self._call.sampling.stop_token_ids else None

    def _scores(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> tuple[TokenScore, ...]:
        if not logprobs:
            return ()
        text = self._tokenizer.token_text
        return tuple(
            TokenScore(
                text(token_id),
                entry.chosen,
                tuple((text(other), logprob) for other, logprob in entry.top),
            )
            for token_id, entry in zip(ids, logprobs, strict=False)
        )

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._call.skip_special_tokens)
