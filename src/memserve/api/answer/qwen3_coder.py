"""Parser of the tool calls of Qwen3-Coder: XML-like, with parameters as plain texts."""

from __future__ import annotations

import json
from collections.abc import Mapping

from memserve.api.answer.delta import Collector
from memserve.api.answer.format import Function
from memserve.api.answer.staged import Stage, StagedParser, overlap, skip_blank
from memserve.api.limits import MAX_FUNCTION_NAME, MAX_NAME_CHARACTERS

_CALL = "<tool_call>"
_CALL_END = "</tool_call>"
_FUNCTION = "<function="
_FUNCTION_END = "</function>"
_PARAMETER = "<parameter="
_PARAMETER_END = "</parameter>"
_LITERALS = {"true": "true", "false": "false", "null": "null", "none": "null"}


class Qwen3CoderParser(StagedParser):
    """`<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`, with
    line breaks between the tags; `<tool_call>` may be missing.

    Arguments become JSON: a parameter that takes texts is passed on in fragments; any other one
    when it is whole, as JSON if it is that, or else as a text.
    """

    markers = (_CALL, _FUNCTION)

    def __init__(self, functions: Mapping[str, Function], out: Collector) -> None:
        super().__init__(functions, out)
        self._parts: list[str] = []  # of a name, or of a value that is no text
        self._texts: frozenset[str] = frozenset()
        self._parameters = 0  # read so far
        self._is_text = False

    def _marked(self, marker: str) -> Stage:
        self._parts = []
        return self._opened if marker == _CALL else self._read_function

    def _opened(self, text: str, at: int) -> int:
        begin = self._skip(text, at)
        if text.startswith(_FUNCTION, begin):
            self._raw.append(_FUNCTION)
            self._stage = self._read_function
            return begin + len(_FUNCTION)
        if not _FUNCTION.startswith(text[begin:]):
            self._fail()
        return begin

    def _read_function(self, text: str, at: int) -> int:
        end = self._read_name(text, at, MAX_FUNCTION_NAME)
        self._raw.append(text[at:end])
        if end < len(text):
            name = "".join(self._parts).strip()
            if text[end] != ">" or name not in self._functions:
                self._fail()
                return end
            self._begin(name)
            self._texts = frozenset(self._functions[name].texts)
            self._parameters = 0
            self._out.arguments("{")
            self._stage = self._inside
            return end + 1
        return end

    def _read_name(self, text: str, at: int, most: int) -> int:
        """Add to the name in a tag. Return the position of what ends it: `>`, a line break, or
        one character too many."""
        end = at
        room = most - sum(map(len, self._parts))
        while end < len(text) and text[end] not in ">\n" and end - at < room:
            end += 1
        self._parts.append(text[at:end])
        return end

    def _inside(self, text: str, at: int) -> int:
        begin = skip_blank(text, at)
        if text.startswith(_PARAMETER, begin):
            self._parts = []
            self._stage = self._read_key
            return begin + len(_PARAMETER)
        if text.startswith(_FUNCTION_END, begin):
            self._out.arguments("}")
            self._end()
            return begin + len(_FUNCTION_END)
        rest = text[begin:]
        if _PARAMETER.startswith(rest) or _FUNCTION_END.startswith(rest):
            return begin
        found = text.find("<", begin + 1)  # no tag of ours: content
        end = len(text) if found < 0 else found
        self._say(text[begin:end])
        return end

    def _read_key(self, text: str, at: int) -> int:
        end = self._read_name(text, at, MAX_NAME_CHARACTERS)
        if end < len(text):
            key = "".join(self._parts).strip()
            self._out.arguments((", " if self._parameters else "") + json.dumps(key) + ": ")
            self._parameters += 1
            self._parts = []
            self._is_text = key in self._texts
            if self._is_text:
                self._out.arguments('"')
            self._stage = self._begin_value
            return end + 1 if text[end] == ">" else end
        return end

    def _begin_value(self, text: str, at: int) -> int:
        self._stage = self._read_value
        return at + 1 if text[at] == "\n" else at

    def _read_value(self, text: str, at: int) -> int:
        found = text.find(_PARAMETER_END, at)
        if found >= 0:
            end = found - 1 if found > at and text[found - 1] == "\n" else found
            self._value(text[at:end])
            if self._is_text:
                self._out.arguments('"')
            else:
                self._out.arguments(converted("".join(self._parts)))
            self._stage = self._inside
            return found + len(_PARAMETER_END)
        end = len(text) - overlap(text[at:], (_PARAMETER_END, "\n" + _PARAMETER_END))
        self._value(text[at:end])
        return end

    def _value(self, text: str) -> None:
        if self._is_text:
            self._out.arguments(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._parts.append(text)

    def _after(self, text: str, at: int) -> int:
        begin = skip_blank(text, at)
        if text.startswith(_CALL_END, begin):
            self._stage = self._content
            return begin + len(_CALL_END)
        if _CALL_END.startswith(text[begin:]):
            return begin
        self._stage = self._content
        return begin

    def _unread(self, rest: str) -> bool:
        if self._stage == self._read_value:
            self._value(rest)
        elif self._stage == self._inside:
            self._say(rest)
        return self._stage in (self._after, self._inside, self._read_value)


def converted(value: str) -> str:
    """Return the JSON of a value that need not be a text."""
    word = value.strip()
    if word.lower() in _LITERALS:
        return _LITERALS[word.lower()]
    try:
        json.loads(word, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(value, ensure_ascii=False)
    return word


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
