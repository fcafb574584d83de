"""Response templates: how a model writes reasoning, content and tool calls, as its tokenizer says.

They are the field `response_template` of tokenizer_config.json, in Transformers' form
(`transformers.utils.chat_parsing`). Like chat templates they come with models, so they are
untrusted: their patterns run with a budget (`api/answer/template_parser.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto
from typing import Annotated, Any, Final, Literal

import msgspec
import regex
from msgspec import Meta

from memserve.errors import ModelError

MAX_FIELDS = 64
MAX_PATTERN = 2000  # characters; those of models have a hundred
# Of a pattern's counts, multiplied: a tenth of a second to compile, if they stand in each other.
MAX_REPETITIONS = 100_000
_COUNTS: Final = re.compile(r"\{([0-9]*),?([0-9]*)\}")
_MAX_LITERALS = 64
# Conditions on what follows a match, of which a partial match knows nothing, behind the escapes and
# sets in which they stand for characters.
_CONDITION: Final = re.compile(r"(?P<found>\\[bBmMZ]|\$)|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)

Content = Literal["text", "int", "float", "bool", "json", "xml-inline", "kv-lines"]
_Pattern = Annotated[str, Meta(min_length=1, max_length=MAX_PATTERN)]
_Literals = _Pattern | Annotated[tuple[_Pattern, ...], Meta(min_length=1, max_length=_MAX_LITERALS)]


class ContentArgs(msgspec.Struct, frozen=True):
    """Arguments of the parser of a region's content."""

    strip: bool = True  # white space around texts
    # of `json`
    unquoted_keys: bool = False
    string_delims: Annotated[tuple[tuple[_Pattern, _Pattern], ...], Meta(max_length=8)] = ()
    allow_non_json: bool = False
    # of `xml-inline`; with groups `key` and `value`
    tag_pattern: _Pattern | None = None
    # of `kv-lines`
    line_sep: _Pattern = "\n"
    kv_sep: _Pattern = ":"
    # of both
    value_parser: ValueParser | None = None
    merge_duplicates: bool = False


PLAIN: Final = ContentArgs()


class ValueParser(msgspec.Struct, frozen=True):
    name: Content = "text"
    args: ContentArgs = PLAIN


class FieldSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A field of a message, as the file has it."""

    open: _Literals | None = None
    open_pattern: _Pattern | None = None
    close: _Literals | None = None
    close_pattern: _Pattern | None = None
    content: Content = "text"
    content_args: ContentArgs = PLAIN
    repeats: bool = False
    join: str | None = None
    optional: bool = True
    transform: Any = None
    transform_each: bool = False


class TemplateSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A response template, as the file has it."""

    fields: Annotated[dict[str, FieldSpec], Meta(min_length=1, max_length=MAX_FIELDS)]
    version: Literal[1] = 1
    defaults: dict[str, Any] = {}
    start_anchor: _Literals | None = None
    start_anchor_pattern: _Pattern | None = None


class Part(Enum):
    """A field's meaning in an answer. NOTHING: it is left out."""

    CONTENT = auto()
    REASONING = auto()
    CALLS = auto()
    NOTHING = auto()


# Names of fields; models on the Hub have each of those for reasoning.
_PARTS: Final = {
    "content": Part.CONTENT,
    "reasoning_content": Part.REASONING,
    "reasoning": Part.REASONING,
    "thinking": Part.REASONING,
    "tool_calls": Part.CALLS,
}
STREAMED_CALL: Final = {"name": "{name}", "arguments": "{content}"}


@dataclass(frozen=True, slots=True, eq=False)
class Delimiter:
    """Delimiter of a region. `literals`: all texts that it may be; None: any match.
    `grows`: a literal begins with another one."""

    pattern: Any  # a compiled pattern of `regex`, whose matches may be partial
    literals: tuple[str, ...] | None = None
    grows: bool = False


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the text that is one field. `opening` None: all text outside of other regions."""

    part: Part
    opening: Delimiter | None = None
    closing: Delimiter | None = None
    content: Content = "text"
    arguments: ContentArgs = PLAIN
    join: str | None = None
    transform: Any = None
    transform_each: bool = False
    # A call that ends with the text, without its closing, is none.
    must_close: bool = False

    @property
    def streamed_call(self) -> bool:
        """Whether the text is a call's arguments, in JSON, and its opening has the name."""
        if self.content != "json" or self.arguments != PLAIN or self.transform_each:
            return False
        called = self.transform.get("function") if isinstance(self.transform, dict) else None
        return STREAMED_CALL in (called, self.transform)


@dataclass(frozen=True, slots=True)
class ResponseTemplate:
    """A template, ready for use. `anchor`: the last match in a prompt begins the answer."""

    regions: tuple[Region, ...]
    anchor: Delimiter
    source: str = ""  # of all delimiters: which special tokens must be seen

    @property
    def implicit(self) -> Region | None:
        return next((region for region in self.regions if region.opening is None), None)

    def begun(self, prompt: str, seconds: float) -> str:
        """Return what a prompt has of the answer already: the text behind the last anchor; none
        if it has no anchor, or if finding that takes more than `seconds` of the processor."""
        if self.anchor.literals is not None:
            ends = [
                found + len(literal)
                for literal in self.anchor.literals
                if (found := prompt.rfind(literal)) >= 0
            ]
            return prompt[max(ends) :] if ends else ""
        end = len(prompt)
        try:
            for match in self.anchor.pattern.finditer(prompt, timeout=seconds):
                end = match.end()
        except TimeoutError:
            return ""
        return prompt[end:]


