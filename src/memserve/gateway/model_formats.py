"""The formats in which a model writes tool calls and reasoning, as configured or as found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from memserve.api.answer.format import ReasoningFormat, ToolFormat
from memserve.config import ModelConfig
from memserve.models.tokenizer import Tokenizer

# Texts in a chat template that only one format has; the first one found counts.
_IN_TEMPLATE: Final = (
    ("[TOOL_CALLS]", ToolFormat.MISTRAL),
    ("<function=", ToolFormat.QWEN3_CODER),
    ("<tool_call>", ToolFormat.HERMES),
    ("<|python_start|>", ToolFormat.PYTHONIC),
    ("<|python_tag|>", ToolFormat.LLAMA3_JSON),
    ('"parameters": dictionary of argument name', ToolFormat.LLAMA3_JSON),
)
# By `model_type` in config.json, for templates that show no format.
_BY_TYPE: Final = {
    "llama": ToolFormat.LLAMA3_JSON,
    "llama4": ToolFormat.PYTHONIC,
    "llama4_text": ToolFormat.PYTHONIC,
    "mistral": ToolFormat.MISTRAL,
    "mistral3": ToolFormat.MISTRAL,
    "ministral": ToolFormat.MISTRAL,
    "mixtral": ToolFormat.MISTRAL,
    "pixtral": ToolFormat.MISTRAL,
    "qwen2": ToolFormat.HERMES,
    "qwen2_moe": ToolFormat.HERMES,
    "qwen3": ToolFormat.HERMES,
    "qwen3_moe": ToolFormat.HERMES,
    "qwen3_next": ToolFormat.HERMES,
    "qwen3_5": ToolFormat.QWEN3_CODER,
    "qwen3_5_moe": ToolFormat.QWEN3_CODER,
    "olmo3": ToolFormat.PYTHONIC,
}


@dataclass(frozen=True, slots=True)
class ModelFormats:
    """How a model writes what is not content.

    `in_text`: its chat template knows no tools; the conversation tells of them as text, and asks
    for calls in Hermes' format.
    """

    tools: ToolFormat = ToolFormat.NONE
    reasoning: ReasoningFormat = ReasoningFormat.NONE
    in_text: bool = False


def formats_of(config: ModelConfig, tokenizer: Tokenizer) -> ModelFormats:
    """Return the formats of a model: those of the configuration, or for `auto`, those that its
    chat template shows, or that are its type's."""
    template = tokenizer.tools_template
    in_text = "tools" not in template.variables
    if config.tool_call_parser != "auto":
        tools = ToolFormat(config.tool_call_parser)
        in_text = in_text and tools is ToolFormat.HERMES
    elif in_text:
        tools = ToolFormat.HERMES
    else:
        shown = next((form for text, form in _IN_TEMPLATE if text in template.source), None)
        tools = shown or _BY_TYPE.get(tokenizer.model_type or "", ToolFormat.HERMES)
    if config.reasoning_parser != "auto":
        return ModelFormats(tools, ReasoningFormat(config.reasoning_parser), in_text)
    reasoning = ReasoningFormat.NONE
    if "</think>" in template.source:
        reasoning = ReasoningFormat.QWEN3
    elif "[/THINK]" in template.source:
        reasoning = ReasoningFormat.MISTRAL
    return ModelFormats(tools, reasoning, in_text)
