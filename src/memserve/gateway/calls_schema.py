"""JSON schema of a list of tool calls, which an answer obeys where a call is required."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from memserve.api.openai_tools import Tool

ANY_ARGUMENTS: Final[Mapping[str, Any]] = {"type": "object"}


def calls_schema(tools: Sequence[Tool], single: bool) -> dict[str, Any]:
    """Return the JSON schema of a list of calls, as vLLM's for `required`. References within a
    function's parameters are made references within the whole."""
    items = []
    definitions: dict[str, Any] = {}
    for number, tool in enumerate(tools):
        parameters = dict(tool.function.parameters or ANY_ARGUMENTS)
        for word in ("$defs", "definitions"):
            inner = parameters.pop(word, None)
            for name, each in inner.items() if isinstance(inner, dict) else ():
                definitions[f"{number}.{word}.{name}"] = _relocated(each, number)
        items.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "parameters": _relocated(parameters, number),
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": items[0] if len(items) == 1 else {"anyOf": items},
    }
    if single:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema


def _relocated(schema: Any, number: int) -> Any:
    """Return the schema with its references to definitions, which are now the whole's."""
    if isinstance(schema, list):
        return [_relocated(each, number) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {}
    for name, value in schema.items():
        if name == "$ref" and isinstance(value, str):
            for word in ("$defs", "definitions"):
                if value.startswith(f"#/{word}/"):
                    value = f"#/$defs/{number}.{word}.{value[len(word) + 3 :]}"
                    break
            moved[name] = value
        else:
            moved[name] = _relocated(value, number)
    return moved
