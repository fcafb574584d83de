"""Token ids without an object for each: the same as any JSON parser finds, or left to one."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.api import msgpack
from memserve.api.generate import CallKind, GenerateCall
from memserve.api.openai import parse_completion
from memserve.gateway.body_scan import plain_token_ids, prepare
from memserve.gateway.prompts import read_prompts
from memserve.tokens import from_ids
from tests.packed import listed

HIGHEST = 2**31 - 1
_ids = st.lists(st.integers(0, HIGHEST), min_size=1)


@pytest.fixture(scope="module", autouse=True)
def as_a_gateway_has_it() -> None:
    prepare()


@given(_ids, st.sampled_from([(",", ":"), (", ", ": "), (" ,  ", ":"), (",\n\t", ":\r\n")]))
def test_ids_are_found_however_they_are_spaced(ids: list[int], separators: tuple[str, str]) -> None:
    text = json.dumps(ids, separators=separators).encode()
    found = plain_token_ids(msgspec.Raw(text))
    assert found is not None
    assert found.dtype == np.int32
    assert found.tolist() == ids


@given(st.text(alphabet='[], 01293-.eE+"n\n\t', max_size=12))
def test_what_a_parser_would_read_otherwise_is_left_to_it(text: str) -> None:
    """Also where it is no JSON at all."""
    found = plain_token_ids(msgspec.Raw(text.encode()))
    try:
        expected = json.loads(text)
    except ValueError:
        assert found is None
        return
    if found is not None:
        assert found.tolist() == expected
        assert all(type(number) is int for number in expected)


@pytest.mark.parametrize(
    "text",
    ["[]", "[ ]", '"1"', "[[1]]", "[-1]", "[1.0]", "[1e2]", "[2147483648]",
     "[99999999999999999999]", "[true]", "[null]", '["a"]', "[01]", "[1 2]", "[1,]",
     "[,1]", "[1", "1]", "1", "", "{}"],
)  # fmt: skip
def test_what_is_not_one_prompt_of_ids_is_left(text: str) -> None:
    assert plain_token_ids(msgspec.Raw(text.encode())) is None


@given(_ids)
def test_an_instance_gets_the_ids_that_the_client_sent(ids: list[int]) -> None:
    body = json.dumps({"prompt": ids, "max_tokens": 3, "n": 2}).encode()
    request = parse_completion(body)
    (prompt,) = read_prompts(request.prompt)
    assert (request.max_tokens, request.n) == (3, 2)
    assert not isinstance(prompt, str)
    for given_ids in (prompt, from_ids(ids)):
        call = GenerateCall("c", CallKind.COMPLETION, "m", 1, (given_ids,))
        sent = msgspec.msgpack.decode(msgpack.encode(call), type=GenerateCall)
        assert listed(sent.prompts) == [ids]
