"""Incremental detokenisation: tokens in, text out as soon as it is certain.

A token's text depends on its neighbours (a character's bytes may be split over tokens, a
sentencepiece token's leading space is dropped at the start of a text), so a short window is
decoded with and without the new token and the difference is what the token added.
Source of the method: TGI, vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memserve.models.tokenizer import UNDECODABLE
from memserve.types import TokenArray

Decode = Callable[[Sequence[int]], str]

PROMPT_WINDOW = 6  # prompt tokens that the first output token is decoded after
MAX_CHARACTER_TOKENS = 4  # a character has at most 4 bytes, each at least a token's part
MAX_WINDOW = 16  # tokens decoded per new token: bounds the work while nothing is certain


class Detokenizer:
    """The text of one sequence, token by token. The prompt's own text is not part of it."""

    __slots__ = ("_decode", "_ids", "_read", "_text")

    def __init__(self, decode: Decode, prompt: TokenArray) -> None:
        self._decode = decode
        self._ids: list[int] = prompt[-PROMPT_WINDOW:].tolist()  # the window
        self._read = len(self._ids)  # tokens of the window whose text has been given out
        self._text = decode(self._ids)  # their text

    def push(self, token_id: int) -> str:
        """Text that has become certain with this token; may be empty."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(UNDECODABLE):
            return "" if len(self._ids) < MAX_WINDOW else self._release(text)
        if text == self._text:  # the token has no text, but may be what gives the next its own
            if len(self._ids) >= MAX_WINDOW:
                self._ids.pop()
            return ""
        return self._advance(text, len(self._ids))

    def flush(self) -> str:
        """The rest, at the end of the sequence: undecodable bytes as U+FFFD."""
        return self._advance(self._decode(self._ids), len(self._ids))

    def _release(self, text: str) -> str:
        """Give out all but the last character, where the window can be cut before it."""
        for cut in range(len(self._ids) - 1, len(self._ids) - 1 - MAX_CHARACTER_TOKENS, -1):
            head = self._decode(self._ids[:cut])
            if cut > self._read and head + self._decode(self._ids[cut:]) == text:
                return self._advance(head, cut)
        return self._advance(text, len(self._ids))

    def _advance(self, text: str, cut: int) -> str:
        """Give out `text`, that of the window's first `cut` tokens; the last of them remain."""
        new = self._ids[self._read : cut]
        # A run of byte tokens that turns out invalid changes the text before it: what has
        # been given out stays, and only the new tokens' own text follows.
        known = text.startswith(self._text)
        delta = text[len(self._text) :] if known else self._decode(new)
        if new:
            del self._ids[: self._read]
            self._read = len(new)
            self._text = self._decode(new)
        return delta
