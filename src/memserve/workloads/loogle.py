"""LooGLE: questions about long documents. Long shared prompts, short answers.

A session is one reader of one document: a few of its questions in a row. Several sessions read
the same document, so that sessions share their longest part.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import msgspec

from memserve.errors import ConfigError
from memserve.workloads.lines import read_lines, shown
from memserve.workloads.session import (
    TEMPLATE_TOKENS,
    CountTokens,
    Exchange,
    Session,
    SessionLimits,
    cut_to_tokens,
    data_files,
    fitting_turns,
)

# Of a session's context, kept for questions and answers.
_QUESTION_TOKENS = 64
_SUMMARY = "Write a summary of the text above."


class _Record(msgspec.Struct):
    input: str
    title: str
    qa_pairs: str
    output: str = ""


class _Question(TypedDict):
    Q: str
    A: object


# How Python's own parser, and what it is turned into, can fail on a text.
_NO_QUESTIONS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and what is asked about it."""

    title: str
    text: str
    questions: tuple[Exchange, ...]


def read_loogle(path: Path) -> Iterator[Document]:
    """The documents of a LooGLE file (JSON lines), or of all `*.jsonl` in a folder.

    Raises ConfigError for what is no such file.
    """
    for file in data_files(path, "*.jsonl"):
        for number, record in read_lines(file, _Record):
            try:
                questions = _questions(record)
            except _NO_QUESTIONS as error:
                raise ConfigError(f"{file}:{number}: qa_pairs: {shown(error)}") from error
            if not questions:
                raise ConfigError(f"{file}:{number}: qa_pairs: no questions")
            yield Document(record.title, record.input, questions)


def loogle_sessions(
    documents: Iterator[Document],
    count: int,
    seed: int,
    limits: SessionLimits,
    count_tokens: CountTokens,
) -> tuple[Session, ...]:
    """`count` readers, each of a document and with questions that the seed decides.

    Documents are cut so that `max_turns` questions fit. Raises ConfigError without documents.
    """
    choice = random.Random(seed)
    found = list(documents)
    if not found:
        raise ConfigError("no documents in the data")
    per_turn = _QUESTION_TOKENS + limits.max_output_tokens + 2 * TEMPLATE_TOKENS
    room = limits.max_context_tokens - limits.max_turns * per_turn
    if room < _QUESTION_TOKENS:
        raise ConfigError(
            f"{limits.max_turns} questions leave {room} of {limits.max_context_tokens} tokens "
            "for the document"
        )
    texts: dict[str, str] = {}
    sessions = []
    for index in range(count):
        document = choice.choice(found)
        if document.title not in texts:
            texts[document.title] = cut_to_tokens(document.text, room, count_tokens)
        asked = min(limits.max_turns, len(document.questions))
        questions = choice.sample(document.questions, asked)
        first = questions[0]
        opening = f"{texts[document.title]}\n\n{first.prompt}"
        exchanges = [Exchange(opening, first.answer), *questions[1:]]
        turns = fitting_turns(exchanges, limits, count_tokens, min_answer_tokens=1)
        if turns:
            sessions.append(Session(f"{document.title}-{index}", turns))
    return tuple(sessions)


def _questions(record: _Record) -> tuple[Exchange, ...]:
    if record.qa_pairs == "none":
        return (Exchange(_SUMMARY, record.output),)
    pairs = msgspec.convert(ast.literal_eval(record.qa_pairs), list[_Question])
    return tuple(Exchange(pair["Q"], _text(pair["A"])) for pair in pairs)


def _text(answer: object) -> str:
    """Cloze questions are answered by a dictionary of masks."""
    return answer if isinstance(answer, str) else str(answer)
