"""Splitter of an answer's text into reasoning and what follows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from memserve.api.answer.delta import Collector
from memserve.api.answer.format import ReasoningFormat
from memserve.api.answer.staged import StageReader, overlap, skip_blank

MARKERS: Final[dict[ReasoningFormat, tuple[str, str]]] = {
    ReasoningFormat.DEEPSEEK_R1: ("<think>", "</think>"),
    ReasoningFormat.QWEN3: ("<think>", "</think>"),
    ReasoningFormat.MISTRAL: ("[THINK]", "[/THINK]"),
}


class ReasoningSplitter(StageReader):
    """Writes reasoning to a collector, and passes on what follows it.

    Line breaks beside a marker belong to the marker: they are neither reasoning nor content.
    """

    def __init__(
        self, form: ReasoningFormat, begun: bool, out: Collector, rest: Callable[[str], None]
    ) -> None:
        """`begun`: the prompt has the marker already. `rest`: takes the text after the
        reasoning."""
        super().__init__(self._start)
        self._begin, self._end = MARKERS[form]
        self._begun = begun or form is ReasoningFormat.DEEPSEEK_R1
        self._out = out
        self._rest = rest
        self._lead: list[str] = []  # white space before the marker
        self._breaks = 0  # line breaks after reasoning, which may be the marker's

    def finish(self) -> None:
        """Read the end of the text."""
        rest = self._take_held()
        if self._stage == self._start:
            rest = "".join(self._lead) + rest
            self._out.reasoning(rest) if self._begun else self._rest(rest)
        elif self._stage == self._reasoning:
            self._out.reasoning("\n" * self._breaks + rest)

    def _start(self, text: str, at: int) -> int:
        begin = skip_blank(text, at)
        if begin > at:
            self._lead.append(text[at:begin])
        if text.startswith(self._begin, begin):
            self._stage = self._first_line
            return begin + len(self._begin)
        if self._begin.startswith(text[begin:]):
            return begin
        lead = "".join(self._lead)
        if self._begun:
            self._say(lead.lstrip("\n"))
            self._stage = self._reasoning
        else:
            self._rest(lead)
            self._stage = self._after
        return begin

    def _first_line(self, text: str, at: int) -> int:
        at = _line_start(text, at)
        if at < len(text):
            self._stage = self._reasoning
        return at

    def _reasoning(self, text: str, at: int) -> int:
        found = text.find(self._end, at)
        if found >= 0:
            self._say(text[at:found])
            self._stage = self._last_line
            return found + len(self._end)
        end = len(text) - overlap(text[at:], (self._end,))
        self._say(text[at:end])
        return end

    def _say(self, text: str) -> None:
        words = text.rstrip("\n")
        if words:
            self._out.reasoning("\n" * self._breaks + words)
            self._breaks = 0
        self._breaks += len(text) - len(words)

    def _last_line(self, text: str, at: int) -> int:
        at = _line_start(text, at)
        if at < len(text):
            self._stage = self._after
        return at

    def _after(self, text: str, at: int) -> int:
        self._rest(text[at:])
        return len(text)


def _line_start(text: str, at: int) -> int:
    while at < len(text) and text[at] == "\n":
        at += 1
    return at
