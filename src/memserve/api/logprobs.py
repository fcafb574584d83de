"""Log-probabilities of tokens, in the forms that OpenAI's and vLLM's answers have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

LOWEST_LOGPROB = -9999.0  # JSON has no infinity; the value that vLLM uses


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log-probability. `bytes`: the UTF-8 bytes that it adds to the text, which
    may be only a part of a character; `text` cannot show that part."""

    id: int
    text: str
    bytes: bytes
    logprob: float

    @property
    def name(self) -> str:
        """The token's text, or, if that is not exactly `bytes`, these in OpenAI's notation."""
        if self.text.encode() == self.bytes:
            return self.text
        return "bytes:" + "".join(f"\\x{value:02x}" for value in self.bytes)


@dataclass(frozen=True, slots=True)
class TokenScore:
    """Log-probabilities at one position: the chosen token, and the most probable ones. `offset`:
    of the chosen token in the text of its choice, in characters. `rank`: of the chosen token, 1
    for the most probable one; None: it has no log-probability, as the first token of a prompt.
    """

    chosen: ScoredToken
    top: tuple[ScoredToken, ...]
    offset: int
    rank: int | None


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatTokenLogprob]


class CompletionLogprobs(msgspec.Struct, frozen=True):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(msgspec.Struct, frozen=True):
    """One token at a position of a prompt, in vLLM's form."""

    logprob: float
    rank: int
    decoded_token: str


# One for each prompt token, by token id.
PromptLogprobs = list[dict[int, PromptLogprob] | None]


def by_id(score: TokenScore, count: int) -> dict[int, PromptLogprob] | None:
    """Return the log-probabilities of a prompt's token and of the `count` most probable ones."""
    if score.rank is None:
        return None
    tokens = {
        score.chosen.id: PromptLogprob(_finite(score.chosen.logprob), score.rank, score.chosen.text)
    }
    for rank, token in enumerate(score.top[:count], 1):
        tokens.setdefault(token.id, PromptLogprob(_finite(token.logprob), rank, token.text))
    return tokens


def chat_logprobs(scores: Sequence[TokenScore]) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                score.chosen.text,
                _finite(score.chosen.logprob),
                list(score.chosen.bytes),
                [
                    TopLogprob(token.text, _finite(token.logprob), list(token.bytes))
                    for token in score.top
                ],
            )
            for score in scores
        ]
    )


def completion_logprobs(scores: Sequence[TokenScore]) -> CompletionLogprobs:
    return CompletionLogprobs(
        text_offset=[score.offset for score in scores],
        token_logprobs=[
            None if score.rank is None else _finite(score.chosen.logprob) for score in scores
        ],
        tokens=[score.chosen.name for score in scores],
        top_logprobs=[_by_name(score) for score in scores],
    )


def _by_name(score: TokenScore) -> dict[str, float] | None:
    """Return log-probabilities by token name, the chosen token's first. A further token with the
    name of an earlier one is named `token_id:<id>`, vLLM's notation."""
    if score.rank is None:
        return None
    named = {score.chosen.name: _finite(score.chosen.logprob)}
    for token in score.top:
        if token.id != score.chosen.id:
            name = token.name if token.name not in named else f"token_id:{token.id}"
            named[name] = _finite(token.logprob)
    return named


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
