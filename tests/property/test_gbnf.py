"""Random GBNF grammars over two letters: exactly the texts that the rules derive are taken."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.api.grammar import Grammar, GrammarKind
from memserve.errors import RequestError
from memserve.grammars.compiler import GrammarCompiler
from memserve.grammars.gbnf import Characters, Node, OneOf, Reference, Repeat, Series, Text, parse
from memserve.models.tokenizer import Tokenizer
from tests.fakes import tiny_tokenizer
from tests.grammar_harness import matches

LONGEST = 4
TEXTS = ["".join(letters) for n in range(LONGEST + 1) for letters in product("ab", repeat=n)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return tiny_tokenizer(directory)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, 320)


def random_grammar(random: Random) -> str:
    names = ["root", "x", "y"][: random.randint(1, 3)]
    return "\n".join(f"{name} ::= {_alternatives(random, names, 2)}" for name in names)


def _alternatives(random: Random, names: list[str], depth: int) -> str:
    count = random.choice([1, 1, 2])
    return " | ".join(_series(random, names, depth) for _ in range(count))


def _series(random: Random, names: list[str], depth: int) -> str:
    return " ".join(_item(random, names, depth) for _ in range(random.choice([0, 1, 2, 2, 3])))


def _item(random: Random, names: list[str], depth: int) -> str:
    atoms = ['"a"', '"b"', '"ab"', '"aba"', "[ab]", "[^b]", *names]
    if depth and random.random() < 0.3:
        item = f"({_alternatives(random, names, depth - 1)})"
    else:
        item = random.choice(atoms)
    return item + random.choice(["", "", "", "*", "+", "?", "{2}", "{1,2}", "{,3}"])


def language(rules: dict[str, Node]) -> set[str]:
    """All texts of `root` up to LONGEST, by derivation until nothing new is found."""
    found: dict[str, set[str]] = {name: set() for name in rules}
    while True:
        grown = {name: found[name] | _texts(node, found) for name, node in rules.items()}
        if grown == found:
            return found["root"]
        found = grown


def _texts(node: Node, found: dict[str, set[str]]) -> set[str]:
    if isinstance(node, Characters):
        return {one for one in "ab" if any(lo <= ord(one) <= hi for lo, hi in node.ranges)}
    if isinstance(node, Text):
        return {node.text} if len(node.text) <= LONGEST else set()
    if isinstance(node, Reference):
        return found[node.name]
    if isinstance(node, OneOf):
        return set().union(*(_texts(item, found) for item in node.items))
    if isinstance(node, Series):
        whole = {""}
        for item in node.items:
            whole = _then(whole, _texts(item, found))
        return whole
    assert isinstance(node, Repeat)
    own = _texts(node.item, found)
    once, whole = {""}, set() if node.least else {""}
    for times in range(1, (node.least + LONGEST if node.most is None else node.most) + 1):
        once = _then(once, own)
        if times >= node.least:
            whole |= once
    return whole


def _then(first: set[str], second: set[str]) -> set[str]:
    return {a + b for a in first for b in second if len(a + b) <= LONGEST}


@given(seed=st.integers(0, 1_000_000))
@settings(max_examples=80, deadline=None)
def test_a_grammar_takes_what_it_derives_and_nothing_else(
    tokenizer: Tokenizer, compiler: GrammarCompiler, seed: int
) -> None:
    source = random_grammar(Random(seed))
    texts = language(parse(source))
    try:
        grammar = compiler.compile(Grammar(GrammarKind.EBNF, source))
    except RequestError:
        assert texts <= {""}, source
        return
    taken = {text: matches(grammar, tokenizer, text) for text in TEXTS}
    assert [text for text in TEXTS if taken[text] not in (None, text in texts)] == [], source
