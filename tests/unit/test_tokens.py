"""Tokens: what becomes int32 without loss, and nothing else; and their bytes between processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memserve.errors import InvalidTokens
from memserve.tokens import as_tokens, from_ids, from_wire, to_wire, token_field


def test_int32_arrays_are_taken_as_they_are() -> None:
    tokens = np.arange(5, dtype=np.int32)
    assert as_tokens(tokens) is tokens


@pytest.mark.parametrize(
    "tokens",
    [
        [0, 1, 2**31 - 1],
        (0, 1, 2**31 - 1),
        np.array([0, 1, 2**31 - 1], dtype=np.int64),
        np.array([0, 1, 2**31 - 1], dtype=np.uint32),
        np.array([0, 1, 2**31 - 1], dtype=">i4"),
        torch.tensor([0, 1, 2**31 - 1]),
    ],
)
def test_integers_of_any_kind_become_int32(tokens: object) -> None:
    converted = as_tokens(tokens)  # type: ignore[arg-type]
    assert converted.dtype == np.int32
    assert converted.tolist() == [0, 1, 2**31 - 1]


def test_no_tokens_are_tokens() -> None:
    assert as_tokens([]).dtype == np.int32


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 2**31], "token 2147483648 at position 2"),
        ([-(2**31) - 1], "token -2147483649 at position 0"),
        (np.array([7, 2**32 - 1], dtype=np.uint32), "token 4294967295 at position 1"),
        ([1, 2**70], f"token {2**70} at position 1"),
        ([1, 2.5], "float64.*2.5 at position 1"),
        (np.ones(3, dtype=np.float32), "float32"),
        ([True, False], "bool"),
        ([1, None], "None at position 1"),
        (["a"], "'a'"),
        ([[1, 2], [3, 4]], r"shape \(2, 2\)"),
        ([[1, 2], [3]], "flat"),
        (5, r"shape \(\)"),
    ],
)
def test_what_is_no_int32_is_refused_with_the_culprit(tokens: object, message: str) -> None:
    with pytest.raises(InvalidTokens, match=message):
        as_tokens(tokens)  # type: ignore[arg-type]


def test_tokens_come_back_from_their_bytes_without_a_copy() -> None:
    tokens = np.array([0, 1, 2**31 - 1], dtype=np.int32)
    for given in (tokens, tokens[::2], tokens[:0], from_ids((7, 8))):
        data = to_wire(given)
        assert len(data) == 4 * len(given)
        read = token_field(data)
        assert (read.dtype, read.flags.c_contiguous) == (np.int32, True)
        assert read.tolist() == given.tolist()
        assert not len(read) or np.shares_memory(read, np.frombuffer(data, dtype=np.uint8))
    assert token_field(tokens) is tokens


@pytest.mark.parametrize("data", [b"a", b"abc", b"abcde"])
def test_bytes_that_end_within_a_token_are_none(data: bytes) -> None:
    for read in (from_wire, token_field):
        with pytest.raises(ValueError, match="multiple"):
            read(data)


def test_no_message_has_negative_ids() -> None:
    with pytest.raises(ValueError, match="token id -5 is negative"):
        token_field(to_wire(np.array([3, -5, 0], dtype=np.int32)))
