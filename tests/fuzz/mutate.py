"""Valid messages, damaged: what a fuzz test feeds to whatever decodes them.

Messages that are built at random hardly ever get past the first check; those that are valid but
for one or two changes reach what lies behind it. A test loops over `mutators`, each of which is
a function of the seed and its number alone, so that what failed can be had again:

    for mutator in mutators("join"):
        body = mutator.json(VALID)
        ...                                   # says repr(mutator) when it fails

    FAILED = Mutator(seed=0, name="join", number=1234)
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec

from tests.fuzz.documents import Node, Pairs, Raw, from_json, from_msgpack, to_json, to_msgpack

T = TypeVar("T")

# What continuous integration runs; MEMSERVE_FUZZ_EXAMPLES is for long runs, MEMSERVE_FUZZ_SEED
# for others.
DEFAULT_EXAMPLES = 2_000
DEFAULT_SEED = 0
_MOST_CHANGES = 3  # of one message
_DEEP = (31, 33, 100, 1_000, 20_000)  # levels; Python's stack ends at 1,000 by default
_HUGE = (255, 256, 1_025, 65_536)  # characters
_REPEATED = (3, 17, 17, 17, 1_100, 5_000)  # elements of a list that had one
# Of a document that is not changed any more, since changes multiply: nodes, and characters.
_LARGE, _LONG = 1_000, 100_000

INTEGERS: tuple[int, ...] = (
    *(0, -1, 1, 2, 127, 128, 255, 256, 65_535, 65_536, 10**6),
    *(2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32 - 1, 2**32),
    *(2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64 - 1, 2**64, 10**400),
)
FLOATS: tuple[float, ...] = (
    *(0.0, -0.0, 0.1, -0.5, 1.5, 1e-320, 1e308, -1e308, 1e22),
    *(float("nan"), float("inf"), float("-inf")),
)
# What has a meaning somewhere: paths, addresses, formats, escape sequences, other scripts.
STRINGS: tuple[Node, ...] = (
    *("", " ", "\0", "a\0b", "\n", "a\r\nb: c", "\x1b[2J", "%s%n", "{0.__class__}", "$(id)"),
    *("..", "../../etc/passwd", "/dev/zero", "/", "a" * 5_000),
    *("null", "true", "NaN", "-1", "1e999", "0x10", "١٢", "1_000"),
    *("http://gpu1..local:8000", "http://[::1", "http://:0", "http://a@b:99999/", "file:///etc"),
    *("tcp://*:0", "tcp://127.0.0.1:1", "inproc://zeromq.zap.01", "ipc:///tmp/x", "ws://a"),
    *("é", "\u202e", "\ufeff", "\U0001f600" * 30, "\ud800", "\udfff\ud800", "\uffff"),
    *(b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\0"),
)
_OTHERS: tuple[Node, ...] = (None, True, False, 1, -1.5, "x", b"x")
# Where lengths, ends and nesting are written.
_BYTES = (
    *(b"", b"\0", b"\xff", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b":", b",", b'"', b"\\"),
    *(b"{", b"}", b"[", b"]", b"0", b"-", b"\x80", b"\x90", b"\xc0", b"\xc1", b"\xd9\xff"),
    *(b"\xff" * 8, b"\0" * 8, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\0\1\0\0"),
)


class Mutator:
    """Damages messages: the same ones in the same way for the same `seed`, `name`, `number`."""

    def __init__(self, seed: int, name: str, number: int) -> None:
        self.random = random.Random(f"{seed} {name} {number}")
        self._words = f"Mutator(seed={seed}, name={name!r}, number={number})"

    def __repr__(self) -> str:
        return self._words

    def one_of(self, valid: Sequence[T]) -> T:
        return self.random.choice(valid)

    def bytes(self, valid: bytes) -> bytes:
        """Damaged without regard to what it means."""
        for _ in range(self._changes()):
            valid = self.random.choice(_ON_BYTES)(self.random, valid)
        return valid

    def text(self, valid: str) -> bytes:
        """Damaged by lines (dropped, duplicated, swapped), and then, one time in two, as bytes."""
        lines = valid.encode().splitlines(keepends=True)
        for _ in range(self._changes()):
            _change_list(self.random, lines)
        joined = b"".join(lines)
        return self.bytes(joined) if self.random.random() < 0.5 else joined

    def tree(self, valid: Node) -> Node:
        """Damaged by nodes. `valid` is left alone; what comes back is for `documents.to_*`."""
        root = [_copied(valid)]
        for _ in range(self._changes()):
            _change_tree(self.random, root)
        return root[0]

    def json(self, valid: bytes | str) -> bytes:
        """A JSON document, damaged by nodes, and now and then as bytes."""
        return self._seldom_bytes(to_json(self.tree(from_json(valid))))

    def msgpack(self, valid: bytes) -> bytes:
        """A msgpack document, damaged by nodes, and now and then as bytes."""
        return self._seldom_bytes(to_msgpack(self.tree(from_msgpack(valid))))

    def frames(self, valid: Sequence[bytes], body: Callable[[bytes], bytes]) -> list[bytes]:
        """A message of several frames: mostly its last one is damaged by `body` (a method of
        this mutator), else another one as bytes, or frames are dropped, doubled or swapped."""
        frames = list(valid)
        what = self.random.random()
        if what < 0.8:
            frames[-1] = body(frames[-1])
        elif what < 0.9:
            place = self.random.randrange(len(frames))
            frames[place] = self.bytes(frames[place])
        else:
            _change_list(self.random, frames)
        return frames

    def _changes(self) -> int:
        return self.random.choice((1, 1, 1, 2, _MOST_CHANGES))

    def _seldom_bytes(self, encoded: bytes) -> bytes:
        return self.bytes(encoded) if self.random.random() < 0.15 else encoded


def mutators(name: str, examples: int | None = None) -> Iterator[Mutator]:
    """As many as were asked for in the environment; `examples` instead of the default 2,000."""
    count = int(os.environ.get("MEMSERVE_FUZZ_EXAMPLES", examples or DEFAULT_EXAMPLES))
    seed = int(os.environ.get("MEMSERVE_FUZZ_SEED", DEFAULT_SEED))
    for number in range(count):
        yield Mutator(seed, name, number)


def _flip(source: random.Random, data: bytes) -> bytes:
    if not data:
        return b"\xff"
    place = source.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << source.randrange(8))]) + data[place + 1 :]


def _span(source: random.Random, data: bytes) -> tuple[int, int]:
    first = source.randrange(len(data) + 1)
    return first, min(len(data), first + source.choice((1, 1, 2, 4, 8, 64)))


def _cut(source: random.Random, data: bytes) -> bytes:
    first, last = _span(source, data)
    return data[:first] + data[last:]


def _truncate(source: random.Random, data: bytes) -> bytes:
    return data[: source.randrange(len(data) + 1)]


def _double(source: random.Random, data: bytes) -> bytes:
    first, last = _span(source, data)
    return data[:last] + data[first:last] * source.choice((1, 1, 2, 500)) + data[last:]


def _insert(source: random.Random, data: bytes) -> bytes:
    place = source.randrange(len(data) + 1)
    return data[:place] + source.choice(_BYTES) + data[place:]


def _overwrite(source: random.Random, data: bytes) -> bytes:
    first, last = _span(source, data)
    return data[:first] + source.randbytes(last - first) + data[last:]


def _exchange(source: random.Random, data: bytes) -> bytes:
    a, b, c = sorted(source.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


_ON_BYTES = (_flip, _flip, _cut, _truncate, _double, _insert, _overwrite, _exchange)


def _change_list(source: random.Random, items: list[T]) -> None:
    """Drop, double, swap or repeat elements."""
    if not items:
        return
    place = source.randrange(len(items))
    match source.choice(("drop", "double", "swap", "repeat", "end")):
        case "drop":
            del items[place]
        case "double":
            items.insert(source.randrange(len(items) + 1), items[place])
        case "swap":
            other = source.randrange(len(items))
            items[place], items[other] = items[other], items[place]
        case "repeat" if len(items) < max(_REPEATED):
            items[place:place] = [items[place]] * source.choice(_REPEATED)
        case _:
            del items[place:]


def _change_tree(source: random.Random, root: list[Node]) -> None:
    places = _places(root)
    if len(places) > _LARGE or _characters(root) > _LONG:
        return
    holder, key = source.choice(places)
    old = _at(holder, key)
    chosen = source.random()
    if chosen < 0.55:
        _put(holder, key, _damaged(source, old))
    elif chosen < 0.62:  # what is valid somewhere else in the document
        _put(holder, key, _copied(_at(*source.choice(places))))
    elif chosen < 0.74:
        _put(holder, key, source.choice((*_OTHERS, [], Pairs(), [old], Pairs([("a", old)]))))
    elif chosen < 0.77:
        _put(holder, key, _nested(source))
    elif chosen < 0.85 and isinstance(holder, Pairs):
        holder[key] = (_damaged(source, holder[key][0]), holder[key][1])
    elif holder is not root:  # its siblings
        _change_list(source, holder)


def _characters(node: Node) -> int:
    """Of all its strings, and of what is encoded already."""
    match node:
        case str() | bytes():
            return len(node)
        case Raw():
            return len(node.data)
        case Pairs():
            return sum(_characters(key) + _characters(value) for key, value in node)
        case list():
            return sum(map(_characters, node))
        case _:
            return 0


def _damaged(source: random.Random, value: Node) -> Node:
    """Another value of the same type, at the edge of what the type has."""
    match value:
        case bool():
            return not value
        case int():
            near = value + source.choice((-1, 1))
            return source.choice((source.choice(INTEGERS), near, -value, _numeral(source)))
        case float():
            return source.choice(
                (source.choice(FLOATS), value * 2, -value, round(source.random(), 3))
            )
        case str():
            encoded = value.encode("utf-8", "surrogatepass")
            damaged = source.choice(_ON_BYTES)(source, encoded)
            huge = (value or "x")[:16] * source.choice(_HUGE)
            return source.choice((source.choice(STRINGS), damaged, huge))
        case bytes():
            return _damaged_bytes(source, value)
        case list() if value:
            changed = type(value)(value)
            _change_list(source, changed)
            return changed
        case _:
            return source.choice((*INTEGERS, *FLOATS, *STRINGS))


def _damaged_bytes(source: random.Random, value: bytes) -> Node:
    """As a message of its own, if it is one."""
    try:
        inner = from_msgpack(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        inner = None
    if isinstance(inner, list) and source.random() < 0.7:
        root = [inner]
        _change_tree(source, root)
        return to_msgpack(root[0])
    huge = (value or b"\0")[:16] * source.choice(_HUGE)
    return source.choice((source.choice(_ON_BYTES)(source, value), huge, b""))


def _numeral(source: random.Random) -> Raw:
    """A number that only JSON can write; msgpack reads other things from it."""
    return Raw(source.choice((b"1e999", b"-0", b"1E-999", b"9" * 5_000, b"01", b"1.", b"0.1e1")))


def _nested(source: random.Random) -> Raw:
    """JSON's lists, JSON's objects, or msgpack's lists, deep."""
    depth = source.choice(_DEEP)
    kinds = (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth)
    return Raw(source.choice((*kinds, b"\x91" * depth + b"\xc0", b"\x81\xa1a" * depth + b"\xc0")))


def _places(root: list[Node]) -> list[tuple[list[Node], int]]:
    """Holder and index of every node; those of an object hold key and value."""
    found: list[tuple[list[Node], int]] = []
    holders = [root]
    for holder in holders:
        for index in range(len(holder)):
            found.append((holder, index))
            if isinstance(value := _at(holder, index), list):
                holders.append(value)
    return found


def _at(holder: list[Node], index: int) -> Node:
    return holder[index][1] if isinstance(holder, Pairs) else holder[index]


def _put(holder: list[Node], index: int, value: Node) -> None:
    holder[index] = (holder[index][0], value) if isinstance(holder, Pairs) else value


def _copied(node: Node) -> Node:
    if isinstance(node, Pairs):
        return Pairs((key, _copied(value)) for key, value in node)
    return [_copied(each) for each in node] if isinstance(node, list) else node
