"""Tool call as a JSON object, read piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container
from enum import Enum, auto

_BLANK = re.compile(r"[ \t\r\n]*")
_IN_STRING = re.compile(r'["\\]')
_IN_CONTAINER = re.compile(r'["{}\[\]]')
_SCALAR_END = re.compile(r"[\s,}\]]")
_NAMES = ("name",)
_ARGUMENTS = ("arguments", "parameters")


def blank_end(text: str, at: int) -> int:
    """Return the position of the next character that is no white space in JSON."""
    match = _BLANK.match(text, at)
    return len(text) if match is None else match.end()


class JsonValue:
    """Finds the end of one JSON value: of a container by its brackets and strings alone, so it
    may be no valid JSON."""

    __slots__ = ("_depth", "_escaped", "_quoted", "_scalar", "ended")

    def __init__(self) -> None:
        self.begin("{")

    def begin(self, first: str) -> None:
        """Begin a value, whose first character, `first`, is read next."""
        self.ended = False
        self._depth = 0
        self._quoted = self._escaped = False
        self._scalar = first not in '"{['

    def push(self, text: str, at: int) -> int:
        """Return the position behind what belongs to the value. Without white space around it."""
        if self._scalar:
            match = _SCALAR_END.search(text, at)
            self.ended = match is not None
            return len(text) if match is None else match.start()
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            match = (_IN_STRING if self._quoted else _IN_CONTAINER).search(text, at)
            if match is None:
                return len(text)
            at = match.end()
            self._read(match[0])
            if not self._depth and not self._quoted:
                self.ended = True
                return at
        return at

    def _read(self, character: str) -> None:
        if character == "\\":
            self._escaped = True
        elif character == '"':
            self._quoted = not self._quoted
        elif character in "{[":
            self._depth += 1
        else:
            self._depth -= 1


class CallState(Enum):
    """READING: more text is needed. FAILED: the next character belongs to no call."""

    READING = auto()
    ENDED = auto()
    FAILED = auto()


class JsonCall:
    """One call, `{"name": ..., "arguments": {...}}`, with its members in any order.

    `begin` is called with the name when it is known to be one of `names` and the arguments have
    begun; from then on the call is `committed`. Arguments are passed on as they are, in fragments
    where the name comes first. Arguments may also be a string with the JSON object, be null, or
    be missing.
    """

    def __init__(
        self, names: Container[str], begin: Callable[[str], None], say: Callable[[str], None]
    ) -> None:
        self._names = names
        self._begin = begin
        self._say = say
        self._value = JsonValue()
        self.reset()

    def reset(self) -> None:
        """Begin another call."""
        self.state = CallState.READING
        self.committed = False
        self._name: str | None = None
        self._arguments: str | None = None  # known before the name
        self._parts: list[str] = []  # of the key or value that is read
        self._key = ""
        self._streams = False  # the arguments' fragments are passed on
        self._step = self._open

    def push(self, text: str, at: int) -> int:
        """Return the position behind what belongs to the call; sets `state`."""
        while at < len(text) and self.state is CallState.READING:
            at = self._step(text, at)
        return at

    def _fail(self, at: int) -> int:
        self.state = CallState.FAILED
        return at

    def _open(self, text: str, at: int) -> int:
        at = blank_end(text, at)
        if at == len(text):
            return at
        if text[at] != "{":
            return self._fail(at)
        self._step = self._member
        return at + 1

    def _member(self, text: str, at: int) -> int:
        at = blank_end(text, at)
        if at == len(text):
            return at
        if text[at] == "}":
            return self._close(at)
        if text[at] != '"':
            return self._fail(at)
        self._value.begin('"')
        self._parts = []
        self._step = self._read_key
        return at

    def _read_key(self, text: str, at: int) -> int:
        end = self._collect(text, at)
        if self._value.ended:
            self._key = _decoded("".join(self._parts)) or ""
            self._step = self._colon
        return end

    def _colon(self, text: str, at: int) -> int:
        at = blank_end(text, at)
        if at == len(text):
            return at
        if text[at] != ":":
            return self._fail(at)
        self._step = self._begin_value
        return at + 1

    def _begin_value(self, text: str, at: int) -> int:
        at = blank_end(text, at)
        if at == len(text):
            return at
        if text[at] in ",:}]":
            return self._fail(at)
        self._value.begin(text[at])
        self._parts = []
        self._streams = False
        if self._key in _ARGUMENTS and not self.committed:
            if text[at] not in '{"n':
                return self._fail(at)
            if text[at] == "{" and self._name is not None:
                self._commit(self._name)
                self._streams = True
        self._step = self._read_value
        return at

    def _read_value(self, text: str, at: int) -> int:
        if self._streams:
            end = self._value.push(text, at)
            self._say(text[at:end])
        else:
            end = self._collect(text, at)
        if self._value.ended:
            self._step = self._between
            if not self._streams and not self.committed and not self._known("".join(self._parts)):
                return self._fail(end)
        return end

    def _known(self, value: str) -> bool:
        """Take a member before the call is committed. Return whether it may be a call's."""
        if self._key in _NAMES:
            self._name = _decoded(value)
            if self._name is None or self._name not in self._names:
                return False
        elif self._key in _ARGUMENTS:
            arguments = _object(value)
            if arguments is None:
                return False
            self._arguments = arguments
        if self._name is not None and self._arguments is not None:
            self._commit(self._name)
            self._say(self._arguments)
        return True

    def _between(self, text: str, at: int) -> int:
        at = blank_end(text, at)
        if at == len(text):
            return at
        if text[at] == "}":
            return self._close(at)
        if text[at] != ",":
            return self._fail(at)
        self._step = self._member
        return at + 1

    def _close(self, at: int) -> int:
        if not self.committed:
            if self._name is None:
                return self._fail(at)
            self._commit(self._name)
            self._say("{}")
        self.state = CallState.ENDED
        return at + 1

    def _commit(self, name: str) -> None:
        self.committed = True
        self._begin(name)

    def _collect(self, text: str, at: int) -> int:
        end = self._value.push(text, at)
        self._parts.append(text[at:end])
        return end


def _decoded(value: str) -> str | None:
    """Return the text of a JSON string; None for anything else."""
    if not value.startswith('"'):
        return None
    try:
        text = json.loads(value, strict=False)
    except ValueError:
        return None
    return well_formed(text) if isinstance(text, str) else None


def well_formed(text: str) -> str:
    """Return the text with U+FFFD for halves of surrogate pairs, which escapes may leave behind
    and UTF-8 cannot encode."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _object(value: str) -> str | None:
    """Return the JSON object that is a call's arguments: the object itself, the text of a string,
    or {} for null; None for anything else."""
    if value.startswith("{"):
        return value
    if value == "null":
        return "{}"
    text = _decoded(value)
    if text is not None and not text.strip():
        return "{}"
    return text if text is not None and text.lstrip().startswith("{") else None
