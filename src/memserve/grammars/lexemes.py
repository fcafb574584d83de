"""Where a terminal may end: what llguidance's lexer needs to read a grammar as it was meant.

The lexer takes the longest text that a terminal matches. That changes a grammar if the terminal
could go on with a character that may also follow it. `Shape` bounds what a terminal matches, and
`Flow` finds what may follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Final

from memserve.errors import RequestError
from memserve.grammars.gbnf import Characters, Node, OneOf, Range, Reference, Repeat, Text

Set = int  # of characters: one bit for each class of characters that the grammar tells apart


class Alphabet:
    """Classes of characters that no set of a grammar divides."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        edges: set[int] = set()
        for first, last in ranges:
            edges |= {first, last + 1}
        self._index = {edge: at for at, edge in enumerate(sorted(edges))}

    def of(self, ranges: Iterable[Range]) -> Set:
        found = 0
        for first, last in ranges:
            found |= (1 << self._index[last + 1]) - (1 << self._index[first])
        return found


@dataclass(frozen=True, slots=True)
class Shape:
    """Properties of a regular expression's texts."""

    nullable: bool
    first: Set  # characters at the start
    inner: Set  # characters behind the first
    more: Set  # characters that may follow a whole text within a longer one
    clear: bool  # the characters so far tell where in the expression a text is

    @property
    def all(self) -> Set:
        return self.first | self.inner


NOTHING: Final = Shape(True, 0, 0, 0, True)


def shape_of(node: Node, alphabet: Alphabet, rule: Callable[[str], Shape]) -> Shape:
    """Return the shape of a node. `rule`: the shapes of rules, none of them recursive."""
    if isinstance(node, Characters):
        return Shape(False, alphabet.of(node.ranges), 0, 0, True)
    if isinstance(node, Text):
        points = [alphabet.of([(ord(one), ord(one))]) for one in node.text]
        if not points:
            return NOTHING
        inner = 0
        for point in points[1:]:
            inner |= point
        return Shape(False, points[0], inner, 0, True)
    if isinstance(node, Reference):
        return rule(node.name)
    if isinstance(node, Repeat):
        return _repeated(shape_of(node.item, alphabet, rule), node)
    shapes = [shape_of(item, alphabet, rule) for item in node.items]
    if isinstance(node, OneOf):
        return _either(shapes)
    whole = NOTHING
    for shape in shapes:
        whole = _joined(whole, shape)
    return whole


def _joined(a: Shape, b: Shape) -> Shape:
    clear = a.clear and b.clear and not (a.more | (a.first if a.nullable else 0)) & b.first
    inner = a.inner | b.inner | (b.first if a.all else 0)
    first = a.first | (b.first if a.nullable else 0)
    more = b.more | (a.more | b.first if b.nullable else 0)
    return _shape(a.nullable and b.nullable, first, inner, more, clear)


def _either(shapes: list[Shape]) -> Shape:
    first = inner = more = 0
    clear = True
    for shape in shapes:
        clear = clear and shape.clear and not first & shape.first
        first |= shape.first
        inner |= shape.inner
        more |= shape.more
    return _shape(any(shape.nullable for shape in shapes), first, inner, more, clear)


def _repeated(item: Shape, node: Repeat) -> Shape:
    if node.most == 0:
        return NOTHING
    nullable = item.nullable or node.least == 0
    if node.most == 1:
        return _shape(nullable, item.first, item.inner, item.more, item.clear)
    clear = item.clear and not item.more & item.first
    more = item.more | item.first
    return _shape(nullable, item.first, item.inner | item.first, more, clear)


def _shape(nullable: bool, first: Set, inner: Set, more: Set, clear: bool) -> Shape:
    return Shape(nullable, first, inner, more if clear else first | inner, clear)


@dataclass(frozen=True, slots=True, eq=False)
class Terminal:
    shape: Shape


# A grammar of terminals, for `Flow`: the tree's leaves are terminals and names of rules.
Part = Terminal | str | tuple[str, tuple["Part", ...]]
SERIES, CHOICE, OPTION, LOOP = "series", "choice", "option", "loop"


# Visits of rules until nothing changes any more: rules need one pass for each level of use that
# they are written against, so that an unfortunate order of thousands takes minutes.
MAX_VISITS = 200_000


def _visited(visits: int, rules: Sized) -> int:
    visits += len(rules)
    if visits > MAX_VISITS:
        raise RequestError("the grammar has too many rules that lead to each other")
    return visits


class Flow:
    """Terminals that may follow each terminal of a grammar."""

    def __init__(self, rules: dict[str, Part]) -> None:
        self._rules = rules
        self._nullable: dict[str, bool] = dict.fromkeys(rules, False)
        self._first: dict[str, Set] = dict.fromkeys(rules, 0)
        self._behind: dict[str, Set] = dict.fromkeys(rules, 0)
        self.follow: dict[Terminal, Set] = {}
        self._changed = True
        visits = 0
        while self._changed:
            visits = _visited(visits, rules)
            self._changed = False
            for name, part in rules.items():
                nullable, first = self._start(part)
                if (nullable, first) != (self._nullable[name], self._first[name]):
                    self._nullable[name], self._first[name] = nullable, first
                    self._changed = True
        self._changed = True
        while self._changed:
            visits = _visited(visits, rules)
            self._changed = False
            for name, part in rules.items():
                self._walk(part, self._behind[name])

    def _start(self, part: Part) -> tuple[bool, Set]:
        if isinstance(part, Terminal):
            return part.shape.nullable, part.shape.first
        if isinstance(part, str):
            return self._nullable[part], self._first[part]
        kind, parts = part
        starts = [self._start(one) for one in parts]
        first = 0
        if kind == SERIES:
            for nullable, own in starts:
                first |= own
                if not nullable:
                    return False, first
            return True, first
        for _, own in starts:
            first |= own
        return kind == OPTION or any(nullable for nullable, _ in starts), first

    def _walk(self, part: Part, behind: Set) -> None:
        """Note that the characters `behind` may follow `part`."""
        if isinstance(part, Terminal):
            self.follow[part] = self.follow.get(part, 0) | behind
        elif isinstance(part, str):
            if behind & ~self._behind[part]:
                self._behind[part] |= behind
                self._changed = True
        else:
            kind, parts = part
            if kind == LOOP:
                behind |= self._start(part)[1]
            for one in reversed(parts):
                self._walk(one, behind)
                if kind == SERIES:
                    nullable, first = self._start(one)
                    behind = first | (behind if nullable else 0)
