"""Parser of one answer: reasoning, content and tool calls in the text of one choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from memserve.api.answer.delta import Collector, Delta
from memserve.api.answer.format import AnswerFormat, ReasoningFormat, ToolFormat
from memserve.api.answer.json_formats import (
    GraniteParser,
    HermesParser,
    JsonArgumentsParser,
    JsonListParser,
    LlamaParser,
    MistralParser,
)
from memserve.api.answer.known_templates import HARMONY, TEMPLATES
from memserve.api.answer.pythonic import PythonicParser
from memserve.api.answer.qwen3_coder import Qwen3CoderParser
from memserve.api.answer.reasoning import MARKERS, ReasoningSplitter
from memserve.api.answer.staged import StagedParser
from memserve.api.answer.template_parser import TemplateParser
from memserve.api.errors import invalid
from memserve.models.response_template import ResponseTemplate

_PARSERS: Final[dict[ToolFormat, type[StagedParser]]] = {
    ToolFormat.HERMES: HermesParser,
    ToolFormat.LLAMA3_JSON: LlamaParser,
    ToolFormat.MISTRAL: MistralParser,
    ToolFormat.QWEN3_CODER: Qwen3CoderParser,
    ToolFormat.PYTHONIC: PythonicParser,
    ToolFormat.GRANITE: GraniteParser,
    ToolFormat.JSON_CALLS: JsonListParser,
    ToolFormat.JSON_ARGUMENTS: JsonArgumentsParser,
}
_DEEPSEEK: Final = (
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
)
_HARMONY: Final = (
    *("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"),
    *("<|end|>", "<|call|>", "<|return|>"),
)
# Markers that some tokenizers have as special tokens, which are otherwise left out of the text.
_MARKERS: Final[dict[ToolFormat, tuple[str, ...]]] = {
    ToolFormat.HERMES: ("<tool_call>", "</tool_call>"),
    ToolFormat.LLAMA3_JSON: ("<|python_tag|>",),
    ToolFormat.MISTRAL: ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    ToolFormat.QWEN3_CODER: ("<tool_call>", "</tool_call>"),
    ToolFormat.PYTHONIC: ("<|python_start|>", "<|python_end|>"),
    ToolFormat.DEEPSEEK_V3: _DEEPSEEK,
    ToolFormat.DEEPSEEK_V31: _DEEPSEEK,
    ToolFormat.GLM45: (
        *("<tool_call>", "</tool_call>"),
        *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    ToolFormat.GRANITE: ("<|tool_call|>", "<tool_call>"),
    ToolFormat.KIMI_K2: (
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ),
    ToolFormat.OPENAI: _HARMONY,
}


class AnswerParser:
    """Reads one choice's text, piece by piece. What it finds depends on the text alone, not on how
    that came in pieces."""

    def __init__(
        self,
        form: AnswerFormat,
        own: ResponseTemplate | None = None,
        like: AnswerParser | None = None,
    ) -> None:
        """`own`: the model's response template. `like`: a parser of the same format before its
        first `push`; what it has read of the prompt is not read again. Raises ApiError where the
        format is the model's template and there is none."""
        self._out = Collector(one=not form.parallel)
        self._form, self._own = form, own
        tools = None if like is None else like._tools
        called = form.functions if form.tools is not ToolFormat.NONE else ()
        functions = {function.name: function for function in called}
        self._tools: StagedParser | TemplateParser | None = None
        self._reasoning: ReasoningSplitter | None = None
        rest: Callable[[str], None] = self._out.content
        template = _template_of(form, own)
        if isinstance(tools, TemplateParser):
            self._tools = tools.anew(self._out)
            rest = self._tools.push
        elif template is not None:
            self._tools = TemplateParser(template, functions, self._out, form.begun)
            rest = self._tools.push
        elif functions:
            self._tools = _PARSERS[form.tools](functions, self._out)
            rest = self._tools.push
        self._read = rest
        if form.reasoning is not ReasoningFormat.NONE and not reads_all(form):
            begun = form.reasoning_begun
            self._reasoning = ReasoningSplitter(form.reasoning, begun, self._out, rest)
            self._read = self._reasoning.push

    def anew(self) -> AnswerParser:
        """Return a parser of another choice. Call it before the first `push`."""
        return AnswerParser(self._form, self._own, self)

    @property
    def over(self) -> bool:
        """Whether nothing that follows belongs to the answer."""
        return self._out.over

    @property
    def calls_end(self) -> bool:
        """Whether tool calls are why the answer ends: as in OpenAI's API, not where the request
        names a function."""
        return self._out.calls > 0 and not self._form.named

    def push(self, text: str) -> None:
        """Read the next piece of the text."""
        if text:
            self._read(text)

    def finish(self) -> None:
        """Read the end of the text."""
        if self._reasoning is not None:
            self._reasoning.finish()
        if self._tools is not None:
            self._tools.finish()

    def take(self) -> Delta:
        """Return what was found since the last time."""
        delta = self._out.take()
        if delta.reasoning and not self._form.include_reasoning:
            return Delta(delta.content, "", delta.calls)
        return delta


def reads_all(form: AnswerFormat) -> bool:
    """Return whether one template finds reasoning, content and calls."""
    harmony = form.tools is ToolFormat.OPENAI or form.reasoning is ReasoningFormat.OPENAI
    return harmony or form.tools is ToolFormat.RESPONSE_TEMPLATE


def _template_of(form: AnswerFormat, own: ResponseTemplate | None) -> ResponseTemplate | None:
    if form.tools is ToolFormat.RESPONSE_TEMPLATE:
        if own is None:
            raise invalid("The model has no response template here.", "answer")
        return own
    if reads_all(form):
        return HARMONY
    return TEMPLATES.get(form.tools) if form.functions else None


def markers_of(form: AnswerFormat) -> tuple[str, ...]:
    """Return the markers that the parser of this format must see, but for those of the model's own
    template."""
    if form.reasoning is ReasoningFormat.OPENAI or form.tools is ToolFormat.OPENAI:
        return _HARMONY
    reasoning = MARKERS.get(form.reasoning, ())
    return (*(_MARKERS.get(form.tools, ()) if form.functions else ()), *reasoning)
