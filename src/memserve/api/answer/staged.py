"""Base of the parsers of tool calls: stages, each of which reads a part of the text.

Text that may be a call is kept until its function is known. From then on it is a call, and what
follows belongs to its arguments up to their end, even if it is no valid JSON. What turns out
before to be none is content, markers included. No text is read twice, so that parsing takes time
in proportion to the text, however it comes in pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from memserve.api.answer.delta import Collector
from memserve.api.answer.format import Function
from memserve.api.answer.json_call import CallState, JsonCall

Stage = Callable[[str, int], int]

_BLANK = re.compile(r"\s*")


def skip_blank(text: str, at: int) -> int:
    """Return the position of the next character from `at` on that is no white space."""
    match = _BLANK.match(text, at)
    return len(text) if match is None else match.end()


def overlap(text: str, markers: Iterable[str]) -> int:
    """Return the length of the longest end of `text` that begins one of `markers`, and is shorter
    than it."""
    longest = 0
    for marker in markers:
        for size in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:size]):
                longest = size
                break
    return longest


class StageReader:
    """Reads a text, piece by piece, in stages.

    A stage takes a text and a position, and returns the position behind what it has read. If it
    reads nothing and names no other stage, it needs more text; it gets the same again with more.
    """

    def __init__(self, first: Stage) -> None:
        self._stage = first
        self._held = ""  # not read yet: the beginning of a marker

    def push(self, text: str) -> None:
        """Read the next piece of the text."""
        if self._held:
            text = self._held + text
        at = 0
        while at < len(text):
            before, stage = at, self._stage
            at = stage(text, at)
            if at == before and self._stage == stage:
                break
        self._held = text[at:]

    def _take_held(self) -> str:
        """Return the text that no stage has read, once."""
        held, self._held = self._held, ""
        return held


class StagedParser(StageReader):
    """Reads an answer's text, and writes content and calls to a collector."""

    # Begin a call in content.
    markers: tuple[str, ...] = ()

    def __init__(self, functions: Mapping[str, Function], out: Collector) -> None:
        super().__init__(self._content)
        self._functions = functions
        self._out = out
        # Without markers, a pattern that is nowhere.
        self._search = re.compile("|".join(map(re.escape, self.markers)) or r"(?!)").search
        self._raw: list[str] = []  # what is content if the call is none
        self._blank: list[str] = []  # white space after content: framing if a call follows
        self._json = JsonCall(functions, self._begin, out.arguments)

    def finish(self) -> None:
        """Read the end of the text: what was held back is content."""
        rest = self._take_held()
        if rest and not self._unread(rest):
            self._raw.append(rest)
        self._release()
        if not self._out.calls:  # else it is framing
            self._out.content("".join(self._blank))
        self._blank = []

    def _unread(self, rest: str) -> bool:
        """Return whether the unread end of the text is framing."""
        return False

    def _marked(self, marker: str) -> Stage:
        """Return the stage that follows one of `markers` in content."""
        raise NotImplementedError

    def _skip(self, text: str, at: int) -> int:
        """Return the position behind white space, which is content if the call is none."""
        begin = skip_blank(text, at)
        self._raw.append(text[at:begin])
        return begin

    def _open(self, text: str, at: int, opening: str, call: Stage) -> int:
        """Read the white space that an answer begins with. An answer that goes on with `opening`
        is read by the stage `call`, any other is content."""
        begin = skip_blank(text, at)
        self._say(text[at:begin])
        if begin < len(text):
            self._stage = call if text[begin] == opening else self._content
        return begin

    # --- stages ---------------------------------------------------------------------------------

    def _content(self, text: str, at: int) -> int:
        found = self._search(text, at)
        if found is not None:
            self._say(text[at : found.start()])
            self._raw.append(found[0])
            self._stage = self._marked(found[0])
            return found.end()
        end = len(text) - overlap(text[at:], self.markers)
        self._say(text[at:end])
        return end

    def _begin_json(self, text: str, at: int) -> int:
        self._json.reset()
        self._stage = self._read_json
        return at

    def _read_json(self, text: str, at: int) -> int:
        end = self._json.push(text, at)
        if not self._json.committed:
            self._raw.append(text[at:end])
        if self._json.state is CallState.ENDED:
            self._end()
        elif self._json.state is CallState.FAILED:
            if self._json.committed:
                self._end()
                self._stage = self._content
            else:
                self._fail()
        return end

    def _after(self, text: str, at: int) -> int:
        """Read what follows a call."""
        self._stage = self._content
        return at

    # --- what stages say ------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        """Add content. White space at its end waits for what follows."""
        words = text.rstrip()
        if words:
            self._out.content("".join(self._blank) + words)
            self._blank = []
        if len(words) < len(text):
            self._blank.append(text[len(words) :])

    def _release(self) -> None:
        """Make content of what looked like a call."""
        if self._raw:
            self._say("".join(self._raw))
            self._raw = []

    def _fail(self) -> None:
        """Make content of what looked like a call, and go on with content."""
        self._release()
        self._stage = self._content

    def _begin(self, name: str) -> None:
        """Begin a call of a known function: what was read of it, and the white space before, is
        framing."""
        self._raw = []
        self._blank = []
        self._out.begin(name)

    def _end(self) -> None:
        self._out.end()
        self._stage = self._after
