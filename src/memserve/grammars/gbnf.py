"""Translation of GBNF, the EBNF of llama.cpp, into llguidance's Lark.

A rule that does not lead back to itself is a regular expression, and becomes one terminal: what
it matches is exact. Between a terminal and a rule that is recursive the longest match counts, as
in any Lark grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from memserve.api.limits import MAX_GRAMMAR_DEPTH, MAX_GRAMMAR_SYMBOLS
from memserve.errors import RequestError

_TOKEN: Final = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\r\n]*)
    |(?P<name>[A-Za-z0-9_][A-Za-z0-9_-]*)(?P<defines>[ \t\r\n]*::=)?
    |(?P<text>"(?:[^"\\\r\n]|\\.)*")
    |(?P<set>\[(?:[^\]\\\r\n]|\\.)*\])
    |(?P<repeat>\{[ ]*(?P<least>[0-9]{0,9})[ ]*(?P<comma>,?)[ ]*(?P<most>[0-9]{0,9})[ ]*\})
    |(?P<mark>[().|*+?])""",
    re.VERBOSE,
)
_CHARACTER: Final = re.compile(
    r"\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\(.)|([^\\])", re.DOTALL
)
_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t"}
_MARKS: Final = {"*": "*", "+": "+", "?": "?"}
_ANY: Final = r"/[\x{0}-\x{10ffff}]/"


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A terminal in Lark: a text, a set of characters."""

    lark: str


@dataclass(frozen=True, slots=True)
class _Rule:
    name: str


@dataclass(frozen=True, slots=True)
class _Repeat:
    item: _Node
    times: str  # in Lark


@dataclass(frozen=True, slots=True)
class _Sequence:
    items: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    items: tuple[_Node, ...]


_Node = _Leaf | _Rule | _Repeat | _Sequence | _Choice
_Write = Callable[[_Node], str]
_Named = Callable[[str], str]


def is_gbnf(source: str) -> bool:
    return "::=" in source


def lark_of(source: str) -> str:
    """Return a GBNF grammar, whose first rule is `root`'s, in Lark. Raises RequestError."""
    rules = _Parser(source).rules()
    if "root" not in rules:
        raise RequestError("the grammar has no rule 'root'")
    return _Writer(rules).write()


class _Parser:
    def __init__(self, source: str) -> None:
        self._source = source
        self._tokens = list(_tokens(source))
        self._at = 0
        self._depth = 0

    def rules(self) -> dict[str, _Node]:
        rules: dict[str, _Node] = {}
        while self._at < len(self._tokens):
            token = self._next()
            if token["defines"] is None:
                raise self._wrong(token, "expected a rule's name and '::='")
            if token["name"] in rules:
                raise self._wrong(token, f"rule '{token['name']}' is defined twice")
            rules[token["name"]] = self._choice()
        return rules

    def _choice(self) -> _Node:
        items = [self._sequence()]
        while self._peek("|"):
            self._at += 1
            items.append(self._sequence())
        return items[0] if len(items) == 1 else _Choice(tuple(items))

    def _sequence(self) -> _Node:
        items: list[_Node] = []
        while (token := self._here()) is not None:
            if token["defines"] is not None or token["mark"] in ("|", ")"):
                break
            self._at += 1
            if (times := _times(token)) is None:
                items.append(self._item(token))
            elif not items:
                raise self._wrong(token, "nothing to repeat")
            else:
                items.append(_Repeat(items.pop(), times))
        return items[0] if len(items) == 1 else _Sequence(tuple(items))

    def _item(self, token: re.Match[str]) -> _Node:
        if token["name"] is not None:
            return _Rule(token["name"])
        if token["text"] is not None:
            return _Leaf(json.dumps("".join(map(chr, self._characters(token, "text")))))
        if token["set"] is not None:
            return _Leaf(self._set(token))
        if token["mark"] == ".":
            return _Leaf(_ANY)
        self._depth += 1
        if self._depth > MAX_GRAMMAR_DEPTH:
            raise self._wrong(token, f"more than {MAX_GRAMMAR_DEPTH} parentheses in each other")
        inner = self._choice()
        if not self._peek(")"):
            raise self._wrong(token, "the parenthesis is not closed")
        self._at += 1
        self._depth -= 1
        return inner

    def _set(self, token: re.Match[str]) -> str:
        """Return a set of characters as a regular expression."""
        body = token["set"][1:-1]
        negated = body.startswith("^")
        marks = list(self._marks(token, body[negated:]))
        parts = []
        at = 0
        while at < len(marks):
            first, last = marks[at][0], marks[at][0]
            if at + 2 < len(marks) and marks[at + 1] == (ord("-"), False):
                last = marks[at + 2][0]
                at += 2
            if last < first:
                raise self._wrong(token, "a range ends before it begins")
            parts.append(f"\\x{{{first:x}}}-\\x{{{last:x}}}")
            at += 1
        if not parts:
            raise self._wrong(token, "an empty set")
        return f"/[{'^' if negated else ''}{''.join(parts)}]/"

    def _characters(self, token: re.Match[str], group: str) -> list[int]:
        return [point for point, _ in self._marks(token, token[group][1:-1])]

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


