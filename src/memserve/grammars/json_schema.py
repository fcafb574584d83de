"""Checks of a JSON schema before it is compiled, and the place of what cannot be compiled."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import msgspec

from memserve.api.limits import MAX_MULTIPLE_OF, MAX_SCHEMA_PROPERTIES
from memserve.errors import RequestError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_BOUNDED = ("properties", "patternProperties", "required", "anyOf", "oneOf", "allOf")


def parse_schema(source: str) -> object:
    """Return a schema. Raises RequestError if it is none, or has too many properties."""
    try:
        schema = msgspec.json.decode(source)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the schema is not valid JSON: {error}") from error
    except RecursionError as error:
        raise RequestError("the schema is nested too deeply") from error
    check_schema(schema)
    return schema


def check_schema(schema: object) -> None:
    """Raise RequestError for a schema that is none, or has too many properties in one object."""
    if not isinstance(schema, dict | bool):
        raise RequestError("a schema is an object")
    for pointer, part in _objects(schema):
        if "x-guidance" in part:  # would change how the schema is understood
            raise RequestError(f"'x-guidance' at {pointer} is not supported")
        divisor = part.get("multipleOf")
        if isinstance(divisor, int | float) and _scaled(divisor) > MAX_MULTIPLE_OF:
            raise RequestError(
                f"multipleOf {divisor} at {pointer} is too fine: at most {MAX_MULTIPLE_OF} may be "
                "left when its decimal point is taken away"
            )
        for name in _BOUNDED:
            members = part.get(name)
            if isinstance(members, dict | list) and len(members) > MAX_SCHEMA_PROPERTIES:
                count = len(members)
                raise RequestError(
                    f"{count} {name} at {pointer}, and at most {MAX_SCHEMA_PROPERTIES} may be"
                )


def _scaled(number: float) -> int:
    """Return a number's decimal digits as an integer: 25 for 0.25."""
    _, digits, _ = Decimal(repr(number)).as_tuple()
    return int("".join(map(str, digits)))


def json_options(compact: bool) -> JsonCompileOptions:
    """Return how the library writes JSON: each option, so that no schema can set one."""
    return {
        "whitespace_flexible": not compact,
        "coerce_one_of": False,
        "lenient": False,
    }


def place_of(schema: object, keys: Collection[str]) -> str | None:
    """Return the JSON pointer of the first object in `schema` that has all of `keys`."""
    for pointer, part in _objects(schema):
        if all(key in part for key in keys):
            return pointer
    return None


def _objects(schema: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each object in a schema with its JSON pointer."""
    waiting: list[tuple[str, object]] = [("#", schema)]
    while waiting:
        pointer, part = waiting.pop()
        if isinstance(part, dict):
            yield pointer, part
            for key, value in reversed(part.items()):
                if isinstance(value, dict | list):
                    escaped = key.replace("~", "~0").replace("/", "~1")
                    waiting.append((f"{pointer}/{escaped}", value))
        elif isinstance(part, list):
            for at, value in enumerate(part):
                if isinstance(value, dict | list):
                    waiting.append((f"{pointer}/{at}", value))
