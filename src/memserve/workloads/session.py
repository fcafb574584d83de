"""The types of a workload: sessions of turns, each with the output length that it asks for.

A session is one user. Its turns run one after the other, because each prompt contains the
answers before it. Sessions are independent of each other, but may begin with the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from memserve.errors import ConfigError

CountTokens = Callable[[str], int]

# Least tokens of a prompt or answer: shorter ones are mostly broken records (as in vLLM's
# benchmark).
MIN_TOKENS = 4
# Most tokens that a chat template adds around one message: role, separators, <bos>.
TEMPLATE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session."""

    prompt: str  # the text behind the earlier turns' prompts and answers
    answer: str  # the data's answer to the prompt; empty if the data has none
    output_tokens: int  # tokens to generate: the answer's length, clamped


@dataclass(frozen=True, slots=True)
class Session:
    """One user's requests, one after the other."""

    id: str
    turns: tuple[Turn, ...]
    chat: bool = True  # True: turns are chat messages; False: turns extend one text


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A request whose prompt is token ids, with its arrival time."""

    id: str
    arrival: float  # seconds since the start
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """The limits of a session; a longer one is cut after its last turn that fits."""

    min_turns: int = 1
    max_turns: int = 8
    max_output_tokens: int = 256  # per turn; the data's length is clamped to it
    max_context_tokens: int = 4096  # all prompts and outputs of the session together


@dataclass(frozen=True, slots=True)
class Exchange:
    """A user's prompt and the answer in the data."""

    prompt: str
    answer: str


def fitting_turns(
    exchanges: Sequence[Exchange],
    limits: SessionLimits,
    count_tokens: CountTokens,
    min_answer_tokens: int = MIN_TOKENS,
) -> tuple[Turn, ...]:
    """Return the first exchanges as turns, as many as the limits allow."""
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
    """Return the start of `text`: at most `tokens` tokens, and not many fewer."""
    count = count_tokens(text)
    while count > tokens:
        # Tokens differ in length, so a cut in proportion may leave too many: repeat.
        text = text[: min(len(text) - 1, len(text) * tokens // count)]
        count = count_tokens(text)
    return text


def open_data(path: Path) -> IO[bytes]:
    """Open a data file for reading. Raises ConfigError if that fails."""
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in its name
        raise ConfigError(f"{str(path)!r}: {error}") from error


def data_files(path: Path, pattern: str) -> Iterator[Path]:
    """Yield `path`, or if it is a folder its files that match `pattern`, in order of their names.
    Raises ConfigError, also for a folder without such files."""
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
