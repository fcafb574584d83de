"""Parser of answers by a response template: regions between delimiters, parts of the answer.

Regions are found as by Transformers (`ResponseParser`), with these differences. Text that comes in
pieces may have been sent already: a field that comes twice is added to, not replaced. What looks
like a call and is none is content. Patterns come from models, whom nobody has to trust: they have
a budget of the processor's time, and an answer that uses it up is content from there on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Final

from memserve.api.answer.delta import Collector
from memserve.api.answer.format import Function
from memserve.api.answer.json_call import JsonValue, blank_end
from memserve.api.answer.template_value import calls_in
from memserve.models.response_template import ContentArgs, Delimiter, Part, Region, ResponseTemplate

# Seconds of the processor that patterns may take for one answer, and more with each piece of it:
# those of models take 10 us for a piece.
BUDGET: Final = 0.1
BUDGET_BY_PIECE: Final = 0.001
# A region that is parsed as a whole may have this many characters; further ones make it content.
MAX_WHOLE: Final = 4 * 2**20
# Characters behind which read text is dropped, and what stays of it for patterns that look behind.
_DROP_AFTER, _LOOK_BEHIND = 8192, 256
_LEAST: Final = 1e-4  # seconds: no time at all would be no limit
_LETTERS: Final = Region(Part.CONTENT, arguments=ContentArgs(strip=False))


class _TooLong(Exception):
    """A region that is parsed as a whole has more than MAX_WHOLE characters."""


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A delimiter's next match; None: there is none. `held`: more text could change it."""

    match: Any = None
    held: bool = False


class _Text:
    """Text of content or reasoning. White space at its end waits for what follows."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._blank: list[str] = []
        self.said = False

    def push(self, text: str, strip: bool) -> None:
        if strip and not self.said:
            text = text.lstrip()
        words = text.rstrip()
        if words:
            self._say("".join(self._blank) + words)
            self._blank = []
            self.said = True
        if len(words) < len(text):
            self._blank.append(text[len(words) :])

    def settle(self, keep: bool = False) -> None:
        """End a region. White space at its end is left out, or with `keep` said."""
        if keep:
            self._say("".join(self._blank))
        self._blank = []

    def anew(self, say: Callable[[str], None]) -> _Text:
        """Return another answer's text that goes on as this one does."""
        other = copy(self)
        other._say, other._blank = say, [*self._blank]
        return other


class _Arguments:
    """The text of a call that is passed on: the JSON object, without what is around it."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._value = JsonValue()
        self.said = False

    def push(self, text: str) -> None:
        begin = 0 if self.said else blank_end(text, 0)
        if begin == len(text) or self._value.ended:
            return
        if not self.said:
            self._value.begin("{" if text[begin] == "{" else "[")
            self.said = True
        end = self._value.push(text, begin)
        self._say(text[begin:end])

    def anew(self, say: Callable[[str], None]) -> _Arguments:
        """Return another answer's arguments that go on as these do."""
        other = copy(self)
        other._say, other._value = say, copy(self._value)
        return other


