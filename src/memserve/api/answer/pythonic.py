"""Parser of tool calls that are written as a Python list of calls."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping

from memserve.api.answer.delta import Collector
from memserve.api.answer.format import Function
from memserve.api.answer.json_call import well_formed
from memserve.api.answer.staged import Stage, StagedParser, skip_blank
from memserve.api.limits import MAX_DEPTH, MAX_FUNCTION_NAME

_NAME = re.compile(r"[\w.]*")
_OPEN, _CLOSE = "<|python_start|>", "<|python_end|>"
# Characters of a call's arguments, which are parsed at once, in some milliseconds.
MAX_ARGUMENTS = 16 * 1024
_IN_CALL = re.compile(r"""["'()\[\]{}]""")
_IN_STRING = {'"': re.compile(r'["\\\n]'), "'": re.compile(r"['\\\n]")}
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")"""
    r"""|(?P<number>[-+]?(?:\d[\d_]*)?\.?\d+(?:[eE][-+]?\d+)?)"""
    r"""|(?P<word>[^\W\d]\w*)|(?P<mark>[=,:(){}\[\]]))""",
    re.DOTALL,
)
_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U(00[01][0-9a-fA-F]{5})|(.))", re.DOTALL
)
_ESCAPES = {
    "n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0",
    "\\": "\\", "'": "'", '"': '"', "\n": "",
}  # fmt: skip
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


class PythonicParser(StagedParser):
    """`[name(key=value), ...]` as the whole answer, or anywhere behind `<|python_start|>` (Llama
    4). Values are literals. A call is passed on when it is whole."""

    markers = (_OPEN,)

    def __init__(self, functions: Mapping[str, Function], out: Collector) -> None:
        super().__init__(functions, out)
        self._stage = self._start
        self._name: list[str] = []
        self._arguments: list[str] = []
        self._size = 0
        self._depth = 0
        self._quote = ""
        self._escaped = False

    def _marked(self, marker: str) -> Stage:
        return self._list

    def _start(self, text: str, at: int) -> int:
        return self._open(text, at, "[", self._list)

    def _list(self, text: str, at: int) -> int:
        begin = self._skip(text, at)
        if begin == len(text):
            return begin
        if text[begin] != "[":
            self._fail()
            return begin
        self._raw.append("[")
        self._stage = self._item
        return begin + 1

    def _item(self, text: str, at: int) -> int:
        begin = self._skip(text, at)
        if begin < len(text):
            self._name = []
            self._stage = self._read_name
        return begin

    def _read_name(self, text: str, at: int) -> int:
        match = _NAME.match(text, at)
        end = at if match is None else match.end()
        self._name.append(text[at:end])
        self._raw.append(text[at:end])
        if sum(map(len, self._name)) > MAX_FUNCTION_NAME:
            self._fail()
        elif end < len(text):
            if text[end] != "(" or "".join(self._name) not in self._functions:
                self._fail()
                return end
            self._arguments = []
            self._size = self._depth = 0
            self._quote = ""
            self._stage = self._read_arguments
        return end

    def _read_arguments(self, text: str, at: int) -> int:
        end = self._arguments_end(text[: at + MAX_ARGUMENTS - self._size], at)
        self._arguments.append(text[at:end])
        self._raw.append(text[at:end])
        self._size += end - at
        if self._depth:
            if self._size == MAX_ARGUMENTS:
                self._fail()
        else:
            arguments = _arguments_of("".join(self._arguments))
            if arguments is None:
                self._fail()
            else:
                self._begin("".join(self._name))
                self._out.arguments(arguments)
                self._end()
        return end

    def _arguments_end(self, text: str, at: int) -> int:
        """Return the position behind the call's last bracket, where `_depth` is 0 again."""
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            pattern = _IN_STRING[self._quote] if self._quote else _IN_CALL
            match = pattern.search(text, at)
            if match is None:
                return len(text)
            at = match.end()
            character = match[0]
            if character == "\\":
                self._escaped = True
            elif self._quote:
                self._quote = ""
            elif character in "\"'":
                self._quote = character
            else:
                self._depth += 1 if character in "([{" else -1
                if not self._depth:
                    return at
        return at

    def _after(self, text: str, at: int) -> int:
        begin = skip_blank(text, at)
        if begin == len(text):
            return begin
        if text[begin] == ",":
            self._raw.append(",")
            self._stage = self._item
            return begin + 1
        self._stage = self._content
        if text[begin] == "]":
            self._stage = self._behind
            return begin + 1
        return begin

    def _behind(self, text: str, at: int) -> int:
        begin = skip_blank(text, at)
        if text.startswith(_CLOSE, begin):
            self._stage = self._content
            return begin + len(_CLOSE)
        if _CLOSE.startswith(text[begin:]):
            return begin
        self._stage = self._content
        return begin

    def _unread(self, rest: str) -> bool:
        return self._stage == self._behind


