"""Tokens of the texts that an answer must not have (`bad_words`)."""

from __future__ import annotations

from collections.abc import Sequence

from memserve.api.errors import invalid
from memserve.api.limits import MAX_BAD_WORD_TOKENS
from memserve.models.tokenizer import Tokenizer


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of each word, as it begins a text, and as it stands behind a space if
    that is as many tokens, but others. So does vLLM.

    Other ways in which tokens make the same text stay possible, as there. Raises ApiError (400)
    for more than MAX_BAD_WORD_TOKENS together.
    """
    bare = [word.lstrip() for word in words]
    texts = [*bare, *(f" {word}" for word in bare)]
    ids = tokenizer.encode_each(texts)
    found: list[tuple[int, ...]] = []
    for alone, behind in zip(ids[: len(bare)], ids[len(bare) :], strict=True):
        if alone:
            found.append(tuple(alone))
        if behind and len(behind) == len(alone) and behind[0] != alone[0]:
            found.append(tuple(behind))
    distinct = tuple(dict.fromkeys(found))
    if (count := sum(map(len, distinct))) > MAX_BAD_WORD_TOKENS:
        raise invalid(
            f"'bad_words' have {count} tokens, each as it begins a text and behind a space, and at "
            f"most {MAX_BAD_WORD_TOKENS} may be: send fewer or shorter ones.",
            "bad_words",
        )
    return distinct