class TemplateParser:
    """Reads an answer's text, and writes content, reasoning and calls to a collector.

    A call whose text is its arguments in JSON is passed on in fragments, any other one when it is
    whole. Takes time in proportion to the text, however it comes in pieces.
    """

    def __init__(
        self,
        template: ResponseTemplate,
        functions: Mapping[str, Function],
        out: Collector,
        begun: str = "",
    ) -> None:
        """`begun`: what the prompt has of the answer already; nothing is said of it."""
        self._implicit = template.implicit
        self._openings: list[tuple[Delimiter, Region | None]] = [
            (region.opening, region) for region in template.regions if region.opening is not None
        ]
        self._functions = functions
        self._out = Collector()
        self._buffer = ""
        self._at = 0  # what is before it was read
        self._seconds = BUDGET
        self._given_up = False
        self._empty_at = -1  # of the last match without characters
        self._ahead: dict[Delimiter, _Ahead] = {}  # in the buffer as it is
        self._held_from = 0  # what may become a delimiter
        self._region = self._implicit
        self._captures: dict[str, str] = {}  # of the region's opening
        self._arguments: _Arguments | None = None  # of a call that is passed on
        self._raw: list[str] = []  # the opening and the text of a call that is not
        self._size = 0  # characters of that
        self._content = _Text(self._say_content)
        self._reasoning = _Text(self._say_reasoning)
        if begun:
            self._buffer = begun
            self._read(False)
            self._content.settle()
            self._reasoning.settle()
        self._out = out
        self._go_on()

    def anew(self, out: Collector) -> TemplateParser:
        """Return a parser of another answer to the same prompt, which writes to `out`. Its state is
        this one's before the first `push`: what the prompt has begun is not read again."""
        other = copy(self)
        other._out = out
        other._raw = [*self._raw]
        other._ahead = {}
        other._content = self._content.anew(other._say_content)
        other._reasoning = self._reasoning.anew(other._say_reasoning)
        if self._arguments is not None:
            other._arguments = self._arguments.anew(other._say_arguments)
        other._go_on()
        return other

    def _go_on(self) -> None:
        """Begin the call that the prompt has begun, if it has."""
        if self._arguments is not None:
            self._begin(self._captures["name"])

    def _say_content(self, text: str) -> None:
        self._out.content(text)

    def _say_reasoning(self, text: str) -> None:
        self._out.reasoning(text)

    def _say_arguments(self, text: str) -> None:
        self._out.arguments(text)

    def push(self, text: str) -> None:
        """Read the next piece of the text."""
        self._seconds = min(BUDGET, self._seconds + BUDGET_BY_PIECE)
        if self._at > _DROP_AFTER:
            drop = self._at - _LOOK_BEHIND
            self._buffer = self._buffer[drop:]
            self._at -= drop
            self._empty_at -= drop
        self._buffer += text
        self._read(False)

    def finish(self) -> None:
        """Read the end of the text."""
        self._read(True)
        self._close("", closed=False)
        self._content.settle(keep=not self._strips_content() and not self._out.calls)

    def _strips_content(self) -> bool:
        return self._implicit is None or self._implicit.arguments.strip

    # --- finding regions ------------------------------------------------------------------------

    def _read(self, last: bool) -> None:
        """Read the buffer up to what more text could change; with `last`, all of it."""
        self._ahead = {}
        try:
            while not self._given_up and (found := self._next(last)) is not None:
                match, region = found
                self._take(match.start())
                self._at = match.end()
                if match.start() == match.end():
                    self._empty_at = match.end()
                self._close(match[0] if region is None else "", closed=region is None)
                if region is not None:
                    self._open(region, match)
            self._take(len(self._buffer) if last or self._given_up else self._held_from)
        except (TimeoutError, _TooLong):
            self._give_up()
            self._take(len(self._buffer))

    def _take(self, end: int) -> None:
        """Read the buffer up to `end`: it is the current region's. Raises _TooLong."""
        text = self._buffer[self._at : end]
        self._at = end
        self._add(text)

    def _next(self, last: bool) -> tuple[Any, Region | None] | None:
        """Return the next delimiter's match, with the region that it opens, None if it closes one.
        Sets where the text begins that may become a delimiter. Raises TimeoutError."""
        begun = time.thread_time()
        try:
            found = self._look(last)
        finally:
            self._charge(begun)
        if self._seconds < _LEAST:
            raise TimeoutError
        return found

    def _charge(self, begun: float) -> None:
        """Take the time since `begun` from the budget, of which half at most: patterns that take
        too long raise TimeoutError, and a pause of the garbage collector is not theirs."""
        self._seconds -= min(time.thread_time() - begun, self._seconds / 2)

    def _look(self, last: bool) -> tuple[Any, Region | None] | None:
        watched: list[tuple[Delimiter, Region | None]] = []
        if self._region is self._implicit:
            watched += self._openings
        if self._region is not None and self._region.closing is not None:
            watched.append((self._region.closing, None))
        self._held_from = len(self._buffer)
        best: tuple[int, int, bool] | None = None
        found: tuple[Any, Region | None] | None = None
        timeout = max(self._seconds / (len(watched) or 1), _LEAST)
        for delimiter, region in watched:
            ahead = self._ahead.get(delimiter)
            if ahead is None or self._is_behind(ahead.match):
                ahead = self._ahead[delimiter] = self._search(delimiter, last, timeout)
            match = ahead.match
            if match is None:
                continue
            if ahead.held:
                self._held_from = min(self._held_from, match.start())
                continue
            # The first one, of several the longest, and an opening before a closing.
            key = (match.start(), match.start() - match.end(), region is None)
            if best is None or key < best:
                best, found = key, (match, region)
        if best is not None and not last and best[0] >= self._held_from:
            return None  # what is held begins before it
        return found

    def _is_behind(self, match: Any) -> bool:
        """Return whether a match was read over already."""
        return match is not None and (match.start() < self._at or self._repeats(match))

    def _repeats(self, match: Any) -> bool:
        """Return whether a match is the last one without characters: it would be found for ever."""
        return bool(match.start() == match.end() == self._empty_at)

    def _search(self, delimiter: Delimiter, last: bool, timeout: float) -> _Ahead:
        search = delimiter.pattern.search
        match = search(self._buffer, self._at, partial=not last, timeout=timeout)
        if match is not None and self._repeats(match):
            match = search(self._buffer, self._at + 1, partial=not last, timeout=timeout)
        if match is None:
            return _Ahead()
        held = not last and (match.partial or self._may_grow(delimiter, match, timeout))
        return _Ahead(match, held)

    def _may_grow(self, delimiter: Delimiter, match: Any, timeout: float) -> bool:
        """Return whether more text could change a whole match."""
        if delimiter.literals is not None and not delimiter.grows:
            return False
        if any(end == len(self._buffer) for _, end in match.regs):
            return True  # also a group in a condition, which is no part of the match
        whole = delimiter.pattern.fullmatch
        more = whole(self._buffer, match.start(), partial=True, timeout=timeout)
        return more is not None

    def _give_up(self) -> None:
        """Go on without the template: what is not read yet, and all that follows, is content."""
        if self._raw:
            self._content.push("".join(self._raw), strip=False)
            self._raw = []
        self._close("", closed=False)
        self._given_up = True
        self._region = _LETTERS

    # --- what regions hold ----------------------------------------------------------------------

    def _open(self, region: Region, match: Any) -> None:
        self._region = region
        if region.part is Part.CALLS:
            captured = match.groupdict()
            self._captures = {key: text for key, text in captured.items() if text is not None}
            name = self._captures.get("name", "")
            if region.streamed_call and name in self._functions:
                self._begin(name)
                self._arguments = _Arguments(self._say_arguments)
            else:
                self._raw = [match[0]]
                self._size = 0
        elif region.part is not Part.NOTHING:
            text = self._content if region.part is Part.CONTENT else self._reasoning
            if text is not self._content:
                self._content.settle()
            if text.said:
                text.push("\n" if region.join is None else region.join, strip=False)

    def _add(self, text: str) -> None:
        """Add text to the current region."""
        region = self._region
        if not text or region is None:
            return
        if region.part is Part.CONTENT:
            self._content.push(text, region.arguments.strip)
        elif region.part is Part.REASONING:
            self._reasoning.push(text, region.arguments.strip)
        elif self._arguments is not None:
            self._arguments.push(text)
        elif self._raw:
            self._raw.append(text)
            self._size += len(text)
            if self._size > MAX_WHOLE:
                raise _TooLong

    def _close(self, closing: str, closed: bool) -> None:
        """End the current region. `closed`: by the text `closing`, not by the answer's end."""
        region, raw, arguments = self._region, self._raw, self._arguments
        self._region, self._raw, self._arguments = self._implicit, [], None
        if region is None:
            return
        if arguments is not None:
            if closed and not arguments.said:  # cut off behind its opening, it has said nothing
                self._out.arguments("{}")
            self._out.end()
        elif raw:
            self._end_whole(region, raw, closing, closed)
        elif region.part is Part.REASONING:
            self._reasoning.settle(keep=not region.arguments.strip)
        elif region.part is Part.CONTENT and closed and region.arguments.strip:
            self._content.settle()

    def _end_whole(self, region: Region, raw: list[str], closing: str, closed: bool) -> None:
        """Say the calls in a region's text, or else that text as content."""
        begun = time.thread_time()
        try:
            if region.must_close and not closed:
                raise ValueError("cut off")
            text, seconds = "".join(raw[1:]), max(self._seconds, _LEAST)
            calls = calls_in(region, text, self._captures, self._functions, seconds)
        except (ValueError, TimeoutError) as error:
            self._content.push("".join(raw) + closing, strip=False)
            if isinstance(error, TimeoutError):
                self._seconds = 0
            return
        finally:
            self._charge(begun)
        for call in calls:
            self._begin(call.name)
            self._out.arguments(call.arguments)
            self._out.end()

    def _begin(self, name: str) -> None:
        self._content.settle()
        self._out.begin(name)
