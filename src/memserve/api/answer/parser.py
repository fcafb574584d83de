"""Parser of one answer: reasoning, content and tool calls in the text of one choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from memserve.api.answer.delta import Collector, Delta
from memserve.api.answer.format import AnswerFormat, ReasoningFormat, ToolFormat
from memserve.api.answer.json_formats import (
    HermesParser,
    JsonArgumentsParser,
    JsonListParser,
    LlamaParser,
    MistralParser,
)
from memserve.api.answer.pythonic import PythonicParser
from memserve.api.answer.qwen3_coder import Qwen3CoderParser
from memserve.api.answer.reasoning import MARKERS, ReasoningSplitter
from memserve.api.answer.staged import StagedParser

_PARSERS: Final[dict[ToolFormat, type[StagedParser]]] = {
    ToolFormat.HERMES: HermesParser,
    ToolFormat.LLAMA3_JSON: LlamaParser,
    ToolFormat.MISTRAL: MistralParser,
    ToolFormat.QWEN3_CODER: Qwen3CoderParser,
    ToolFormat.PYTHONIC: PythonicParser,
    ToolFormat.JSON_CALLS: JsonListParser,
    ToolFormat.JSON_ARGUMENTS: JsonArgumentsParser,
}
# Markers that some tokenizers have as special tokens, which are otherwise left out of the text.
_MARKERS: Final[dict[ToolFormat, tuple[str, ...]]] = {
    ToolFormat.HERMES: ("<tool_call>", "</tool_call>"),
    ToolFormat.LLAMA3_JSON: ("<|python_tag|>",),
    ToolFormat.MISTRAL: ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    ToolFormat.QWEN3_CODER: ("<tool_call>", "</tool_call>"),
    ToolFormat.PYTHONIC: ("<|python_start|>", "<|python_end|>"),
}


class AnswerParser:
    """Reads one choice's text, piece by piece. What it finds depends on the text alone, not on how
    that came in pieces."""

    def __init__(self, form: AnswerFormat) -> None:
        self._out = Collector(one=not form.parallel)
        self._form = form
        self._tools: StagedParser | None = None
        rest: Callable[[str], None] = self._out.content
        if form.functions and form.tools is not ToolFormat.NONE:
            functions = {function.name: function for function in form.functions}
            self._tools = _PARSERS[form.tools](functions, self._out)
            rest = self._tools.push
        self._reasoning: ReasoningSplitter | None = None
        self._read = rest
        if form.reasoning is not ReasoningFormat.NONE:
            begun = form.reasoning_begun
            self._reasoning = ReasoningSplitter(form.reasoning, begun, self._out, rest)
            self._read = self._reasoning.push

    @property
    def over(self) -> bool:
        """Whether nothing that follows belongs to the answer."""
        return self._out.over

    @property
    def calls_end(self) -> bool:
        """Whether tool calls are why the answer ends: as in OpenAI's API, not where the request
        names a function."""
        return self._out.calls > 0 and self._form.tools is not ToolFormat.JSON_ARGUMENTS

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


def markers_of(form: AnswerFormat) -> tuple[str, ...]:
    """Return the markers that the parser of this format must see."""
    reasoning = MARKERS.get(form.reasoning, ())
    return (*(_MARKERS.get(form.tools, ()) if form.functions else ()), *reasoning)
