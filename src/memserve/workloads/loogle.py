"""LooGLE: questions about long documents. Long shared prompts, short answers.

A session is one reader of one document, who asks a few of its questions in a row. Several
sessions may read one document, and then share their longest part.
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

# Tokens of a session's context that are reserved for each question.
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


# The errors of `ast.literal_eval`, and of converting its result, for a malformed text.
_NO_QUESTIONS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and the questions about it with their answers."""

    title: str
    text: str
    questions: tuple[Exchange, ...]


def read_loogle(path: Path) -> Iterator[Document]:
    """Yield the documents of a LooGLE file (JSON lines), or of all `*.jsonl` in a folder.

    Raises ConfigError for other files.
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
    """Return up to `count` sessions; the seed decides their documents and questions.

    Documents are cut so that `max_turns` questions fit; a session of which no turn fits is left
    out. Raises ConfigError without documents, or if the limits leave no room for one.
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
    """Return an answer as text: the answer to a cloze question is a dictionary of masks."""
    return answer if isinstance(answer, str) else str(answer)