def _times(token: re.Match[str]) -> str | None:
    """Return a repetition in Lark; None for another token."""
    if token["repeat"] is None:
        return _MARKS.get(token["mark"] or "")
    least = token["least"] or "0"
    most = token["most"] if token["comma"] else least
    return f"{{{least},{most}}}"


class _Writer:
    """Writes rules in Lark: `t1`, `t2`, ... are recursive rules, `T1`, ... terminals."""

    def __init__(self, rules: dict[str, _Node]) -> None:
        self._rules = rules
        self._number = {name: number for number, name in enumerate(rules)}
        self._lines: list[str] = []
        self._sizes = _regular_sizes(rules)

    def write(self) -> str:
        for name, node in self._rules.items():
            if name in self._sizes:
                self._lines.append(f"T{self._number[name]}: {self._terminal(node)}")
            else:
                self._lines.append(f"t{self._number[name]}: {self._rule(node)}")
        return "\n".join([f"start: {self._named('root')}", *self._lines, ""])

    def _named(self, name: str) -> str:
        return f"{'T' if name in self._sizes else 't'}{self._number[name]}"

    def _terminal(self, node: _Node) -> str:
        return _written(node, self._terminal, self._named)

    def _rule(self, node: _Node) -> str:
        if isinstance(node, _Sequence):
            return self._joined(node.items)
        return _written(node, self._part, self._named)

    def _part(self, node: _Node) -> str:
        if self._is_regular(node) and not isinstance(node, _Rule | _Leaf):
            self._lines.append(f"T_{len(self._lines)}: {self._terminal(node)}")
            return self._lines[-1].partition(":")[0]
        return f"({self._rule(node)})" if isinstance(node, _Sequence) else self._rule(node)

    def _joined(self, items: Sequence[_Node]) -> str:
        """Return a sequence with each run of regular items as one terminal."""
        parts: list[str] = []
        run: list[_Node] = []
        for item in (*items, None):
            if item is not None and self._is_regular(item):
                run.append(item)
                continue
            if run:
                parts.append(self._part(run[0] if len(run) == 1 else _Sequence(tuple(run))))
                run = []
            if item is not None:
                parts.append(self._part(item))
        return " ".join(parts) or '""'

    def _is_regular(self, node: _Node) -> bool:
        return all(name in self._sizes for name in _used(node))


def _written(node: _Node, write: _Write, named: _Named) -> str:
    if isinstance(node, _Leaf):
        return node.lark
    if isinstance(node, _Rule):
        return named(node.name)
    if isinstance(node, _Repeat):
        return f"({write(node.item)}){node.times}"
    if isinstance(node, _Sequence):
        return f"({' '.join(map(write, node.items))})" if node.items else '""'
    return f"({' | '.join(map(write, node.items))})"


def _used(node: _Node) -> Iterator[str]:
    """Yield the names of the rules that a node refers to."""
    if isinstance(node, _Rule):
        yield node.name
    elif isinstance(node, _Repeat):
        yield from _used(node.item)
    elif isinstance(node, _Sequence | _Choice):
        for item in node.items:
            yield from _used(item)


def _size(node: _Node) -> int:
    if isinstance(node, _Repeat):
        return 1 + _size(node.item)
    if isinstance(node, _Sequence | _Choice):
        return 1 + sum(map(_size, node.items))
    return 1


def _regular_sizes(rules: dict[str, _Node]) -> dict[str, int]:
    """Return the symbols of each rule that is not recursive, with the rules that it uses written
    out. Raises RequestError for a rule that is not there, and for too many symbols."""
    waiting: dict[str, set[str]] = {}
    users: dict[str, list[str]] = {name: [] for name in rules}
    uses = {name: list(_used(node)) for name, node in rules.items()}
    for name, used in uses.items():
        for other in used:
            if other not in rules:
                raise RequestError(f"rule '{other[:64]}' of the grammar is not defined")
        waiting[name] = set(used)
        for other in waiting[name]:
            users[other].append(name)
    sizes: dict[str, int] = {}
    ready = [name for name, others in waiting.items() if not others]
    while ready:
        name = ready.pop()
        sizes[name] = _size(rules[name]) + sum(sizes[other] for other in uses[name])
        if sizes[name] > MAX_GRAMMAR_SYMBOLS:
            raise RequestError(
                f"rule '{name[:64]}' of the grammar has more than {MAX_GRAMMAR_SYMBOLS} symbols "
                "with the rules that it uses"
            )
        for user in users[name]:
            waiting[user].discard(name)
            if not waiting[user]:
                ready.append(user)
    return sizes
