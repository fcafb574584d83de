"""The public data sets become sessions and prompts of the right shape."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pytest

from memserve.errors import ConfigError
from memserve.workloads.loogle import loogle_sessions, read_loogle
from memserve.workloads.react import react_sessions, read_react
from memserve.workloads.session import SessionLimits, TokenRequest, cut_to_tokens
from memserve.workloads.synthetic import SharedPrefixes, shared_prefix_requests
from memserve.workloads.trace import TraceLine, TraceScale, read_trace, token_requests


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture
def data() -> Path:
    folder = os.environ.get("MEMSERVE_DATA")
    if folder is None:
        pytest.skip("set MEMSERVE_DATA to the folder of the workload data")
    return Path(folder)


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(map(len, (a, b)))
    )


def test_readers_of_a_document_share_it_and_ask_their_own_questions(data: Path) -> None:
    limits = SessionLimits(max_turns=3, max_output_tokens=24, max_context_tokens=1000)
    sessions = loogle_sessions(read_loogle(data / "loogle"), 40, 0, limits, words)
    again = loogle_sessions(read_loogle(data / "loogle"), 40, 0, limits, words)
    assert sessions == again
    assert len(sessions) >= 35
    by_document: dict[str, list[str]] = {}
    for session in sessions:
        text = session.turns[0].prompt
        by_document.setdefault(text[:200], []).append(text)
        assert words("".join(turn.prompt for turn in session.turns)) <= 1000
        assert words(text) > 400
        assert all(1 <= turn.output_tokens <= 24 for turn in session.turns)
    shared = [texts for texts in by_document.values() if len(texts) > 1]
    assert shared
    for texts in shared:
        assert len({text.split("\n\n")[0] for text in texts}) == 1
    assert any(len(set(texts)) > 1 for texts in shared)


def test_runs_of_an_agent_begin_alike_and_grow(data: Path) -> None:
    limits = SessionLimits(min_turns=2, max_turns=5, max_context_tokens=4000)
    sessions = react_sessions(read_react(data / "react"), 500, 1, limits, words)
    assert len(sessions) == 500  # more than the data has
    assert len({session.id for session in sessions}) > 250
    examples = {session.turns[0].prompt.split("\nClaim:")[1] for session in sessions}
    assert len(examples) == 1
    for session in sessions:
        assert not session.chat
        assert 2 <= len(session.turns) <= 5
        assert session.turns[0].prompt.endswith("Thought 1:")
        assert session.turns[1].prompt.startswith("\nObservation 1:")


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \*\.jsonl"):
        list(read_loogle(tmp_path))
    with pytest.raises(ConfigError, match=r"fever_prompt\.json"):
        list(read_react(tmp_path))
    (tmp_path / "bad.jsonl").write_text('{"input": "a", "title": "t", "qa_pairs": "[{"}\n')
    with pytest.raises(ConfigError, match=r"bad\.jsonl:1"):
        list(read_loogle(tmp_path))


def test_prompts_of_a_trace_share_what_its_hashes_share() -> None:
    scale = TraceScale(block_tokens=8, vocabulary=50)
    line = TraceLine(timestamp=1500, input_length=1200, output_length=64, hash_ids=(0, 1, 51))
    other = TraceLine(timestamp=1500, input_length=1536, output_length=64, hash_ids=(0, 1, 101))
    first, second = token_requests(iter((line, other)), scale)
    assert first.arrival == 1.5
    assert first.output_tokens == 1
    assert len(first.prompt) == 1200 * 8 // 512
    assert common(first.prompt, second.prompt) in range(16, 18)
    assert first.prompt[16:18] != second.prompt[16:18]  # ids that differ by the vocabulary


def test_the_conversation_trace_reuses_what_its_publishers_say(data: Path) -> None:
    seen: set[int] = set()
    blocks = hits = 0
    for line in read_trace(data / "mooncake" / "conversation_trace.jsonl"):
        blocks += len(line.hash_ids)
        hits += len(seen.intersection(line.hash_ids))
        seen.update(line.hash_ids)
    assert hits / blocks == pytest.approx(0.366, abs=0.002)
    short = list(islice(read_trace(data / "mooncake" / "conversation_trace.jsonl", 3), 5))
    assert [line.hash_ids[0] for line in short] == [0, 0, 0]


def test_synthetic_prompts_share_their_groups_prefix() -> None:
    shape = SharedPrefixes(requests=30, groups=3, prefix_tokens=20, suffix_tokens=5, rate=10.0)
    requests: list[TokenRequest] = list(shared_prefix_requests(shape, 7))
    assert requests == list(shared_prefix_requests(shape, 7))
    assert len({request.prompt[:20] for request in requests}) == 3
    assert len({request.prompt for request in requests}) == 30
    arrivals = [request.arrival for request in requests]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(3.0, rel=0.6)


def test_text_is_cut_close_to_the_limit() -> None:
    text = " ".join(str(number) for number in range(1000))
    cut = cut_to_tokens(text, 300, words)
    assert 270 <= words(cut) <= 300
    assert text.startswith(cut)
    assert cut_to_tokens("a b", 5, words) == "a b"
