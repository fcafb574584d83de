"""Grammars for the tests' tokenizer, and what an answer must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

from memserve.api.grammar import Grammar, GrammarKind
from memserve.errors import GrammarFailed
from memserve.grammars.compiler import GrammarCompiler, LibraryGrammar
from memserve.models.tokenizer import Tokenizer
from tests.fakes import save_tiny_tokenizer
from tests.tiny_models import VOCAB, save_tiny_model


def save_model(directory: Path) -> Path:
    """A tiny model whose logits are wider than its tokenizer, and whose end token is a text."""
    made = save_tiny_model("llama", directory)
    save_tiny_tokenizer(made)
    return made


def compiler_of(model: Path) -> GrammarCompiler:
    return GrammarCompiler(Tokenizer.load(model), VOCAB)


def schema_grammar(schema: Any, compact: bool = False) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema), compact)


def check(text: str, schema: Any) -> None:
    """Raise if `text` is not JSON that obeys the schema."""
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


def matches(grammar: LibraryGrammar, tokenizer: Tokenizer, text: str) -> bool | None:
    """Whether the grammar takes the text as a whole. None: it failed, since what it wants has no
    end, or can be read in too many ways."""
    matcher = grammar.matcher()
    try:
        for token in tokenizer.encode(text, add_special_tokens=False):
            if matcher.ended or not _allows(matcher.allowed()[0], token):
                return False
            matcher.accept(token)
        return matcher.ended or matcher.allowed()[1]
    except GrammarFailed:
        return None


def _allows(bits: Any, token: int) -> bool:
    return bool(bits[token // 8] >> token % 8 & 1)
