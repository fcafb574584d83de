"""Random JSON schemas, of all that can be enforced, whose answers are short."""

from __future__ import annotations

import math
from random import Random
from typing import Any

Schema = dict[str, Any]
PATTERNS = ("^[a-c]{1,4}$", "^(x|yz)+$", "^[0-9]{2}-[A-F]?$")
FORMATS = ("date", "uuid", "ipv4")
NAMES = ("a", "key", "with space", "é", 'q"uote', "n0")


def random_schema(random: Random, depth: int = 3) -> Schema:
    """Some lead back to themselves."""
    schema = _any(random, depth)
    if random.random() < 0.8:
        return schema
    node = {
        "type": "object",
        "properties": {
            "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            "of": _any(random, 1),
        },
        "required": ["of"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node}, "anyOf": [{"$ref": "#/$defs/node"}, schema]}


def _any(random: Random, depth: int) -> Schema:
    kinds = [_enum, _integer, _number, _string, _pattern, _format, _constant]
    if depth:
        kinds += [_object, _object, _object, _array, _array, _union]
    return random.choice(kinds)(random, depth)


def _enum(random: Random, depth: int) -> Schema:
    values = [None, True, False, 0, -7, 1.5, "", "yes", "no\n", "ü", [1, "a"], {"k": []}]
    return {"enum": random.sample(values, random.randint(1, 4))}


def _constant(random: Random, depth: int) -> Schema:
    return random.choice(
        [{"type": "null"}, {"type": "boolean"}, {"const": "tip"}, {"const": {"a": [1, {}]}}]
    )


def _integer(random: Random, depth: int) -> Schema:
    low = random.randint(-300, 300)
    schema: Schema = {"type": "integer", "minimum": low, "maximum": low + random.randint(0, 999)}
    if random.random() < 0.2:
        schema = {"type": "integer", "minimum": 0, "maximum": 70, "multipleOf": 7}
    return schema


def _number(random: Random, depth: int) -> Schema:
    low = random.choice([-2.5, 0, 0.001, 12])
    return {"type": "number", "minimum": low, "exclusiveMaximum": low + random.choice([1, 0.25])}


def _string(random: Random, depth: int) -> Schema:
    least = random.randint(0, 2)
    return {"type": "string", "minLength": least, "maxLength": least + random.randint(0, 4)}


def _pattern(random: Random, depth: int) -> Schema:
    return {"type": "string", "pattern": random.choice(PATTERNS)}


def _format(random: Random, depth: int) -> Schema:
    return {"type": "string", "format": random.choice(FORMATS)}


def _object(random: Random, depth: int) -> Schema:
    names = random.sample(NAMES, random.randint(0, 4))
    schema: Schema = {
        "type": "object",
        "properties": {name: _any(random, depth - 1) for name in names},
        "required": [name for name in names if random.random() < 0.6],
        "additionalProperties": False,
    }
    if random.random() < 0.2:
        schema["patternProperties"] = {"^z[0-9]$": _any(random, 0)}
    return schema


def _array(random: Random, depth: int) -> Schema:
    least = random.randint(0, 2)
    schema: Schema = {"type": "array", "items": _any(random, depth - 1)}
    if random.random() < 0.3:
        pair = [_any(random, 0), _any(random, 0)]
        return {"type": "array", "prefixItems": pair, "items": False, "minItems": 2}
    return {**schema, "minItems": least, "maxItems": least + random.randint(0, 3)}


def _union(random: Random, depth: int) -> Schema:
    return {"anyOf": [_any(random, depth - 1) for _ in range(random.randint(1, 3))]}


def random_value(random: Random, schema: Schema, root: Schema) -> Any:
    """A value that a schema of `random_schema` allows, without looking at any grammar. No
    fractions: they have many spellings."""
    if "$ref" in schema:
        return random_value(random, root["$defs"]["node"], root)
    if "anyOf" in schema:
        # The last one leads back to nothing.
        options = schema["anyOf"] if random.random() < 0.5 else schema["anyOf"][-1:]
        return random_value(random, random.choice(options), root)
    if "enum" in schema or "const" in schema:
        return random.choice(schema.get("enum") or [schema["const"]])
    return _VALUES[schema["type"]](random, schema, root)


def _text_value(random: Random, schema: Schema, root: Schema) -> str:
    if "pattern" in schema:
        return random.choice(EXAMPLES[schema["pattern"]])
    if "format" in schema:
        return random.choice(EXAMPLES[schema["format"]])
    length = random.randint(schema["minLength"], schema["maxLength"])
    return "".join(random.choices('aZ 0"\\/é你👍\n{', k=length))


def _integer_value(random: Random, schema: Schema, root: Schema) -> int:
    step = schema.get("multipleOf", 1)
    return random.randint(schema["minimum"], schema["maximum"]) // step * step


def _number_value(random: Random, schema: Schema, root: Schema) -> float:
    whole = math.ceil(schema["minimum"])
    return whole if whole < schema["exclusiveMaximum"] else schema["minimum"]


def _object_value(random: Random, schema: Schema, root: Schema) -> dict[str, Any]:
    own = {
        name: random_value(random, part, root)
        for name, part in schema["properties"].items()
        if name in schema["required"] or random.random() < 0.5
    }
    for part in schema.get("patternProperties", {}).values():
        own |= {f"z{at}": random_value(random, part, root) for at in random.sample(range(9), 2)}
    return own


def _array_value(random: Random, schema: Schema, root: Schema) -> list[Any]:
    if "prefixItems" in schema:
        return [random_value(random, part, root) for part in schema["prefixItems"]]
    count = random.randint(schema["minItems"], schema["maxItems"])
    return [random_value(random, schema["items"], root) for _ in range(count)]


EXAMPLES = {
    PATTERNS[0]: ("a", "abca"),
    PATTERNS[1]: ("x", "yzxyz"),
    PATTERNS[2]: ("01-", "99-F"),
    "date": ("2024-02-29", "1999-12-31"),
    "uuid": ("123e4567-e89b-12d3-a456-426614174000",),
    "ipv4": ("0.0.0.0", "192.168.1.255"),
}
_VALUES = {
    "string": _text_value,
    "integer": _integer_value,
    "number": _number_value,
    "object": _object_value,
    "array": _array_value,
    "null": lambda random, schema, root: None,
    "boolean": lambda random, schema, root: random.random() < 0.5,
}
