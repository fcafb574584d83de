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
MAX_CHARACTER_TOKENS = 4  # a character has at most 4 bytes, and a token at least one byte
MAX_WINDOW = 16  # tokens decoded per pushed token: bounds the work while no text is certain


class Detokenizer:
    """Detokenises the output of one sequence, token by token, without the prompt's text."""

    __slots__ = ("_decode", "_ids", "_read", "_text")

    def __init__(self, decode: Decode, prompt: TokenArray) -> None:
        self._decode = decode
        self._ids: list[int] = prompt[-PROMPT_WINDOW:].tolist()  # the window
        self._read = len(self._ids)  # first tokens of the window, whose text was returned
        self._text = decode(self._ids)  # text of these tokens

    def push(self, token_id: int) -> str:
        """Return the text that has become certain with this token; may be empty."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(UNDECODABLE):
            return "" if len(self._ids) < MAX_WINDOW else self._release(text)
        if text == self._text:  # no text of its own, but it may change the next token's text
            if len(self._ids) >= MAX_WINDOW:
                self._ids.pop()
            return ""
        return self._advance(text, len(self._ids))

    def flush(self) -> str:
        """Return the rest at the end of the sequence; undecodable bytes are U+FFFD."""
        return self._advance(self._decode(self._ids), len(self._ids))

    def _release(self, text: str) -> str:
        """Return all but the last character if the window can be cut before it, else all."""
        for cut in range(len(self._ids) - 1, len(self._ids) - 1 - MAX_CHARACTER_TOKENS, -1):
            head = self._decode(self._ids[:cut])
            if cut > self._read and head + self._decode(self._ids[cut:]) == text:
                return self._advance(head, cut)
        return self._advance(text, len(self._ids))

    def _advance(self, text: str, cut: int) -> str:
        """Return the unreturned part of `text`, which is that of the window's first `cut` tokens.
        Drop the tokens whose text was returned before."""
        new = self._ids[self._read : cut]
        # A run of byte tokens that turns out invalid changes the text before it. Returned text
        # cannot change, so only the remaining tokens' own text follows.
        known = text.startswith(self._text)
        delta = text[len(self._text) :] if known else self._decode(new)
        if new:
            del self._ids[: self._read]
            self._read = len(new)
            self._text = self._decode(new)
        return delta
