"""The grammar that an answer must obey, in the form in which it travels between processes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from memserve.api.limits import MAX_GRAMMAR_CHARACTERS, MAX_ID_CHARACTERS


class GrammarKind(StrEnum):
    """The language of a grammar's source; names are vLLM's."""

    JSON_SCHEMA = "json_schema"  # a JSON schema, as JSON
    JSON_OBJECT = "json_object"  # any JSON object; without source
    REGEX = "regex"
    CHOICE = "choice"  # a JSON array of texts, one of which is the whole answer
    EBNF = "ebnf"  # GBNF: EBNF as llama.cpp writes it; without `::=`, Lark as llguidance reads it
    STRUCTURAL_TAG = "structural_tag"  # text with constrained parts, as JSON


class Grammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A grammar. Equal grammars are compiled once."""

    kind: GrammarKind
    source: Annotated[str, Meta(max_length=MAX_GRAMMAR_CHARACTERS)] = ""
    compact: bool = False  # JSON without white space outside of its strings
    # The request's field that it comes from, for errors.
    param: Annotated[str, Meta(max_length=MAX_ID_CHARACTERS)] = "response_format"
