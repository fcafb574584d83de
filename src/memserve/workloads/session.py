"""What a workload is made of: sessions of turns, with the output length each turn asks for.

A session is one user; its turns are causally ordered, because each prompt contains the answers
before it. Sessions are independent of each other, but may begin with the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from memserve.errors import ConfigError

CountTokens = Callable[[str], int]

# Shorter prompts and answers are mostly broken records (the rule of vLLM's benchmark).
MIN_TOKENS = 4
# What a chat template may add around one message: role, separators, <bos>.
TEMPLATE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session."""

    prompt: str  # what comes behind the turns before
    answer: str  # the data's answer to it; empty where the data has none
    output_tokens: int  # what to generate: the answer's length in tokens, clamped


@dataclass(frozen=True, slots=True)
class Session:
    """One user's requests, one after the other."""

    id: str
    turns: tuple[Turn, ...]
    chat: bool = True  # messages of a chat; else one text that grows


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A request whose prompt is token ids, with the time at which it arrives."""

    id: str
    arrival: float  # seconds since the start
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What a session may be; a longer one is cut after its last turn that fits."""

    min_turns: int = 1
    max_turns: int = 8
    max_output_tokens: int = 256  # per turn; the data's length is clamped to it
    max_context_tokens: int = 4096  # all prompts and outputs of the session together


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a user said and what the data's model answered."""

    prompt: str
    answer: str


def fitting_turns(
    exchanges: Sequence[Exchange],
    limits: SessionLimits,
    count_tokens: CountTokens,
    min_answer_tokens: int = MIN_TOKENS,
) -> tuple[Turn, ...]:
    """The first exchanges, as many as the limits allow, as turns."""
    turns: list[Turn] = []
    context = 0
    for exchange in exchanges[: limits.max_turns]:
        prompt_tokens = count_tokens(exchange.prompt)
        answer_tokens = count_tokens(exchange.answer)
        if prompt_tokens < MIN_TOKENS or answer_tokens < min_answer_tokens:
            break
        output_tokens = min(answer_tokens, limits.max_output_tokens)
        context += prompt_tokens + output_tokens + 2 * TEMPLATE_TOKENS
        if context > limits.max_context_tokens:
            break
        turns.append(Turn(exchange.prompt, exchange.answer, output_tokens))
    return tuple(turns)


def cut_to_tokens(text: str, tokens: int, count_tokens: CountTokens) -> str:
    """The start of `text`, of at most so many tokens and not much fewer."""
    count = count_tokens(text)
    while count > tokens:
        # Tokens are not spread evenly: each round comes closer, from above.
        text = text[: min(len(text) - 1, len(text) * tokens // count)]
        count = count_tokens(text)
    return text


def open_data(path: Path) -> IO[bytes]:
    """Raises ConfigError for a file that cannot be read."""
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in its name
        raise ConfigError(f"{str(path)!r}: {error}") from error


def data_files(path: Path, pattern: str) -> Iterator[Path]:
    """`path` itself, or the files in it whose names match, in order. Raises ConfigError."""
    try:
        files = sorted(path.glob(pattern)) if path.is_dir() else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r}: {error}") from error
    if files is None:
        yield path
        return
    if not files:
        raise ConfigError(f"{path}: no {pattern} in it")
    yield from files
