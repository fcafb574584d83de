"""Traces, data sets and settings from mutants of valid ones: what they mean, or a ConfigError that
names file and line."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from memserve.errors import ConfigError
from memserve.flags import with_flags
from memserve.sim.run import SimConfig, simulate
from memserve.workloads.lines import read_lines
from memserve.workloads.loogle import read_loogle
from memserve.workloads.react import read_react
from memserve.workloads.session import SessionLimits
from memserve.workloads.sharegpt import choose_sessions, read_sharegpt
from memserve.workloads.trace import (
    BAILIAN,
    MAX_HASH_ID,
    MAX_LENGTH,
    MAX_TIMESTAMP,
    TraceLine,
    TraceScale,
    conversations,
    read_trace,
    token_requests,
)
from tests.fuzz.json_mutants import EXAMPLES, mutants

pytestmark = pytest.mark.timeout(0)  # as long as many examples take

LINE = {"timestamp": 3, "input_length": 700, "output_length": 4, "hash_ids": [0, 9]}
SIM = SimConfig(colocated=1, hbm_blocks=64, hardware="h100", model="llama-3-8b", tp=1)


def quiet(line: str) -> None:
    return


def words(text: str) -> int:
    return len(text.split())


T = TypeVar("T")


def tried(work: Callable[[], T]) -> T | ConfigError:
    try:
        return work()
    except ConfigError as error:
        return error


def is_one_line(error: ConfigError, path: Path) -> bool:
    text = str(error)
    return str(path) in text and "\n" not in text and len(text) < 600


def test_a_trace_is_read_and_simulated_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    config = msgspec.structs.replace(SIM, trace=str(path))
    first = msgspec.json.encode({**LINE, "timestamp": 0})
    read = refused = 0
    for line in mutants([LINE]):
        path.write_bytes(first + b"\n" + line)
        lines = tried(lambda: list(read_trace(path)))
        if isinstance(lines, ConfigError):
            refused += 1
            assert is_one_line(lines, path), line[:200]
            continue
        read += 1
        for request in token_requests(iter(lines), TraceScale(block_tokens=16)):
            assert request.prompt
            assert all(0 <= token < 2**31 for token in request.prompt[:64])
        if read % 20 == 1:  # a simulation takes as long as fifty lines
            result = tried(lambda: simulate(config, quiet))
            assert not isinstance(result, ConfigError) or "does not fit" in str(result)
    assert read > 20
    assert refused > 20


def test_a_trace_of_conversations_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    chat = {"chat_id": 7, "parent_chat_id": -1, "turn": 1, "type": "text"}
    read = 0
    for line in mutants([{**LINE, **chat, "timestamp": 0.5, "input_length": 30}]):
        path.write_bytes(line)
        lines = tried(lambda: list(read_trace(path, form=BAILIAN)))
        if isinstance(lines, ConfigError):
            assert is_one_line(lines, path), line[:200]
            continue
        read += 1
        assert len(list(conversations(lines))) == len(lines)
        for request in token_requests(lines, TraceScale(16, trace_block_tokens=16)):
            assert request.prompt
            assert all(0 <= token < 32_000 for token in request.prompt[:64])
    assert read > 20


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"timestamp": -1}, "timestamp"),
        ({"timestamp": MAX_TIMESTAMP + 1}, "timestamp"),
        ({"input_length": 0}, "input_length"),
        ({"input_length": -5}, "input_length"),
        ({"input_length": MAX_LENGTH + 1}, "input_length"),
        ({"input_length": 1025}, "2 hash ids for 1025 tokens"),
        ({"output_length": -1}, "output_length"),
        ({"hash_ids": []}, "hash_ids"),
        ({"hash_ids": [-1, 2]}, "hash_ids"),
        ({"hash_ids": [MAX_HASH_ID + 1, 2]}, "hash_ids"),  # 2^63
        ({"hash_ids": [2**64 + 5, 2]}, "hash_ids"),
        ({"hash_ids": [10**40, 2]}, "hash_ids"),
        ({"hash_ids": [1, 2, 3]}, "3 hash ids for 700 tokens, each of 512: 2 fit"),
        ({"timestamp": -0.5}, "timestamp"),
        ({"timestamp": 0}, "before the last one"),
    ],
)
def test_lines_that_no_trace_has_are_named(tmp_path: Path, line: dict[str, Any], said: str) -> None:
    path = tmp_path / "trace.jsonl"
    good = msgspec.json.encode(LINE)
    path.write_bytes(good + b"\n\n" + msgspec.json.encode({**LINE, **line}) + b"\n")
    with pytest.raises(ConfigError, match=said) as refused:
        list(read_trace(path))
    assert f"{path}:3: " in str(refused.value)
    assert len(list(read_trace(path, limit=1))) == 1


@pytest.mark.parametrize("data", [b"\xff\xfe\n", b"[" * 5000, b"\x00", b"a" * 3000, b"NaN"])
def test_what_is_no_json_at_all(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as refused:
        list(read_trace(path))
    assert is_one_line(refused.value, path)


def test_a_line_without_an_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b" " * 5000)
    with pytest.raises(ConfigError, match="more than 4096 bytes"):
        list(read_lines(path, TraceLine, most=4096))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", Path("a\x00b"), Path("/proc/self/mem")):
        with pytest.raises(ConfigError):
            list(read_trace(path))
    for empty in (b"", b"\n\n"):
        (tmp_path / "empty").write_bytes(empty)
        with pytest.raises(ConfigError, match="no requests"):
            simulate(msgspec.structs.replace(SIM, trace=str(tmp_path / "empty")), quiet)


def test_sharegpt_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    said = [{"from": "human", "value": "b c d e"}, {"from": "gpt", "value": "f"}]
    records = [{"id": "a", "conversations": said}, {"id": "b", "conversations": []}]
    read = 0
    for body in mutants([records], EXAMPLES // 4):
        path.write_bytes(body)
        chosen = tried(lambda: choose_sessions(read_sharegpt(path), 0, 0, SessionLimits(), words))
        read += not isinstance(chosen, ConfigError)
        assert not isinstance(chosen, ConfigError) or is_one_line(chosen, path), body[:200]
    assert read > 20


def test_loogle_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    record = {
        "input": "text",
        "title": "t",
        "output": "",
        "qa_pairs": "[{'Q': 'a', 'A': {'m': 1}}]",
    }
    wrong = ["[" * 500, "5", "[5]", "[{'Q': 1, 'A': 2}]", "[]", "{}", "a", "\x00", "1" * 5000,
             "-" * 100_000 + "1", "[{'Q': 'a'}]", "None", "'none'", "[*a]"]  # fmt: skip
    for pairs in wrong:
        path.write_bytes(msgspec.json.encode({**record, "qa_pairs": pairs}))
        with pytest.raises(ConfigError) as refused:
            list(read_loogle(path))
        assert is_one_line(refused.value, path), pairs[:80]
    read = 0
    for body in mutants([record], EXAMPLES // 4):
        path.write_bytes(body)
        found = tried(lambda: list(read_loogle(path)))
        if isinstance(found, ConfigError):
            assert is_one_line(found, path), body[:200]
        else:
            read += 1
            assert all(document.questions for document in found)
    assert read > 20


def test_react_is_read_or_refused(tmp_path: Path) -> None:
    prompts, runs = tmp_path / "fever_prompt.json", tmp_path / "a_trajectories.jsonl"
    step = {"thought": "t", "action": "a", "observation": "o"}
    run = {"id": 1, "question": "q", "steps": [step, step]}
    read = 0
    for number, body in enumerate(mutants([run], EXAMPLES // 4)):
        prompts.write_bytes(b'{"webthink_simple3": "examples"}')
        runs.write_bytes(body)
        if number % 5 == 0:
            prompts.write_bytes(body)
        found = tried(lambda: list(read_react(tmp_path)))
        read += not isinstance(found, ConfigError)
        assert not isinstance(found, ConfigError) or is_one_line(found, tmp_path), body[:200]
    assert read > 20


def test_settings_are_numbers_that_machines_have(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(msgspec.json.encode(LINE))
    good = msgspec.structs.replace(SIM, trace=str(path))
    simulate(good, quiet)
    choice = random.Random(1)
    values = ("nan", "inf", "-inf", "-1", "0", "1e-320", "1e308", "1" + "0" * 30, "1" + "0" * 400,
              "2", "0.5", "x", "", "4097", "\x00", "\ud800", "1_0", "true")  # fmt: skip
    names = [n for n in SimConfig.__struct_fields__ if n not in ("tokenizer", "trace")]
    simulated = 0
    for _ in range(EXAMPLES // 4):
        given = {name: choice.choice(values) for name in choice.sample(names, choice.randint(1, 2))}
        config = tried(lambda given=given: with_flags(good, given))
        if not isinstance(config, ConfigError):
            if config.colocated + config.prefill + config.decode > 64:
                config = msgspec.structs.replace(config, colocated=1, prefill=0, decode=0)
            result = tried(lambda config=config: simulate(config, quiet))
            simulated += not isinstance(result, ConfigError)
            assert not isinstance(result, ConfigError) or "\n" not in str(result), given
    assert simulated
