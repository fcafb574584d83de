"""Grammars of answers in harmony: of calls and of the final message, behind what the prompt has
begun of the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum, auto
from typing import Final

from memserve.api.answer.known_templates import ENDS, MESSAGE
from memserve.api.errors import invalid
from memserve.api.grammar import Grammar, GrammarKind
from memserve.api.openai_tools import Tool
from memserve.gateway.answer_grammar import Format, Written, format_of, strict_alone, tags

_CHANNEL: Final = "<|channel|>"
_AGAIN: Final = f"<|start|>assistant{_CHANNEL}"
_END: Final = "<|end|>"
# Behind _CHANNEL. The end of an answer is an end token of the model, which is no text.
_ANALYSIS: Final = "analysis<|message|>"
_PREAMBLE: Final = "commentary<|message|>"
_FINAL: Final = "final<|message|>"
_CALL: Final = Written("commentary to=functions.NAME <|constrain|>json<|message|>", "", "", None)
_ANY_TEXT: Final[Format] = {"type": "any_text"}

# Text in no channel is content, like text in the final one.
_FINAL_BEGUN: Final = re.compile(rf"\s*(?:<\|channel\|>final)?{MESSAGE}")
_FURTHER: Final = ("<|start|>", _CHANNEL, *ENDS)


class Begun(Enum):
    """A prompt's part of the answer: nothing, the marker of a channel, a part of the final
    message, or anything else."""

    NOTHING = auto()
    CHANNEL = auto()
    FINAL = auto()
    OTHER = auto()


def begun_in(text: str) -> Begun:
    """Return what an answer's beginning, the text behind the prompt's last `<|start|>assistant`,
    has."""
    if not text.strip():
        return Begun.NOTHING
    if text.strip() == _CHANNEL:
        return Begun.CHANNEL
    header = _FINAL_BEGUN.match(text)
    if header is None or any(text.find(each, header.end()) >= 0 for each in _FURTHER):
        return Begun.OTHER
    return Begun.FINAL


def constrained(
    grammar: Grammar | None, tools: Sequence[Tool], required: bool, begun: Begun
) -> Grammar:
    """Return the grammar of an answer that calls one of `tools`, or, if none is `required`, whose
    final message obeys `grammar`. Without `grammar` that is any text, and of the tools the strict
    ones alone are called by their schemas. `begun`: NOTHING or CHANNEL.

    Raises ApiError (400) for a grammar that does not go together with calls.
    """
    like = Grammar(GrammarKind.STRUCTURAL_TAG, "", param="tools")
    if required:
        return _grammar(tools, None, like, begun)
    if grammar is None:
        return _grammar(strict_alone(tools), _ANY_TEXT, like, begun)
    answer = format_of(grammar)
    if answer is not None:
        return _grammar(tools, answer, grammar, begun)
    if tools:
        raise invalid(f"'{grammar.kind}' and tools that may be called do not go together.", "tools")
    return grammar


def _grammar(tools: Sequence[Tool], answer: Format | None, like: Grammar, begun: Begun) -> Grammar:
    ends = [_CALL.tag(tool) for tool in tools]
    if answer is not None:
        ends.append({"type": "tag", "begin": _FINAL, "content": answer, "end": ""})
    elements: list[Format] = []
    if begun is Begun.NOTHING:
        elements.append(_text(_CHANNEL))
    for begin in (_ANALYSIS, _PREAMBLE):
        said = {"type": "tag", "begin": begin, "content": _ANY_TEXT, "end": _END}
        message = {"type": "sequence", "elements": [said, _text(_AGAIN)]}
        elements.append({"type": "optional", "content": message})
    whole = {"type": "sequence", "elements": [*elements, {"type": "or", "elements": ends}]}
    return tags(whole, like)


def _text(value: str) -> Format:
    return {"type": "const_string", "value": value}
