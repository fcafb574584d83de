"""JSON schema of a list of tool calls, which an answer obeys where a call is required."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from memserve.api.openai_tools import Tool

ANY_ARGUMENTS: Final[Mapping[str, Any]] = {"type": "object"}


def calls_schema(tools: Sequence[Tool], single: bool) -> dict[str, Any]:
    """Return the JSON schema of a list of calls, as vLLM's for `required`. `single`: of one call.
    Parameters with references of their own are definitions of the whole."""
    items = []
    definitions: dict[str, Any] = {}
    for number, tool in enumerate(tools):
        parameters: Mapping[str, Any] = tool.function.parameters or ANY_ARGUMENTS
        place = f"#/$defs/{number}"
        moved = _moved(parameters, place)
        if moved != parameters:
            definitions[str(number)] = moved
            parameters = {"$ref": place}
        items.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "parameters": parameters},
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


def _moved(schema: Any, place: str) -> Any:
    """Return a schema whose root is at `place` of another one: its references lead there."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {name: _moved(value, place) for name, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
