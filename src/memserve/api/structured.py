"""Fields of a request that constrain its answer: OpenAI's `response_format`, vLLM's
`structured_outputs` and its older `guided_json`, `guided_regex`, `guided_choice` and
`guided_grammar`.

At most one constraint per request. The instance that answers compiles it, and refuses what it
cannot enforce; here only the form is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from memserve.api.errors import NotUnderstood, invalid
from memserve.api.grammar import Grammar, GrammarKind
from memserve.api.limits import MAX_CHOICES, MAX_ECHO_CHARACTERS, MAX_GRAMMAR_CHARACTERS

GUIDED: Final = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
FIELDS: Final = ("response_format", "structured_outputs", *GUIDED)

_Text = Annotated[str, Meta(min_length=1)]
_NONE = (UNSET,) * len(FIELDS)
_values = attrgetter(*FIELDS)


class _JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    schema: msgspec.Raw
    description: str | None = None
    strict: bool | None = None  # enforced always


class _ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: _JsonSchema | None = None
    # Of a structural tag.
    format: msgspec.Raw | UnsetType = UNSET
    structures: msgspec.Raw | UnsetType = UNSET
    triggers: msgspec.Raw | UnsetType = UNSET


class _StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first six are constraints. None: not given."""

    json: msgspec.Raw | UnsetType = UNSET
    regex: _Text | None = None
    choice: Annotated[tuple[_Text, ...], Meta(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: _Text | None = None
    structural_tag: msgspec.Raw | UnsetType = UNSET
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_fallback: bool | None = None  # there is one compiler
    disable_additional_properties: Literal[False] | None = None
    whitespace_pattern: None = None

    def constraints(self) -> Iterator[tuple[str, GrammarKind, str]]:
        """Yield name, kind and source of each constraint."""
        if self.json is not UNSET and (schema := _json_text(self.json)) != "null":
            yield "json", GrammarKind.JSON_SCHEMA, schema
        if self.regex is not None:
            yield "regex", GrammarKind.REGEX, self.regex
        if self.choice is not None:
            yield "choice", GrammarKind.CHOICE, msgspec.json.encode(self.choice).decode()
        if self.grammar is not None:
            yield "grammar", GrammarKind.EBNF, self.grammar
        if self.structural_tag is not UNSET and (tag := _json_text(self.structural_tag)) != "null":
            yield "structural_tag", GrammarKind.STRUCTURAL_TAG, tag
        if self.json_object:
            yield "json_object", GrammarKind.JSON_OBJECT, ""


_formats = msgspec.json.Decoder(_ResponseFormat | None)
_outputs = msgspec.json.Decoder(_StructuredOutputs | None)
_string = msgspec.json.Decoder(str)


def grammar_of(request: Any) -> Grammar | None:
    """Return the grammar of a request that has the fields FIELDS, each `msgspec.Raw` or UNSET.
    None: its answer is not constrained. Raises ApiError (400) that names the field at fault."""
    values = _values(request)
    if values == _NONE:
        return None
    return _chosen(dict(zip(FIELDS, values, strict=True)))


def _chosen(fields: dict[str, msgspec.Raw | UnsetType]) -> Grammar | None:
    found = [
        grammar
        for field, value in fields.items()
        if value is not UNSET and (grammar := _grammar(field, value)) is not None
    ]
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(f"'{grammar.param}'" for grammar in found)
        raise invalid(f"{names}: a request has at most one constraint.", found[1].param)
    (grammar,) = found
    if len(grammar.source) > MAX_GRAMMAR_CHARACTERS:
        raise invalid(
            f"'{grammar.param}' has {len(grammar.source)} characters, and at most "
            f"{MAX_GRAMMAR_CHARACTERS} may be.",
            grammar.param,
        )
    return grammar


def _grammar(field: str, value: msgspec.Raw) -> Grammar | None:
    try:
        if field == "response_format":
            return _of_format(_formats.decode(value), value)
        if field == "structured_outputs":
            return _of_outputs(_outputs.decode(value))
        return _of_guided(field, value)
    except msgspec.ValidationError as error:
        raise _misformed(field, error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"'{field}' is not valid JSON: {error}", field) from error


def _of_format(given: _ResponseFormat | None, value: msgspec.Raw) -> Grammar | None:
    if given is None or given.type == "text":
        return None
    param = "response_format"
    if given.type == "json_object":
        return Grammar(GrammarKind.JSON_OBJECT, param=param)
    if given.type == "structural_tag":
        return Grammar(GrammarKind.STRUCTURAL_TAG, bytes(value).decode(), param=param)
    if given.json_schema is None:
        raise invalid("'response_format' of type 'json_schema' needs 'json_schema'.", param)
    source = bytes(given.json_schema.schema).decode()
    return Grammar(GrammarKind.JSON_SCHEMA, source, param=param)


def _of_outputs(given: _StructuredOutputs | None) -> Grammar | None:
    if given is None:
        return None
    found = list(given.constraints())
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(f"'{name}'" for name, _, _ in found)
        raise invalid(
            f"'structured_outputs' has {names}: one constraint is possible.", "structured_outputs"
        )
    ((name, kind, source),) = found
    compact = bool(given.disable_any_whitespace)
    return Grammar(kind, source, compact, f"structured_outputs.{name}")


def _of_guided(field: str, value: msgspec.Raw) -> Grammar | None:
    """Return the grammar of `guided_NAME`, which means `structured_outputs: {NAME: ...}`."""
    name = GUIDED[field]
    given = _outputs.decode(b'{"%s":%s}' % (name.encode(), bytes(value)))
    assert given is not None
    for _, kind, source in given.constraints():
        return Grammar(kind, source, param=field)
    return None


def _json_text(value: msgspec.Raw) -> str:
    """Return JSON that was given as such, or as a string that contains it."""
    text = bytes(value).decode()
    return _string.decode(text) if text.startswith('"') else text


def _misformed(field: str, error: msgspec.ValidationError) -> NotUnderstood:
    return NotUnderstood(f"'{field}': {str(error)[:MAX_ECHO_CHARACTERS]}", field)
