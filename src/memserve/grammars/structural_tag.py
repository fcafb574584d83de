"""Translation of structural tags (text with constrained parts) into llguidance's grammars.

Both forms that vLLM takes: `{"structures": [{begin, schema, end}], "triggers": [...]}`, and
`{"format": {...}}`, whose formats nest. A text in a tag that is the name of one of the model's
special tokens stands for that token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from memserve.api.limits import MAX_GRAMMAR_DEPTH, MAX_INT32
from memserve.errors import RequestError
from memserve.grammars.gbnf_lark import lark_source
from memserve.grammars.json_schema import check_schema, json_options

_Text = Annotated[str, Meta(min_length=1)]
_Schema = dict[str, Any] | bool


class ConstString(msgspec.Struct, tag="const_string", forbid_unknown_fields=True):
    value: str


class JsonSchema(msgspec.Struct, tag="json_schema", forbid_unknown_fields=True):
    json_schema: _Schema


class AnyText(msgspec.Struct, tag="any_text", forbid_unknown_fields=True):
    """Any text up to the end of the tag around it."""


class Regex(msgspec.Struct, tag="regex", forbid_unknown_fields=True):
    pattern: _Text


class GrammarText(msgspec.Struct, tag="grammar", forbid_unknown_fields=True):
    grammar: _Text


class InSequence(msgspec.Struct, tag="sequence", forbid_unknown_fields=True):
    elements: Annotated[list[Format], Meta(min_length=1)]


class Or(msgspec.Struct, tag="or", forbid_unknown_fields=True):
    elements: Annotated[list[Format], Meta(min_length=1)]


class AtMostOnce(msgspec.Struct, tag="optional", forbid_unknown_fields=True):
    content: Format


class Plus(msgspec.Struct, tag="plus", forbid_unknown_fields=True):
    content: Format


class Star(msgspec.Struct, tag="star", forbid_unknown_fields=True):
    content: Format


class Repeat(msgspec.Struct, tag="repeat", forbid_unknown_fields=True):
    content: Format
    min: Annotated[int, Meta(ge=0, le=MAX_INT32)]
    max: Annotated[int, Meta(ge=-1, le=MAX_INT32)]  # -1: no limit


class Tag(msgspec.Struct, tag="tag", forbid_unknown_fields=True):
    begin: str
    content: Format
    end: str | Annotated[list[str], Meta(min_length=1)]

    @property
    def ends(self) -> tuple[str, ...]:
        return (self.end,) if isinstance(self.end, str) else tuple(self.end)


class TriggeredTags(msgspec.Struct, tag="triggered_tags", forbid_unknown_fields=True):
    triggers: Annotated[list[_Text], Meta(min_length=1)]
    tags: Annotated[list[Tag], Meta(min_length=1)]
    at_least_one: bool = False  # the text begins with a tag
    stop_after_first: bool = False


class TagsWithSeparator(msgspec.Struct, tag="tags_with_separator", forbid_unknown_fields=True):
    tags: Annotated[list[Tag], Meta(min_length=1)]
    separator: str
    at_least_one: bool = False
    stop_after_first: bool = False


Format = (
    ConstString
    | JsonSchema
    | AnyText
    | Regex
    | GrammarText
    | InSequence
    | Or
    | AtMostOnce
    | Plus
    | Star
    | Repeat
    | Tag
    | TriggeredTags
    | TagsWithSeparator
)


class _Structure(msgspec.Struct, forbid_unknown_fields=True):
    begin: _Text
    schema: _Schema
    end: str


class _Whole(msgspec.Struct, forbid_unknown_fields=True):
    type: str = "structural_tag"
    format: Format | None = None
    structures: list[_Structure] | None = None
    triggers: list[_Text] | None = None


_decoder = msgspec.json.Decoder(_Whole)
_ANY: Final = r"/[\x{0}-\x{10ffff}]*/"


def lark_of_tag(source: str, special_tokens: Mapping[str, int], compact: bool) -> str:
    """Return a structural tag as a grammar of the library. `special_tokens`: ids by name. Raises
    RequestError."""
    try:
        whole = _decoder.decode(source)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"not a structural tag that is supported: {error}") from error
    writer = _Writer(special_tokens, compact)
    start = writer.write(_format_of(whole), None, 0)
    return writer.whole(start)


def _format_of(whole: _Whole) -> Format:
    if whole.format is not None:
        if whole.structures is not None or whole.triggers is not None:
            raise RequestError("a structural tag has 'format', or 'structures' and 'triggers'")
        return whole.format
    if not whole.structures or not whole.triggers:
        raise RequestError("a structural tag needs 'format', or 'structures' and 'triggers'")
    tags = [Tag(one.begin, JsonSchema(one.schema), one.end) for one in whole.structures]
    return TriggeredTags(whole.triggers, tags)


# Characters of the grammar that a structural tag becomes.
MAX_WRITTEN_CHARACTERS = 1024 * 1024


class _Writer:
    """Writes formats in Lark, with a grammar of its own for each constrained part."""

    def __init__(self, special_tokens: Mapping[str, int], compact: bool) -> None:
        self._special = special_tokens
        # Lengths of the tokens' names by first character, longest first.
        self._lengths: dict[str, list[int]] = {}
        for length in sorted({len(name) for name in special_tokens}, reverse=True):
            for first in {name[0] for name in special_tokens if len(name) == length > 0}:
                self._lengths.setdefault(first, []).append(length)
        self._compact = compact
        self._lines: list[str] = []
        self._size = 0  # characters of the lines
        self._grammars: list[dict[str, Any]] = []

    def whole(self, start: str) -> str:
        lark = "\n".join(["%llguidance {}", f"start: {start}", *self._lines, ""])
        return json.dumps({"grammars": [{"name": "tags", "lark_grammar": lark}, *self._grammars]})

    def write(self, part: Format, ends: tuple[str, ...] | None, depth: int) -> str:
        """Return `part` with `ends`, one of which follows it; None: it is the last of all, or
        what follows is written by the caller."""
        if depth > MAX_GRAMMAR_DEPTH:
            raise RequestError(f"formats are nested deeper than {MAX_GRAMMAR_DEPTH}")
        depth += 1
        if isinstance(part, AnyText):
            return self._until(ends)
        if isinstance(part, TriggeredTags):
            return self._triggered(part, ends, depth)
        if isinstance(part, InSequence):
            *first, last = part.elements
            written = [self._inner(one, depth) for one in first]
            return " ".join([*written, self.write(last, ends, depth)])
        if isinstance(part, Or):
            return f"({' | '.join(self.write(one, ends, depth) for one in part.elements)})"
        return f"{self._bounded(part, depth)} {self._one_of(ends)}"

    def _inner(self, part: Format, depth: int) -> str:
        """Return a part that something else follows."""
        if _is_open(part):
            raise RequestError("free text must be the last of a sequence, or a tag's content")
        return self.write(part, None, depth)

    def _bounded(self, part: Format, depth: int) -> str:
        """Return a part that says itself where it ends."""
        if isinstance(part, ConstString):
            return self._literal(part.value)
        if isinstance(part, Tag):
            return f"{self._literal(part.begin)} {self.write(part.content, part.ends, depth)}"
        if isinstance(part, TagsWithSeparator):
            return self._separated(part, depth)
        if isinstance(part, AtMostOnce | Plus | Star | Repeat):
            return f"({self._inner(part.content, depth)}){_times(part)}"
        assert isinstance(part, JsonSchema | Regex | GrammarText)
        return self._own_grammar(part)

    def _triggered(self, part: TriggeredTags, ends: tuple[str, ...] | None, depth: int) -> str:
        behind: dict[str, list[str]] = {trigger: [] for trigger in part.triggers}
        whole: list[str] = []
        for tag in part.tags:
            matching = [trigger for trigger in behind if tag.begin.startswith(trigger)]
            if len(matching) != 1:
                raise RequestError(f"tag {tag.begin[:64]!r} begins with {len(matching)} triggers")
            content = self.write(tag.content, tag.ends, depth)
            rest = self._literal(tag.begin.removeprefix(matching[0]))
            behind[matching[0]].append(f"{rest} {content}")
            whole.append(f"{self._literal(tag.begin)} {content}")
        first = self._rule(" | ".join(whole))
        found = self._rule(
            " | ".join(
                f"{self._until((trigger,))} ({' | '.join(rests)})"
                for trigger, rests in behind.items()
                if rests
            )
        )
        text = self._until(ends)
        if part.stop_after_first:
            end = self._one_of(ends)
            return f"{first} {end}" if part.at_least_one else f"({found} {end} | {text})"
        return f"{first + ' ' if part.at_least_one else ''}{found}* {text}"

    def _separated(self, part: TagsWithSeparator, depth: int) -> str:
        tag = self._rule(" | ".join(self._bounded(one, depth) for one in part.tags))
        more = "" if part.stop_after_first else f" ({self._literal(part.separator)} {tag})*"
        return f"({tag}{more}){'' if part.at_least_one else '?'}"

    def _own_grammar(self, part: JsonSchema | Regex | GrammarText) -> str:
        from llguidance import LLMatcher

        if isinstance(part, JsonSchema):
            check_schema(part.json_schema)
            text = LLMatcher.grammar_from_json_schema(
                json.dumps(part.json_schema), overrides=json_options(self._compact)
            )
        elif isinstance(part, Regex):
            text = LLMatcher.grammar_from_regex(part.pattern)
        else:
            text = LLMatcher.grammar_from_lark(lark_source(part.grammar))
        name = f"g{len(self._grammars)}"
        grammar = {"lark_grammar": text}
        if not isinstance(part, GrammarText):
            (grammar,) = json.loads(text)["grammars"]
        self._grammars.append({**grammar, "name": name})
        return f"@{name}"

    def _until(self, ends: Sequence[str] | None) -> str:
        """Return any text up to the first of `ends`, with it; None: any text."""
        if ends is None:
            return self._terminal(_ANY)
        texts = [end for end in ends if end and end not in self._special]
        options = [
            f"{self._terminal(_ANY)} <[{self._special[end]}]>"
            for end in ends
            if end in self._special
        ]
        if texts:
            options.append(
                self._terminal(f"{_ANY} ({' | '.join(map(json.dumps, texts))})", "[lazy]")
            )
        if "" in ends:
            options.append(self._terminal(_ANY))
        return f"({' | '.join(options)})"

    def _one_of(self, ends: Sequence[str] | None) -> str:
        if ends is None:
            return ""
        return f"({' | '.join(self._literal(end) for end in ends)})"

    def _literal(self, text: str) -> str:
        """Return a text, with a model's special tokens where their names are."""
        parts = self._split(text)
        written = [
            f"<[{self._special[part]}]>" if part in self._special else json.dumps(part)
            for part in parts
            if part
        ]
        return " ".join(written) or '""'

    def _split(self, text: str) -> Iterator[str]:
        """Yield the names of special tokens in a text, and what is between them. Not by a regular
        expression of thousands of names, which would keep the interpreter for seconds."""
        begin = at = 0
        while at < len(text):
            for length in self._lengths.get(text[at], ()):
                if (name := text[at : at + length]) in self._special:
                    yield text[begin:at]
                    yield name
                    begin = at = at + length
                    break
            else:
                at += 1
        yield text[begin:]

    def _rule(self, body: str) -> str:
        name = f"r{len(self._lines)}"
        self._add(f"{name}: {body}")
        return name

    def _add(self, line: str) -> None:
        self._size += len(line)
        if self._size > MAX_WRITTEN_CHARACTERS:
            raise RequestError("its parts and their ends become too many combinations")
        self._lines.append(line)

    def _terminal(self, body: str, option: str = "") -> str:
        # An option is possible for a rule only.
        name = f"{'t' if option else 'T'}{len(self._lines)}"
        self._add(f"{name}{option}: {body}")
        return name


def _times(part: AtMostOnce | Plus | Star | Repeat) -> str:
    if isinstance(part, Repeat):
        if -1 < part.max < part.min:
            raise RequestError(f"a repetition of {part.min} to {part.max} times")
        return f"{{{part.min},{'' if part.max < 0 else part.max}}}"
    return {AtMostOnce: "?", Plus: "+", Star: "*"}[type(part)]


def _is_open(part: Format) -> bool:
    """Whether a format ends with free text."""
    if isinstance(part, InSequence):
        return _is_open(part.elements[-1])
    if isinstance(part, Or):
        return any(map(_is_open, part.elements))
    return isinstance(part, AnyText) or (
        isinstance(part, TriggeredTags) and not (part.at_least_one and part.stop_after_first)
    )
