"""GBNF, the EBNF of llama.cpp, as a tree of rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from memserve.api.limits import MAX_GRAMMAR_DEPTH, MAX_GRAMMAR_SYMBOLS
from memserve.errors import RequestError

Range = tuple[int, int]  # of code points, both included
ANY: Final[tuple[Range, ...]] = ((0, 0xD7FF), (0xE000, 0x10FFFF))

_TOKEN: Final = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\r\n]*)
    |(?P<name>[A-Za-z0-9_][A-Za-z0-9_-]*)(?P<defines>[ \t\r\n]*::=)?
    |(?P<text>"(?:[^"\\\r\n]|\\.)*")
    |(?P<set>\[(?:[^\]\\\r\n]|\\.)*\])
    |(?P<repeat>\{[ ]*+(?P<least>[0-9]{0,9}+)[ ]*+(?P<comma>,?+)[ ]*+(?P<most>[0-9]{0,9}+)[ ]*+\})
    |(?P<mark>[().|*+?])""",
    re.VERBOSE,
)
_CHARACTER: Final = re.compile(
    r"\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\(.)|([^\\])", re.DOTALL
)
_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t"}
_TIMES: Final[dict[str | None, tuple[int, int | None]]] = {
    "*": (0, None),
    "+": (1, None),
    "?": (0, 1),
}


@dataclass(frozen=True, slots=True, eq=False)
class Characters:
    """One character of these."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Repeat:
    item: Node
    least: int
    most: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class OneOf:
    items: tuple[Node, ...]


Node = Characters | Text | Reference | Repeat | Series | OneOf  # equal to itself only


def is_gbnf(source: str) -> bool:
    return "::=" in source


def parse(source: str) -> dict[str, Node]:
    """Return the rules of a grammar, of which `root` is the whole text. Raises RequestError."""
    rules = _Parser(source).rules()
    if "root" not in rules:
        raise RequestError("the grammar has no rule 'root'")
    return rules


class _Parser:
    def __init__(self, source: str) -> None:
        self._source = source
        self._tokens = list(_tokens(source))
        if len(self._tokens) > MAX_GRAMMAR_SYMBOLS:
            raise RequestError(f"the grammar has more than {MAX_GRAMMAR_SYMBOLS} symbols")
        self._at = 0
        self._depth = 0

    def rules(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        while self._at < len(self._tokens):
            token = self._next()
            if token["defines"] is None:
                raise self._wrong(token, "expected a rule's name and '::='")
            if token["name"] in rules:
                raise self._wrong(token, f"rule '{token['name'][:64]}' is defined twice")
            rules[token["name"]] = self._choice()
        return rules

    def _choice(self) -> Node:
        items = [self._series()]
        while self._peek("|"):
            self._at += 1
            items.append(self._series())
        return items[0] if len(items) == 1 else OneOf(tuple(items))

    def _series(self) -> Node:
        items: list[Node] = []
        while (token := self._here()) is not None:
            if token["defines"] is not None or token["mark"] in ("|", ")"):
                break
            self._at += 1
            times = self._times(token)
            if times is None:
                items.append(self._item(token))
            elif not items:
                raise self._wrong(token, "nothing to repeat")
            else:
                items.append(Repeat(items.pop(), *times))
        return items[0] if len(items) == 1 else Series(tuple(items))

    def _times(self, token: re.Match[str]) -> tuple[int, int | None] | None:
        """Return the least and the most times of a repetition; None for another token."""
        if token["repeat"] is None:
            return _TIMES.get(token["mark"])
        least = int(token["least"] or "0")
        if not token["comma"]:
            return least, least
        most = int(token["most"]) if token["most"] else None
        if most is not None and most < least:
            raise self._wrong(token, f"{least} to {most} times")
        return least, most

    def _item(self, token: re.Match[str]) -> Node:
        if token["name"] is not None:
            return Reference(token["name"])
        if token["text"] is not None:
            marks = self._marks(token, token["text"][1:-1])
            return Text("".join(chr(point) for point, _ in marks))
        if token["set"] is not None:
            return Characters(self._set(token))
        if token["mark"] == ".":
            return Characters(ANY)
        self._depth += 1
        if self._depth > MAX_GRAMMAR_DEPTH:
            raise self._wrong(token, f"more than {MAX_GRAMMAR_DEPTH} parentheses in each other")
        inner = self._choice()
        if not self._peek(")"):
            raise self._wrong(token, "the parenthesis is not closed")
        self._at += 1
        self._depth -= 1
        return inner

    def _set(self, token: re.Match[str]) -> tuple[Range, ...]:
        body = token["set"][1:-1]
        negated = body.startswith("^")
        marks = list(self._marks(token, body[negated:]))
        ranges: list[Range] = []
        at = 0
        while at < len(marks):
            first = last = marks[at][0]
            if at + 2 < len(marks) and marks[at + 1] == (ord("-"), False):
                last = marks[at + 2][0]
                at += 2
            if last < first:
                raise self._wrong(token, "a range ends before it begins")
            ranges.append((first, last))
            at += 1
        ranges = _others(ranges) if negated else ranges
        if not ranges:
            raise self._wrong(token, "an empty set")
        return tuple(ranges)

    def _marks(self, token: re.Match[str], body: str) -> Iterator[tuple[int, bool]]:
        """Yield each character's code point, and whether it was escaped."""
        for match in _CHARACTER.finditer(body):
            code = match[1] or match[2] or match[3]
            if code is not None:
                point = int(code, 16)
            elif match[4] is None:
                point = ord(match[5])
            elif match[4] in "xuU":
                raise self._wrong(token, f"an incomplete escape \\{match[4]}")
            else:
                point = ord(_ESCAPES.get(match[4], match[4]))
            if point > 0x10FFFF or 0xD800 <= point < 0xE000:
                raise self._wrong(token, f"{point:#x} is no character")
            yield point, match[5] is None

    def _here(self) -> re.Match[str] | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _next(self) -> re.Match[str]:
        self._at += 1
        return self._tokens[self._at - 1]

    def _peek(self, mark: str) -> bool:
        token = self._here()
        return token is not None and token["mark"] == mark

    def _wrong(self, token: re.Match[str], why: str) -> RequestError:
        return _wrong(self._source, token.start(), why)


def _tokens(source: str) -> Iterator[re.Match[str]]:
    at = 0
    while at < len(source):
        token = _TOKEN.match(source, at)
        if token is None:
            raise _wrong(source, at, f"not understood: {source[at : at + 20]!r}")
        at = token.end()
        if token["space"] is None:
            yield token


def _wrong(source: str, at: int, why: str) -> RequestError:
    return RequestError(f"line {source.count(chr(10), 0, at) + 1} of the grammar: {why}")


def _others(ranges: list[Range]) -> list[Range]:
    """Return all characters but those in `ranges`."""
    others = []
    for first, last in ANY:
        begin = first
        for low, high in sorted(ranges):
            if low > begin:
                others.append((begin, min(last, low - 1)))
            begin = max(begin, high + 1)
            if begin > last:
                break
        if begin <= last:
            others.append((begin, last))
    return [(low, high) for low, high in others if low <= high]
