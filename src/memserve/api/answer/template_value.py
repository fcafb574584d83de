"""Values of the regions of a response template: a region's text into the calls that it holds.

What each content is and means follows Transformers (`transformers.utils.chat_parsing`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import regex

from memserve.api.answer.format import Function
from memserve.api.answer.json_call import well_formed
from memserve.api.answer.qwen3_coder import converted
from memserve.models.response_template import ContentArgs, Region

_PLACEHOLDER: Final = re.compile(r"\{(\w+(?:\.\w+)*)\}")
_OPEN, _CLOSE = "\x01", "\x02"  # around the number of a text that was taken out
_KEY: Final = re.compile(r"(?<=[{,])(\s*)(\w+):")
_NOT_JSON = (ValueError, RecursionError)


@dataclass(frozen=True, slots=True)
class WholeCall:
    """A call whose arguments, JSON, came as a whole."""

    name: str
    arguments: str


def calls_in(
    region: Region,
    text: str,
    captures: Mapping[str, str],
    functions: Mapping[str, Function],
    seconds: float,
) -> list[WholeCall]:
    """Return the calls in a region's text. `captures`: of its delimiters. Raises ValueError if it
    has none, or one of no known function; TimeoutError if the template's own patterns take more
    than `seconds` of the processor."""
    try:
        content = _parsed(text, region.content, region.arguments, seconds)
        value: object = content
        if region.transform_each:
            if not isinstance(content, list):
                raise ValueError("no list")
            value = [_each(region.transform, captures, item) for item in content]
        elif region.transform is not None:
            value = _transformed(region.transform, {**captures, "content": content})
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    texts_only = region.content in ("xml-inline", "kv-lines")
    calls = [
        _call(each, functions, texts_only)
        for each in (value if isinstance(value, list) else [value])
    ]
    if not calls:
        raise ValueError("no call")
    return calls


def _call(value: object, functions: Mapping[str, Function], texts_only: bool) -> WholeCall:
    called = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(called, dict):
        raise ValueError("no call")
    name = called.get("name")
    function = functions.get(name) if isinstance(name, str) else None
    if function is None:
        raise ValueError("no known function")
    arguments = called.get("arguments", called.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments, ContentArgs()) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError("no arguments")
    if texts_only:
        members = ", ".join(_member(function, key, each) for key, each in arguments.items())
        return WholeCall(function.name, well_formed(f"{{{members}}}"))
    said = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return WholeCall(function.name, well_formed(said))


def _member(function: Function, key: str, value: object) -> str:
    """Return the JSON of an argument that the model wrote without quotes: by its function's schema,
    or what it looks like."""
    if isinstance(value, str) and key not in function.texts:
        said = converted(value)
    else:
        said = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return f"{json.dumps(key, ensure_ascii=False)}: {said}"


def _each(transform: object, captures: Mapping[str, str], item: object) -> object:
    if not isinstance(item, dict):
        raise ValueError("no object")
    return _transformed(transform, {**captures, **item})


def _transformed(transform: object, scope: Mapping[str, object]) -> object:
    """Return a transform with its placeholders' values."""
    if isinstance(transform, dict):
        return {name: _transformed(value, scope) for name, value in transform.items()}
    if isinstance(transform, list):
        return [_transformed(value, scope) for value in transform]
    placeholder = _PLACEHOLDER.fullmatch(transform) if isinstance(transform, str) else None
    if placeholder is None:
        return transform
    value: object = scope
    for key in placeholder[1].split("."):
        if not isinstance(value, Mapping):
            raise ValueError(f"no value for {placeholder[0]}")
        value = value[key]
    return value


# --- contents -----------------------------------------------------------------------------------


def _parsed(text: str, content: str, arguments: ContentArgs, seconds: float) -> Any:
    if content == "json":
        return _json(text, arguments)
    if content == "xml-inline":
        return _merged(_tags(text, arguments, seconds), arguments, seconds)
    if content == "kv-lines":
        return _merged(_lines(text, arguments), arguments, seconds)
    return _SCALARS[content](_stripped(text, arguments))


_SCALARS: Final[dict[str, Callable[[str], object]]] = {
    "text": str,
    "int": int,
    "float": float,
    "bool": lambda text: text.lower() in ("true", "1"),
}


def _stripped(text: str, arguments: ContentArgs) -> str:
    return text.strip() if arguments.strip else text


def _json(text: str, arguments: ContentArgs) -> Any:
    working = text
    taken: list[str] = []
    delimiters = arguments.string_delims
    if delimiters and (_OPEN in text or _CLOSE in text):
        raise ValueError("control characters in JSON")
    for begin, end in delimiters:
        working = _without_texts(working, begin, end, taken)
    if arguments.unquoted_keys:
        working = _KEY.sub(r'\1"\2":', working)
    if taken:
        working = re.sub(
            f"{_OPEN}([0-9]+){_CLOSE}", lambda found: json.dumps(taken[int(found[1])]), working
        )
    try:
        return json.loads(working, parse_constant=_refuse)
    except _NOT_JSON as error:
        if arguments.allow_non_json:
            return _stripped(text, arguments)
        raise ValueError(str(error)) from error


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _without_texts(text: str, begin: str, end: str, taken: list[str]) -> str:
    """Return `text` with numbers for what is between `begin` and `end`, which goes to `taken`."""
    parts: list[str] = []
    at = 0
    while (found := text.find(begin, at)) >= 0:
        close = text.find(end, found + len(begin))
        if close < 0:
            break
        parts += (text[at:found], f"{_OPEN}{len(taken)}{_CLOSE}")
        taken.append(text[found + len(begin) : close])
        at = close + len(end)
    return "".join([*parts, text[at:]])


def _tags(text: str, arguments: ContentArgs, seconds: float) -> Iterator[tuple[str, str]]:
    try:
        found = regex.finditer(
            arguments.tag_pattern or "", text, flags=regex.DOTALL, timeout=seconds
        )
        for match in found:
            if match["key"] is None:
                raise ValueError("a tag without a key")
            yield match["key"], match["value"] or ""
    except (regex.error, IndexError) as error:
        raise ValueError(f"tag_pattern: {error}") from error


def _lines(text: str, arguments: ContentArgs) -> Iterator[tuple[str, str]]:
    between = arguments.kv_sep
    for line in text.split(arguments.line_sep):
        key, found, value = _stripped(line, arguments).partition(between)
        if found:
            yield _stripped(key, arguments), _stripped(value, arguments)


def _merged(
    pairs: Iterator[tuple[str, str]], arguments: ContentArgs, seconds: float
) -> dict[str, Any]:
    """Return the pairs as an object, with their values parsed as the arguments say."""
    inner = arguments.value_parser
    merges = arguments.merge_duplicates
    found: dict[str, Any] = {}
    several: set[str] = set()
    for key, text in pairs:
        value: Any = text
        if inner is not None:
            value = _parsed(text, inner.name, inner.args, seconds)
        if merges and key in found:
            if key not in several:
                found[key] = [found[key]]
                several.add(key)
            found[key].append(value)
        else:
            found[key] = value
    return found
