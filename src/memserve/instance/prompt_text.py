"""Places of a prompt's tokens in its text, for the `text_offset` of an echoed prompt."""

from __future__ import annotations

from memserve.api.detokenizer import Decode, Detokenizer
from memserve.models.tokenizer import Tokenizer
from memserve.tokens import NO_TOKENS
from memserve.types import TokenArray


def token_offsets(
    tokenizer: Tokenizer, prompt: TokenArray, text: str | None, decode: Decode
) -> list[int]:
    """Return the offset of each token, in characters: in `text`, of which `prompt` [tokens] was
    made, or, for None, in the text that `decode` gives for the tokens."""
    ids = prompt.tolist()
    if text is not None and (offsets := tokenizer.offsets(text, ids)) is not None:
        return offsets
    detokenizer = Detokenizer(decode, NO_TOKENS)
    offsets, length = [], 0
    for token_id in ids:
        offsets.append(length)
        length += len(detokenizer.push(token_id))
    return offsets
