"""Tools, the choice among them, and calls of them, in a chat's request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from memserve.api.limits import MAX_FUNCTION_NAME, MAX_NAME_CHARACTERS, MAX_TOOLS

# OpenAI takes letters, digits, _ and -; dots, colons and slashes come from names of MCP servers.
FunctionName = Annotated[
    str, Meta(min_length=1, max_length=MAX_FUNCTION_NAME, pattern=r"^[\w.:/-]+\Z")
]
_Id = Annotated[str, Meta(max_length=MAX_NAME_CHARACTERS)]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a request."""


class ToolFunction(_Part, frozen=True):
    """A function. `parameters`: the JSON schema of its arguments, an object."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Part, frozen=True, tag_field="type", tag="function"):
    function: ToolFunction


class _Named(_Part, frozen=True):
    name: FunctionName


class NamedChoice(_Part, frozen=True, tag_field="type", tag="function"):
    """The choice of one function, which has to be called."""

    function: _Named


class _AllowedTools(_Part, frozen=True):
    mode: Literal["auto", "required"]
    tools: Annotated[tuple[NamedChoice, ...], Meta(min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(_Part, frozen=True, tag_field="type", tag="allowed_tools"):
    """The choice among some of the tools."""

    allowed_tools: _AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedChoice | AllowedChoice


class CalledFunction(_Part, frozen=True):
    name: Annotated[str, Meta(min_length=1, max_length=MAX_FUNCTION_NAME)]
    arguments: str = ""  # a JSON object


class ToolCall(_Part, frozen=True, tag_field="type", tag="function"):
    """A tool call in an assistant's message. `index` is in those that a client joined from a
    stream."""

    function: CalledFunction
    id: _Id | None = None
    index: int | None = None


ToolCalls = Annotated[tuple[ToolCall, ...], Meta(max_length=MAX_TOOLS)]
