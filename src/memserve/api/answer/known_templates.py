"""Formats of tool calls that are told as response templates.

Sources: the chat templates of DeepSeek-V3-0324, R1-0528 and V3.1, GLM-4.5 and Kimi-K2-Instruct, and
OpenAI's description of harmony.
"""

from __future__ import annotations

from typing import Final

from memserve.api.answer.format import ToolFormat
from memserve.api.limits import MAX_FUNCTION_NAME
from memserve.models.response_template import (
    STREAMED_CALL,
    ContentArgs,
    Delimiter,
    Part,
    Region,
    ResponseTemplate,
    literal,
    matching,
)

_NAME: Final = rf"(?P<name>[^\s<>]{{1,{MAX_FUNCTION_NAME}}})"
_LETTERS: Final = ContentArgs(strip=False)


def _content(*regions: Region, anchor: str = "") -> ResponseTemplate:
    """Return a template whose text outside of `regions` is content, to the letter."""
    content = Region(Part.CONTENT, arguments=_LETTERS)
    return ResponseTemplate((*regions, content), literal(anchor or "\0"))


def _json_call(opening: str, closing: Delimiter) -> Region:
    """Return the region of a call whose text is its arguments."""
    return Region(Part.CALLS, matching(opening), closing, content="json", transform=STREAMED_CALL)


_DEEPSEEK_END: Final = r"<｜tool▁call▁end｜>(?:\s{0,4}<｜tool▁calls▁end｜>)?"
_DEEPSEEK_BEGIN: Final = r"(?:<｜tool▁calls▁begin｜>\s{0,4})?<｜tool▁call▁begin｜>"

# A channel's name, with what else stands before its message.
MESSAGE: Final = r"(?: ?<\|constrain\|>\w{1,16}| (?:json|code))?<\|message\|>"
_TO: Final = rf" ?to=functions\.(?P<name>[\w.:\-/]{{1,{MAX_FUNCTION_NAME}}})"
ENDS: Final = ("<|end|>", "<|call|>", "<|return|>")

HARMONY: Final = _content(
    Region(
        Part.REASONING,
        matching(rf"(?:<\|start\|>assistant)?<\|channel\|>analysis{MESSAGE}"),
        literal(*ENDS),
        arguments=_LETTERS,
    ),
    # The recipient stands behind the role or behind the channel.
    _json_call(
        rf"(?:<\|start\|>assistant)?(?:{_TO}<\|channel\|>(?:commentary|analysis)"
        rf"|<\|channel\|>(?:commentary|analysis){_TO}){MESSAGE}",
        literal(*ENDS),
    ),
    Region(
        Part.CONTENT,
        matching(rf"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary){MESSAGE}"),
        literal(*ENDS),
        arguments=_LETTERS,
    ),
    anchor="<|start|>assistant",
)

TEMPLATES: Final = {
    ToolFormat.DEEPSEEK_V3: _content(
        _json_call(
            rf"{_DEEPSEEK_BEGIN}function<｜tool▁sep｜>{_NAME}\s{{0,4}}```json\n",
            matching(rf"\n?```\s{{0,4}}{_DEEPSEEK_END}"),
        )
    ),
    ToolFormat.DEEPSEEK_V31: _content(
        _json_call(rf"{_DEEPSEEK_BEGIN}{_NAME}<｜tool▁sep｜>", matching(_DEEPSEEK_END))
    ),
    ToolFormat.GLM45: _content(
        Region(
            Part.CALLS,
            matching(rf"<tool_call>\s{{0,4}}{_NAME}"),
            literal("</tool_call>"),
            content="xml-inline",
            arguments=ContentArgs(
                tag_pattern="<arg_key>(?P<key>[^<]*)</arg_key>"
                r"\s{0,4}<arg_value>(?P<value>.*?)</arg_value>"
            ),
            transform={"name": "{name}", "arguments": "{content}"},
            must_close=True,
        )
    ),
    ToolFormat.KIMI_K2: _content(
        _json_call(
            r"(?:<\|tool_calls_section_begin\|>\s{0,4})?<\|tool_call_begin\|>\s{0,4}"
            rf"(?:functions\.)?{_NAME}:\d{{1,6}}\s{{0,4}}<\|tool_call_argument_begin\|>",
            matching(r"<\|tool_call_end\|>(?:\s{0,4}<\|tool_calls_section_end\|>)?"),
        )
    ),
    ToolFormat.OPENAI: HARMONY,
}
