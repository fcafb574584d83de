"""Mutants of valid JSON: most of them still decode far enough to reach what comes behind."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

EXAMPLES = int(os.environ.get("MEMSERVE_FUZZ_EXAMPLES", "2000"))  # of each test
SEED = int(os.environ.get("MEMSERVE_FUZZ_SEED", "0"))

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 16, 127, 128, 129, 1024, 1025, 2**31 - 1, 2**31, -(2**31),
    2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 0.0, 0.5, -0.5, 1e-320,
    1e308, -1e308, "", " ", "a", "\x00", "\ud83d\ude00", "é" * 300, "a" * 70_000, [], {}, [[]],
    [None], [0], [-1], [1.5], [2**31], ["a"], [""], [[1], [2]], ["a", [1]], [1, "a"], {"": ""},
    {"1": 1}, {"-1": 1}, {"a": {"b": []}}, [[[[[[]]]]]], ["a"] * 2000, [7] * 3000, [[1]] * 1100,
)  # fmt: skip
_BYTES = (b"\x00", b"\xff", b"\xc3", b"[", b"]", b"{", b"}", b'"', b"\\", b",", b":", b"e", b"-",
          b"NaN", b"1e999", b"Infinity", b"\\ud800", b"\\u0000", b"\n", b"[" * 40, b"[" * 2000,
          b"9" * 400, b"9" * 5000, b"\xed\xa0\x80")  # fmt: skip


def mutants(valid: Sequence[Any], count: int = EXAMPLES) -> Iterator[bytes]:
    """`count` bodies, the same for the same seed (MEMSERVE_FUZZ_SEED)."""
    choice = random.Random(SEED)
    for _ in range(count):
        tree = json.loads(json.dumps(choice.choice(valid)))
        for _ in range(choice.randrange(4)):
            tree = _mutated(tree, choice)
        body = json.dumps(tree, ensure_ascii=choice.random() < 0.7).encode("utf-8", "surrogatepass")
        for _ in range(choice.choice((0, 0, 1, 2))):
            body = _broken(body, choice)
        yield body


def _mutated(tree: Any, choice: random.Random) -> Any:
    """One node of it is another now."""
    if isinstance(tree, dict) and tree and choice.random() < 0.9:
        key = choice.choice(list(tree))
        what = choice.random()
        if what < 0.1:
            del tree[key]
        elif what < 0.2:
            tree[choice.choice((key + "x", "", "stop", "n", "prompt", "x" * 3000))] = tree[key]
        else:
            tree[key] = _mutated(tree[key], choice)
        return tree
    if isinstance(tree, list) and tree and choice.random() < 0.8:
        at = choice.randrange(len(tree))
        what = choice.random()
        if what < 0.1:
            del tree[at]
        elif what < 0.2:
            tree[at:at] = tree * choice.choice((1, 50))
        else:
            tree[at] = _mutated(tree[at], choice)
        return tree
    return json.loads(json.dumps(choice.choice(_VALUES)))


def _broken(body: bytes, choice: random.Random) -> bytes:
    at = choice.randrange(len(body) + 1)
    end = min(len(body), at + choice.choice((0, 1, 1, 5, 200)))
    insert = choice.choice((b"", choice.choice(_BYTES), body[at:end] * 2))
    return body[:at] + insert + body[end:]
