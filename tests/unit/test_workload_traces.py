"""Traces: formats, lengths that fit their hash ids, and prompts that share what the ids share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.errors import ConfigError
from memserve.sim.run import SimConfig, simulate
from memserve.workloads.trace import (
    BAILIAN,
    MAX_HASH_ID,
    MOONCAKE,
    TracedChat,
    TraceLine,
    TracePrompts,
    TraceScale,
    conversations,
    read_trace,
    token_requests,
    trace_format,
)

SIM = SimConfig(colocated=1, hbm_blocks=64, hardware="h100", model="llama-3-8b", tp=1)


def line(*ids: int, tokens: int | None = None) -> TraceLine:
    return TraceLine(0, len(ids) * 512 if tokens is None else tokens, 4, ids)


def save(path: Path, *records: Mapping[str, object]) -> Path:
    path.write_bytes(b"\n".join(map(msgspec.json.encode, records)))
    return path


def mooncake(at: float, tokens: int, ids: Sequence[int]) -> dict[str, object]:
    return {"timestamp": at, "input_length": tokens, "output_length": 4, "hash_ids": ids}


def bailian(
    at: float, tokens: int, ids: Sequence[int], chat: int, parent: int = -1
) -> dict[str, object]:
    return {
        **mooncake(at, tokens, ids),
        "chat_id": chat,
        "parent_chat_id": parent,
        "type": "text",
        "turn": 1,
    }


def quiet(text: str) -> None:
    return


@pytest.mark.parametrize(
    ("tokens", "ids", "said"),
    [
        (2000, [7], "1 hash ids for 2000 tokens, each of 512: 4 fit"),
        (512, [7, 8], "2 hash ids for 512 tokens, each of 512: 1 fit"),
        (1, [], "hash_ids"),
    ],
)
def test_a_length_that_its_hash_ids_do_not_fit_is_refused(
    tmp_path: Path, tokens: int, ids: list[int], said: str
) -> None:
    path = save(tmp_path / "t.jsonl", mooncake(0, tokens, ids))
    with pytest.raises(ConfigError, match=said):
        list(read_trace(path))
    with pytest.raises(ConfigError, match=said):
        simulate(msgspec.structs.replace(SIM, trace=str(path)), quiet)


def test_times_may_be_fractions_and_lines_empty(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    first, second = (msgspec.json.encode(mooncake(at, 5, [1])) for at in (0.25, 1500.75))
    path.write_bytes(b"\n  \n" + first + b"\n\n" + second + b"\n\n")
    assert [one.timestamp for one in read_trace(path)] == [0.25, 1500.75]
    assert [one.arrival for one in token_requests(read_trace(path), TraceScale())] == [
        0.00025,
        1.50075,
    ]


@pytest.mark.parametrize("vocabulary", [2, 3, 1000, 32_000])
def test_ids_that_are_equal_by_any_modulus_share_nothing(vocabulary: int) -> None:
    """32000 * 2^32 is a multiple of every modulus in use, and of the width of an int32."""
    prompts = TracePrompts(TraceScale(block_tokens=40, vocabulary=vocabulary))
    ids = (5, 5 + 32_000 * 2**32, 5 + 2**32, 5 + 32_000, MAX_HASH_ID)
    found = [tuple(prompts.of(line(one)).tolist()) for one in ids]
    assert len(set(found)) == len(ids)
    assert tuple(prompts.of(line(5)).tolist()) == found[0]
    assert all(0 <= token < vocabulary for prompt in found for token in prompt)


@given(
    st.lists(st.lists(st.integers(0, MAX_HASH_ID), min_size=1, max_size=5), max_size=20),
    st.integers(2, 40),
    st.sampled_from([2**16, 2**17, 50_257]),
)
def test_prompts_share_exactly_the_blocks_that_ids_share(
    traced: list[list[int]], block_tokens: int, vocabulary: int
) -> None:
    prompts = TracePrompts(TraceScale(block_tokens=block_tokens, vocabulary=vocabulary))
    blocks: dict[int, tuple[int, ...]] = {}
    for ids in traced:
        tokens = prompts.of(line(*ids)).tolist()
        assert len(tokens) == len(ids) * block_tokens
        assert 0 <= min(tokens) <= max(tokens) < vocabulary
        for at, one in enumerate(ids):
            block = tuple(tokens[at * block_tokens : (at + 1) * block_tokens])
            assert blocks.setdefault(one, block) == block
    assert len(set(blocks.values())) == len(blocks)


def test_more_blocks_than_tokens_can_tell_apart_are_refused() -> None:
    prompts = TracePrompts(TraceScale(block_tokens=2, vocabulary=3))
    prompts.of(line(*range(9)))
    with pytest.raises(ConfigError, match="cannot tell 10 blocks"):
        prompts.of(line(9))


def test_bailians_format_is_found_by_its_fields(tmp_path: Path) -> None:
    path = save(
        tmp_path / "b.jsonl",
        bailian(0.5, 32, [1, 2], chat=10),
        bailian(61.114, 50, [1, 2, 3, 4], chat=11, parent=10),
        bailian(62, 33, [8, 9], chat=12),  # its last block, of one token, has no id
        bailian(63, 32, [1, 2, 5], chat=13, parent=11),  # the answer's first block has one
    )
    assert trace_format(path) is BAILIAN
    lines = list(read_trace(path, form=BAILIAN))
    assert all(isinstance(one, TracedChat) for one in lines)
    assert [one.timestamp for one in lines] == [500, 61114, 62000, 63000]
    assert [name for name, _ in conversations(lines)] == [
        "trace-0",
        "trace-0",
        "trace-2",
        "trace-0",
    ]
    scale = TraceScale(16, trace_block_tokens=16)
    found = [request.prompt for request in token_requests(lines, scale)]
    assert [len(prompt) for prompt in found] == [32, 50, 33, 32]
    assert found[1][:32] == found[0] == found[3]
    # Half as long at half the block size.
    half = list(token_requests(lines, TraceScale(8, trace_block_tokens=16)))
    assert [len(request.prompt) for request in half] == [16, 25, 16, 16]


def test_a_tail_without_an_id_is_shared_with_nobody() -> None:
    prompts = TracePrompts(TraceScale(16, trace_block_tokens=16))
    first, second = (prompts.of(line(8, 9, tokens=40)).tolist() for _ in range(2))
    assert first[:32] == second[:32]
    assert first[32:] != second[32:]


def test_a_format_that_is_given_counts(tmp_path: Path) -> None:
    old = save(tmp_path / "m.jsonl", mooncake(0, 600, [1, 2]))
    assert trace_format(old) is MOONCAKE
    assert trace_format(old, "bailian") is BAILIAN
    with pytest.raises(ConfigError, match="chat_id"):
        list(read_trace(old, form=BAILIAN))
    new = save(tmp_path / "b.jsonl", bailian(0, 600, [1, 2], chat=1))
    assert trace_format(new, "mooncake") is MOONCAKE
    wrong = save(tmp_path / "w.jsonl", bailian(0, 600, [1, 2], chat=1))
    with pytest.raises(ConfigError, match="2 hash ids for 600 tokens, each of 16: 38 fit"):
        list(read_trace(wrong, form=BAILIAN))


def test_bailians_traces_are_simulated_in_their_blocks(tmp_path: Path) -> None:
    ids = list(range(20))
    path = save(
        tmp_path / "b.jsonl",
        bailian(0, 320, ids, chat=1),
        bailian(100, 640, [*ids, *range(100, 120)], chat=2, parent=1),
    )
    result = simulate(msgspec.structs.replace(SIM, trace=str(path)), quiet)
    assert (result.requests, result.prompt_tokens) == (2, 960)
    assert result.cached_ratio == 320 / 960


def test_a_request_that_memory_has_no_room_for_is_refused_and_counted(tmp_path: Path) -> None:
    """A server answers it with 400, and the others as if it had not been there."""
    room = 3 * 512
    lines = [mooncake(0, 512, [1]), mooncake(1, room - 3, [1, 2, 3]), mooncake(2, 520, [1, 4])]
    config = msgspec.structs.replace(SIM, hbm_blocks=3, dram_gb=0.0)
    long = save(tmp_path / "long.jsonl", *lines)
    with_it = simulate(msgspec.structs.replace(config, trace=str(long)), quiet)
    short = save(tmp_path / "short.jsonl", lines[0], lines[2])
    without = simulate(msgspec.structs.replace(config, trace=str(short)), quiet)
    assert (with_it.requests, with_it.refused) == (2, 1)
    assert msgspec.structs.replace(with_it, refused=0) == without
    fits = save(tmp_path / "fits.jsonl", lines[0], mooncake(1, room - 4, [1, 2, 3]))
    assert simulate(msgspec.structs.replace(config, trace=str(fits)), quiet).refused == 0
    only = save(tmp_path / "only.jsonl", lines[1])
    with pytest.raises(ConfigError, match="1537 tokens, does not fit into KV memory of 1536"):
        simulate(msgspec.structs.replace(config, trace=str(only)), quiet)
