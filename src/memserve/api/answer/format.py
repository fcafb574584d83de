"""The format of a chat's answer: what may be in the model's text besides content.

The gateway chooses it from the request and the model, and sends it with the call. So an answer is
a function of call and tokens alone: an instance that continues another one's stream needs no
settings of its own.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from memserve.api.limits import (
    MAX_BEGUN_CHARACTERS,
    MAX_FUNCTION_NAME,
    MAX_NAME_CHARACTERS,
    MAX_TOOLS,
    MAX_VALUES,
)


class ToolFormat(StrEnum):
    """How a model writes tool calls. The names are those of vLLM's parsers, but for JSON_* and
    RESPONSE_TEMPLATE."""

    NONE = "none"
    HERMES = "hermes"  # <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    LLAMA3_JSON = "llama3_json"  # {"name": ..., "parameters": {...}}, the whole answer
    MISTRAL = "mistral"  # [TOOL_CALLS] and a JSON array, or a name and its arguments
    QWEN3_CODER = "qwen3_coder"  # <function=name><parameter=key>...
    PYTHONIC = "pythonic"  # [name(key=value)], the whole answer
    DEEPSEEK_V3 = "deepseek_v3"  # function<｜tool▁sep｜>name, and arguments as a block of code
    DEEPSEEK_V31 = "deepseek_v31"  # name<｜tool▁sep｜>{...}
    GLM45 = "glm45"  # <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>...
    GRANITE = "granite"  # <|tool_call|> and a JSON array
    KIMI_K2 = "kimi_k2"  # functions.name:0<|tool_call_argument_begin|>{...}
    OPENAI = "openai"  # harmony, gpt-oss's: channels for reasoning, content and calls
    RESPONSE_TEMPLATE = "response_template"  # the model's own; finds reasoning and content, too
    JSON_CALLS = "json_calls"  # [{"name": ..., "parameters": {...}}]: `required`'s grammar
    JSON_ARGUMENTS = "json_arguments"  # the arguments of a named function: its grammar


class ReasoningFormat(StrEnum):
    """How a model marks its reasoning. The names are those of vLLM's parsers."""

    NONE = "none"
    DEEPSEEK_R1 = "deepseek_r1"  # all up to </think>, whether <think> comes first or not
    QWEN3 = "qwen3"  # <think>...</think>, or nothing
    MISTRAL = "mistral"  # [THINK]...[/THINK], or nothing
    OPENAI = "openai_gptoss"  # harmony's channel `analysis`


class Function(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A function that may be called. `texts`: its parameters that take texts, for formats that do
    not distinguish them from numbers."""

    name: Annotated[str, Meta(min_length=1, max_length=MAX_FUNCTION_NAME)]
    texts: Annotated[
        tuple[Annotated[str, Meta(max_length=MAX_NAME_CHARACTERS)], ...],
        Meta(max_length=MAX_VALUES),
    ] = ()


class AnswerFormat(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The format of the answers to one call."""

    tools: ToolFormat = ToolFormat.NONE
    # Text that looks like a call of any other function is content.
    functions: Annotated[tuple[Function, ...], Meta(max_length=MAX_TOOLS)] = ()
    parallel: bool = True  # False: the answer ends with its first call
    named: bool = False  # by the request: calls are no reason for the answer's end
    reasoning: ReasoningFormat = ReasoningFormat.NONE
    reasoning_begun: bool = False  # by the prompt
    # The answer's part that the prompt has already, for formats with a template.
    begun: Annotated[str, Meta(max_length=MAX_BEGUN_CHARACTERS)] = ""
    include_reasoning: bool = True  # False: it is found and left out
