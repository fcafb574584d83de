"""Translation of GBNF into llguidance's Lark.

What does not lead back to itself is a regular expression, and becomes one terminal, unless that
would change what the grammar means (`lexemes.py`): then it is divided, in the end into single
characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from memserve.api.limits import MAX_GRAMMAR_SYMBOLS, MAX_LARK_RULES, MAX_TERMINALS
from memserve.errors import RequestError
from memserve.grammars import gbnf
from memserve.grammars.gbnf import Characters, Node, OneOf, Range, Reference, Repeat, Series, Text
from memserve.grammars.lexemes import (
    CHOICE,
    LOOP,
    OPTION,
    SERIES,
    Alphabet,
    Flow,
    Part,
    Shape,
    Terminal,
    shape_of,
)

# Symbols looked at in all rounds of dividing terminals: a fifth of a second.
ROUND_SYMBOLS: Final = 100_000
_DEFINITION: Final = re.compile(r"^[ \t]*[?!]?[A-Za-z_][^\s:\"/]*[ \t]*:", re.MULTILINE)
_ANY: Final = r"/[\x{0}-\x{10ffff}]/"


def lark_source(grammar: str) -> str:
    """Return GBNF, or Lark as it is, in Lark. Raises RequestError."""
    if gbnf.is_gbnf(grammar):
        return lark_of(grammar)
    rules = len(_DEFINITION.findall(grammar))
    if rules > MAX_LARK_RULES:
        raise RequestError(f"the grammar has {rules} rules, and at most {MAX_LARK_RULES} may be")
    return grammar


def lark_of(source: str) -> str:
    """Return a GBNF grammar in Lark. Raises RequestError."""
    rules = gbnf.parse(source)
    return _Translation(rules).write()


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """A terminal in the making: the nodes that it consists of."""

    items: tuple[Node, ...]


class _Translation:
    def __init__(self, rules: dict[str, Node]) -> None:
        self._rules = rules
        self._number = {name: number for number, name in enumerate(rules)}
        self._regular = _regular_rules(rules)
        self._alphabet = Alphabet(_ranges(rules))
        self._shapes: dict[str, Shape] = {}
        self._divided: set[Node] = set()  # nodes that must not be a terminal, or a part of one
        self._runs: dict[Terminal, _Run] = {}
        self._names: dict[str, str] = {}  # of terminals, by what they are in Lark
        self._written: dict[str, str] = {}  # of terminals, by the rule that they are

    def write(self) -> str:
        if "root" in self._regular:
            lines = [f"start: {self._terminal(Series((self._rules['root'],)))}"]
        else:
            self._divide()
            lines = ["start: r0"]
            used = self._used_rules()
            number = {name: at for at, name in enumerate(used)}
            for name in used:
                body = self._rule(self._rules[name], lambda other: f"r{number[other]}")
                lines.append(f"r{number[name]}: {body}")
        return "\n".join([*lines, *(f"{name}: {body}" for body, name in self._names.items()), ""])

    # --- terminals ------------------------------------------------------------------------

    def _divide(self) -> None:
        """Divide terminals until none of them takes what is meant for another."""
        rounds = max(3, ROUND_SYMBOLS // sum(map(_size, self._rules.values())))
        for _ in range(rounds):
            self._runs = {}
            parts = {name: self._part(self._rules[name]) for name in self._used_rules()}
            follow: dict[str, tuple[Terminal, int]] = {}
            for terminal, behind in Flow(parts).follow.items():
                key = repr(self._runs[terminal].items)
                _, known = follow.get(key, (terminal, 0))
                follow[key] = terminal, known | behind
            if len(follow) > MAX_TERMINALS:
                raise RequestError(f"the grammar has more than {MAX_TERMINALS} terminals")
            greedy = {key for key in follow if _is_greedy(key, follow)}
            if not greedy:
                return
            for run in self._runs.values():
                if repr(run.items) in greedy:
                    self._divided.add(run.items[-1])
        raise RequestError("the grammar is too ambiguous for its size")

    def _part(self, node: Node) -> Part:
        if isinstance(node, Series):
            return SERIES, tuple(self._pieces(node.items))
        return self._piece(node)

    def _pieces(self, items: tuple[Node, ...]) -> Iterator[Part]:
        for run in self._split(items):
            yield self._noted(run) if isinstance(run, _Run) else self._piece(run)

    def _piece(self, node: Node) -> Part:
        if isinstance(node, Characters) or self._is_terminal(node):
            return self._noted(_Run((node,)))
        if isinstance(node, Reference):
            return node.name
        if isinstance(node, Repeat):
            kind = OPTION if node.least == 0 else SERIES
            inner = self._part(node.item)
            return kind, ((LOOP, (inner,)) if node.most != 1 else inner,)
        if isinstance(node, OneOf):
            return CHOICE, tuple(map(self._part, node.items))
        if isinstance(node, Text):
            return SERIES, tuple(self._noted(_Run((one,))) for one in _letters(node))
        return self._part(node)

    def _split(self, items: tuple[Node, ...]) -> Iterator[_Run | Node]:
        """Yield the nodes of a series, with each run of those that may be one terminal."""
        run: list[Node] = []
        for item in items:
            if self._is_terminal(item):
                run.append(item)
                continue
            if run:
                yield _Run(tuple(run))
                run = []
            yield item
        if run:
            yield _Run(tuple(run))

    def _is_terminal(self, node: Node) -> bool:
        if node in self._divided:
            return False
        if isinstance(node, Reference):
            return node.name in self._regular
        if isinstance(node, Repeat):
            return self._is_terminal(node.item)
        return isinstance(node, Characters | Text) or all(map(self._is_terminal, node.items))

    def _noted(self, run: _Run) -> Terminal:
        terminal = Terminal(shape_of(Series(run.items), self._alphabet, self._shape))
        self._runs[terminal] = run
        return terminal

    def _shape(self, name: str) -> Shape:
        if name not in self._shapes:
            self._shapes[name] = shape_of(self._rules[name], self._alphabet, self._shape)
        return self._shapes[name]

    def _used_rules(self) -> list[str]:
        """Return the rules that are not within terminals, `root` first."""
        found = {"root": None}
        waiting = ["root"]
        while waiting:
            for name in self._outside(self._rules[waiting.pop()]):
                if name not in found:
                    found[name] = None
                    waiting.append(name)
        return list(found)

    def _outside(self, node: Node) -> Iterator[str]:
        if isinstance(node, Characters | Text) or self._is_terminal(node):
            return
        if isinstance(node, Reference):
            yield node.name
        elif isinstance(node, Repeat):
            yield from self._outside(node.item)
        else:
            for item in node.items:
                yield from self._outside(item)

    # --- Lark -----------------------------------------------------------------------------

    def _rule(self, node: Node, named: Callable[[str], str]) -> str:
        if isinstance(node, Series):
            parts = [
                self._terminal(Series(run.items))
                if isinstance(run, _Run)
                else self._rule(run, named)
                for run in self._split(node.items)
            ]
            return f"({' '.join(parts)})" if parts else '""'
        if isinstance(node, Characters) or self._is_terminal(node):
            return self._terminal(node)
        if isinstance(node, Text):
            return f"({' '.join(map(self._terminal, _letters(node)))})"
        if isinstance(node, Reference):
            return named(node.name)
        if isinstance(node, Repeat):
            return f"({self._rule(node.item, named)}){_times(node)}"
        return f"({' | '.join(self._rule(item, named) for item in node.items)})"

    def _terminal(self, node: Node) -> str:
        """Return the name of a terminal."""
        return self._named(self._expression(node))

    def _named(self, body: str) -> str:
        return self._names.setdefault(body, f"T{len(self._names)}")

    def _expression(self, node: Node) -> str:
        if isinstance(node, Characters):
            return _lark_set(node.ranges)
        if isinstance(node, Text):
            return json.dumps(node.text)
        if isinstance(node, Reference):
            if node.name not in self._written:  # written once, however often it is used
                self._written[node.name] = self._terminal(self._rules[node.name])
            return self._written[node.name]
        if isinstance(node, Repeat):
            return f"({self._expression(node.item)}){_times(node)}"
        mark = " " if isinstance(node, Series) else " | "
        return f"({mark.join(map(self._expression, node.items))})" if node.items else '""'


def _is_greedy(key: str, follow: dict[str, tuple[Terminal, int]]) -> bool:
    """Whether a terminal may take a character which is meant for what follows it, or for what
    follows another terminal that begins in the same way."""
    terminal, behind = follow[key]
    shape = terminal.shape
    if not (shape.inner or shape.nullable):  # one character
        return False
    if (shape.more | (shape.first if shape.nullable else 0)) & behind:
        return True
    return any(
        shape.inner & own and shape.first & other.shape.first
        for name, (other, own) in follow.items()
        if name != key
    )


def _letters(node: Text) -> list[Characters]:
    return [Characters(((ord(one), ord(one)),)) for one in node.text]


def _times(node: Repeat) -> str:
    return f"{{{node.least},{'' if node.most is None else node.most}}}"


def _lark_set(ranges: tuple[Range, ...]) -> str:
    if ranges == gbnf.ANY:
        return _ANY
    parts = (f"\\x{{{low:x}}}-\\x{{{high:x}}}" for low, high in ranges)
    return f"/[{''.join(parts)}]/"


def _used(node: Node) -> Iterator[str]:
    """Yield the names of the rules that a node refers to."""
    if isinstance(node, Reference):
        yield node.name
    elif isinstance(node, Repeat):
        yield from _used(node.item)
    elif isinstance(node, Series | OneOf):
        for item in node.items:
            yield from _used(item)


def _ranges(rules: dict[str, Node]) -> Iterator[Range]:
    waiting = list(rules.values())
    while waiting:
        node = waiting.pop()
        if isinstance(node, Characters):
            yield from node.ranges
        elif isinstance(node, Text):
            yield from ((ord(one), ord(one)) for one in node.text)
        elif isinstance(node, Repeat):
            waiting.append(node.item)
        elif isinstance(node, Series | OneOf):
            waiting.extend(node.items)


def _size(node: Node) -> int:
    if isinstance(node, Repeat):
        return 1 + _size(node.item)
    if isinstance(node, Series | OneOf):
        return 1 + sum(map(_size, node.items))
    return 1


def _regular_rules(rules: dict[str, Node]) -> set[str]:
    """Return the rules that are not recursive. Raises RequestError for a rule that is not there,
    and for more than MAX_GRAMMAR_SYMBOLS in one, with the rules that it uses written out."""
    uses = {name: list(_used(node)) for name, node in rules.items()}
    users: dict[str, list[str]] = {name: [] for name in rules}
    waiting: dict[str, set[str]] = {}
    for name, used in uses.items():
        waiting[name] = set(used)
        for other in waiting[name]:
            if other not in rules:
                raise RequestError(f"rule '{other[:64]}' of the grammar is not defined")
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
    return set(sizes)
