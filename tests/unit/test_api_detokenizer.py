"""Text that is streamed must be the text that decoding everything at once gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from memserve.api.detokenizer import MAX_WINDOW, Detokenizer
from memserve.models.tokenizer import UNDECODABLE
from memserve.tokens import from_ids

Decode = Callable[[Sequence[int]], str]
WORDS = ["▁the", "▁cat", "cat", "▁", "s", "é", "▁▁"]


def byte_level() -> Decode:
    """One token per byte, then a special one and a word of several bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(["<eos>"])
    backend.add_tokens([" word"])
    backend.decoder = decoders.ByteLevel()
    return lambda ids: backend.decode(list(ids), skip_special_tokens=True)


def sentencepiece() -> Decode:
    """As Llama's: spaces belong to words, the first one is dropped, unknown text is bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["<eos>"])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return lambda ids: backend.decode(list(ids), skip_special_tokens=True)


SPECIAL, WORD = 256, 257  # of byte_level
NEVER_UTF8 = sorted(pre_tokenizers.ByteLevel.alphabet()).index("ÿ")  # the byte FF
BYTE_LEVEL = byte_level()
SENTENCEPIECE = sentencepiece()


def streamed(decode: Decode, prompt: Sequence[int], ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(decode, from_ids(prompt))
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@given(st.lists(st.integers(0, WORD), max_size=80))
def test_any_tokens_give_what_decoding_them_at_once_gives(ids: list[int]) -> None:
    # Also for sequences that are not UTF-8 at all, as a model without training makes.
    assert "".join(streamed(BYTE_LEVEL, [], ids)) == BYTE_LEVEL(ids)


@given(
    st.lists(
        st.one_of(
            st.sampled_from(range(257, 257 + len(WORDS))).map(lambda word: [word]),
            st.just([257 + len(WORDS)]),  # <eos>
            st.characters(codec="utf-8").map(lambda c: [1 + byte for byte in c.encode()]),
        ),
        max_size=40,
    )
)
def test_spaces_and_byte_tokens_of_sentencepiece_survive(parts: list[list[int]]) -> None:
    ids = [token_id for part in parts for token_id in part]
    assert "".join(streamed(SENTENCEPIECE, [], ids)) == SENTENCEPIECE(ids)


@given(st.text(max_size=40), st.text(max_size=40))
def test_an_answer_continues_its_prompt(prompt: str, answer: str) -> None:
    def ids(text: str) -> list[int]:
        alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        order = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        return [order[c] for piece, _ in alphabet.pre_tokenize_str(text) for c in piece]

    assert "".join(streamed(BYTE_LEVEL, ids(prompt), ids(answer))) == answer


def test_the_space_between_prompt_and_answer_is_not_lost() -> None:
    the, cat = 257, 258
    assert streamed(SENTENCEPIECE, [the], [cat]) == [" cat", ""]


def test_a_character_is_held_back_until_it_is_whole() -> None:
    ids = [1 + byte for byte in "👍".encode()]
    assert streamed(SENTENCEPIECE, [], ids) == ["", "", "", "👍", ""]


def test_a_character_that_never_becomes_whole_comes_at_the_end() -> None:
    assert streamed(SENTENCEPIECE, [], [1 + 0xF0]) == ["", UNDECODABLE]


@pytest.mark.parametrize("token", [SPECIAL, NEVER_UTF8])
def test_work_per_token_stays_bounded_when_nothing_becomes_text(token: int) -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return BYTE_LEVEL(ids)

    streamed(decode, [], [token] * 200)
    assert longest <= MAX_WINDOW + 1  # a full window gives way with the token after it
