"""The formats in which a model writes tool calls and reasoning, as configured or as found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from memserve.api.answer.format import ReasoningFormat, ToolFormat
from memserve.config import ModelConfig
from memserve.models.response_template import ResponseTemplate
from memserve.models.tokenizer import Tokenizer

# Texts in a chat template that only one format has; the first one found counts.
_IN_TEMPLATE: Final = (
    ("<|channel|>", ToolFormat.OPENAI),
    ("<|tool_call_argument_begin|>", ToolFormat.KIMI_K2),
    ("<|tool_call|>", ToolFormat.GRANITE),
    ("<arg_key>", ToolFormat.GLM45),
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
    "glm4_moe": ToolFormat.GLM45,
    "glm4_moe_lite": ToolFormat.GLM45,
    "gpt_oss": ToolFormat.OPENAI,
    "kimi_k2": ToolFormat.KIMI_K2,
}


@dataclass(frozen=True, slots=True)
class ModelFormats:
    """How a model writes what is not content. `template`: its own response template, if that is
    what answers are read by.

    `in_text`: its chat template knows no tools; the conversation tells of them as text, and asks
    for calls in Hermes' format.
    """

    tools: ToolFormat = ToolFormat.NONE
    reasoning: ReasoningFormat = ReasoningFormat.NONE
    in_text: bool = False
    template: ResponseTemplate | None = None


def formats_of(config: ModelConfig, tokenizer: Tokenizer) -> ModelFormats:
    """Return the formats of a model: those of the configuration, or for `auto`, its own response
    template, or else those that its chat template shows, or that are its type's."""
    template = tokenizer.tools_template
    in_text = "tools" not in template.variables
    own = None
    if config.tool_call_parser == config.reasoning_parser == "auto" and not in_text:
        own = tokenizer.response_template
    if config.tool_call_parser != "auto":
        tools = ToolFormat(config.tool_call_parser)
        in_text = in_text and tools is ToolFormat.HERMES
    elif in_text:
        tools = ToolFormat.HERMES
    else:
        tools = _shown(template.source) or _BY_TYPE.get(
            tokenizer.model_type or "", ToolFormat.HERMES
        )
    if config.reasoning_parser != "auto":
        reasoning = ReasoningFormat(config.reasoning_parser)
    elif tools is ToolFormat.OPENAI:
        reasoning = ReasoningFormat.OPENAI
    elif "</think>" in template.source:
        reasoning = ReasoningFormat.QWEN3
    elif "[/THINK]" in template.source:
        reasoning = ReasoningFormat.MISTRAL
    else:
        reasoning = ReasoningFormat.NONE
    return ModelFormats(tools, reasoning, in_text, own)


def _shown(source: str) -> ToolFormat | None:
    """Return the format that a chat template shows."""
    if "<｜tool▁calls▁begin｜>" in source:
        return ToolFormat.DEEPSEEK_V3 if "```json" in source else ToolFormat.DEEPSEEK_V31
    return next((form for text, form in _IN_TEMPLATE if text in source), None)
