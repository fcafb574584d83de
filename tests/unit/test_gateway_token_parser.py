"""Token ids without an object for each: the same as any JSON parser finds, or left to one."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.api.errors import ApiError
from memserve.api.generate import CallKind, GenerateCall, encode_call
from memserve.api.openai import parse_completion, parse_token_completion
from memserve.api.token_ids import TokenIds
from memserve.gateway.token_parser import plain_token_ids
from memserve.scheduler.compiled import prepare

HIGHEST = 2**31 - 1
_ids = st.lists(st.integers(0, HIGHEST), min_size=1)


@pytest.fixture(scope="module", autouse=True)
def as_a_gateway_has_it() -> None:
    prepare()


@given(_ids, st.sampled_from([(",", ":"), (", ", ": "), (" ,  ", ":")]))
def test_ids_are_found_however_they_are_spaced(ids: list[int], separators: tuple[str, str]) -> None:
    text = json.dumps(ids, separators=separators).encode()
    found = plain_token_ids(msgspec.Raw(text))
    assert found is not None
    assert found.array.dtype == np.int32
    assert found == ids
    assert found.highest == max(ids)
    assert bytes(found.json) == text


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
        assert found == expected
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
    found = parse_token_completion(body, plain_token_ids)
    assert found is not None
    request, prompt = found
    assert (request.max_tokens, request.n, parse_completion(body).prompt) == (3, 2, tuple(ids))
    for given_ids in (prompt, TokenIds.of(ids)):
        call = GenerateCall("c", CallKind.COMPLETION, "m", 1, (given_ids,))
        sent = msgspec.json.decode(encode_call(call), type=GenerateCall)
        assert sent.prompts == (ids,)


@pytest.mark.parametrize(
    "fields",
    [{"best_of": 3}, {"echo": True, "logprobs": 1}, {"suffix": "x"}, {"stream_options": {}}],
)
def test_the_rest_of_a_request_is_checked_as_with_a_text(fields: dict[str, object]) -> None:
    body = json.dumps({"prompt": [1, 2], **fields}).encode()
    with pytest.raises(ApiError) as expected:
        parse_completion(body)
    with pytest.raises(ApiError) as found:
        parse_token_completion(body, plain_token_ids)
    assert found.value.body() == expected.value.body()


@pytest.mark.parametrize("body", [b"", b"{", b'{"prompt":[1,2],"n":"x"}', b'{"unknown":1}', b"[1]"])
def test_what_cannot_be_read_is_left_to_who_says_why(body: bytes) -> None:
    assert parse_token_completion(body, plain_token_ids) is None
    with pytest.raises(ApiError):
        parse_completion(body)


def test_ids_are_a_sequence_as_any_other() -> None:
    ids = TokenIds.of((5, 6, 7))
    assert TokenIds.of(ids) is ids
    assert (ids.highest, TokenIds.of(()).highest) == (7, -1)
    assert (len(ids), ids[0], ids[1:], list(ids), 6 in ids) == (3, 5, [6, 7], [5, 6, 7], True)
    assert ids == [5, 6, 7]
    assert ids != (5, 6)
    assert ids != "567"