class _Malformed(Exception):
    """The text is no list of keyword arguments with literal values."""


def _arguments_of(text: str) -> str | None:
    """Return the arguments `(key=value, ...)` as JSON; None if they are none."""
    tokens = _Tokens(text)
    try:
        tokens.expect("(")
        arguments: dict[str, object] = {}
        while not tokens.take(")"):
            key = tokens.word()
            tokens.expect("=")
            arguments[key] = tokens.value(0)
            if not tokens.take(","):
                tokens.expect(")")
                break
        return well_formed(json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (_Malformed, ValueError):
        return None


class _Tokens:
    """Reads Python literals."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._kind, self._token = "", ""
        self._advance()

    def _advance(self) -> None:
        match = _TOKEN.match(self._text, self._at)
        if match is None:
            self._kind, self._token = "", ""
            return
        self._at = match.end()
        self._kind = match.lastgroup or ""
        self._token = match[self._kind]

    def take(self, mark: str) -> bool:
        """Read this mark if it is next."""
        if self._kind != "mark" or self._token != mark:
            return False
        self._advance()
        return True

    def expect(self, mark: str) -> None:
        if not self.take(mark):
            raise _Malformed

    def word(self) -> str:
        if self._kind != "word":
            raise _Malformed
        word = self._token
        self._advance()
        return word

    def value(self, depth: int) -> object:
        """Read a literal. Raises _Malformed, ValueError."""
        if depth > MAX_DEPTH:
            raise _Malformed
        kind, token = self._kind, self._token
        if kind == "mark" and token in "[(":
            self._advance()
            return self._values("]" if token == "[" else ")", depth + 1)
        if kind == "mark" and token == "{":
            self._advance()
            return self._mapping(depth + 1)
        self._advance()
        if kind == "text":
            return _unquoted(token)
        if kind == "number":
            return _number(token)
        if kind == "word" and token in _WORDS:
            return _WORDS[token]
        raise _Malformed

    def _values(self, closing: str, depth: int) -> list[object]:
        values: list[object] = []
        while not self.take(closing):
            values.append(self.value(depth))
            if not self.take(","):
                self.expect(closing)
                break
        return values

    def _mapping(self, depth: int) -> dict[str, object]:
        values: dict[str, object] = {}
        while not self.take("}"):
            if self._kind != "text":
                raise _Malformed
            key = _unquoted(self._token)
            self._advance()
            self.expect(":")
            values[key] = self.value(depth)
            if not self.take(","):
                self.expect("}")
                break
        return values


def _number(token: str) -> int | float:
    """Return a number. Raises ValueError."""
    try:
        return int(token)
    except ValueError:
        return float(token)


def _unquoted(token: str) -> str:
    """Return the text of a quoted one."""
    body = token[1:-1]
    return _ESCAPE.sub(_unescaped, body) if "\\" in body else body


def _unescaped(match: re.Match[str]) -> str:
    code = match[1] or match[2] or match[3]
    if code:
        return chr(min(int(code, 16), sys.maxunicode))
    return _ESCAPES.get(match[4], match[0])