def response_template(source: object) -> ResponseTemplate:
    """Return the template in `source`, decoded JSON. Raises ModelError that says what is wrong."""
    try:
        spec = msgspec.convert(source, TemplateSpec)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ModelError(f"response_template: {error}") from error
    anchor = _delimiter("start_anchor", spec.start_anchor, spec.start_anchor_pattern)
    if anchor is None:
        raise ModelError("response_template: it has no 'start_anchor'")
    regions = tuple([_region(name, each) for name, each in spec.fields.items()])
    if sum(region.opening is None for region in regions) > 1:
        raise ModelError("response_template: more than one field has no 'open'")
    return ResponseTemplate(regions, anchor, _source(spec))


def _region(name: str, spec: FieldSpec) -> Region:
    if spec.join is not None and not spec.repeats:
        raise ModelError(f"response_template: '{name}' has 'join' without 'repeats'")
    if spec.transform_each and spec.transform is None:
        raise ModelError(f"response_template: '{name}' has 'transform_each' without 'transform'")
    _check_content(name, spec.content, spec.content_args)
    return Region(
        part=_PARTS.get(name, Part.NOTHING),
        opening=_region_delimiter(name, spec.open, spec.open_pattern),
        closing=_region_delimiter(name, spec.close, spec.close_pattern),
        content=spec.content,
        arguments=spec.content_args,
        join=spec.join,
        transform=spec.transform,
        transform_each=spec.transform_each,
    )


def _check_content(name: str, content: Content, args: ContentArgs) -> None:
    """Raise ModelError for a content without what its parser needs."""
    if content == "xml-inline":
        groups = {} if args.tag_pattern is None else _bounded(args.tag_pattern).groupindex
        if not {"key", "value"} <= set(groups):
            raise ModelError(
                f"response_template: '{name}' needs a 'tag_pattern' with groups 'key' and 'value'"
            )
    if args.value_parser is not None:
        _check_content(name, args.value_parser.name, args.value_parser.args)


def _delimiter(
    name: str, literals: str | tuple[str, ...] | None, pattern: str | None
) -> Delimiter | None:
    if literals is not None and pattern is not None:
        raise ModelError(f"response_template: '{name}' has a literal and a pattern")
    if literals is not None:
        return literal(*((literals,) if isinstance(literals, str) else literals))
    return None if pattern is None else Delimiter(_bounded(pattern))


def _region_delimiter(
    name: str, literals: str | tuple[str, ...] | None, pattern: str | None
) -> Delimiter | None:
    """Return a delimiter that is looked for in a stream. Raises ModelError for a pattern that the
    next piece could make untrue, but for a word's beginning, as the pattern's first condition."""
    for each in _CONDITION.finditer(pattern or ""):
        found = each["found"]
        if found is not None and (each.start() or found in ("$", r"\Z")):
            raise ModelError(
                f"response_template: '{name}' has {found!r} in the pattern {pattern!r}, which a "
                "stream cannot decide before its next piece; write what follows as (?=...)"
            )
    return _delimiter(name, literals, pattern)


def literal(*texts: str) -> Delimiter:
    """Return the delimiter that is one of `texts`, the longest that fits."""
    longest_first = sorted(set(texts), key=len, reverse=True)
    grows = any(a != b and a.startswith(b) for a in texts for b in texts)
    return Delimiter(_compiled("|".join(map(regex.escape, longest_first))), texts, grows)


def matching(pattern: str) -> Delimiter:
    """Return the delimiter of a regular expression. Raises ModelError for one that is none."""
    return Delimiter(_compiled(pattern))


def _bounded(pattern: str) -> Any:
    """Compile a model's pattern. Raises ModelError for one that is none, or that is written out to
    too many repetitions, which would take minutes and gigabytes."""
    repetitions = 1
    for counts in _COUNTS.findall(pattern):
        repetitions *= max([1, *(int(count[:9]) for count in counts if count)])
        if repetitions > MAX_REPETITIONS:
            raise ModelError(f"response_template: the pattern {pattern!r} repeats too often")
    return _compiled(pattern)


def _compiled(pattern: str) -> Any:
    try:
        return regex.compile(pattern, regex.DOTALL)
    except (regex.error, OverflowError, RecursionError) as error:
        raise ModelError(f"response_template: the pattern {pattern!r}: {error}") from error


def _source(spec: TemplateSpec) -> str:
    """Return all delimiters' texts, patterns without their escapes."""
    texts: list[str] = []
    for each in spec.fields.values():
        for literals in (each.open, each.close):
            texts += (literals,) if isinstance(literals, str) else literals or ()
        texts += [p.replace("\\", "") for p in (each.open_pattern, each.close_pattern) if p]
        texts += _strings(msgspec.to_builtins(each.content_args))
    return "\n".join(texts)


def _strings(value: object) -> list[str]:
    """Return the strings in a content parser's arguments, without escapes: its delimiters, too."""
    found: list[str] = []
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, str):
            found.append(each.replace("\\", ""))
        elif isinstance(each, dict):
            left += each.values()
        elif isinstance(each, list | tuple):
            left += each
    return found
