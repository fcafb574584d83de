"""Search for stop strings in a text that arrives in pieces.

The text ends at the first place where a stop string is complete; of several that end there,
the longest counts. The result does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from copy import copy


class StopStrings:
    """Searches one text for stop strings.

    Only the longest suffix of the text that begins a stop string is held back. Each further
    character extends it; then its start is cut until it begins a stop string again (the automaton
    of Aho and Corasick, its states as strings, found by bisection). Every character is added once
    and dropped once, however many stop strings there are.
    """

    __slots__ = ("_firsts", "_held", "_include", "_lasts", "_sorted", "_stops")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`include`: the stop string stays in the text. Stops must not be empty."""
        self._sorted = sorted(set(stops))
        self._stops = tuple(sorted(self._sorted, key=len, reverse=True))
        self._firsts = frozenset([stop[0] for stop in self._stops])
        self._lasts = frozenset([stop[-1] for stop in self._stops])
        self._held = ""  # the longest suffix of the text that begins a stop string
        self._include = include

    def anew(self) -> StopStrings:
        """Return a search of another text for these stop strings."""
        other = copy(self)
        other._held = ""
        return other

    def push(self, text: str, ends: bool = True) -> tuple[str, str | None]:
        """Return the text that can be given out, and the stop string that ended it, or None.
        `ends`: a stop string that is complete in `text` ends it; if False, only one that begins
        there and is complete later."""
        begun, held = self._held, self._held
        for position, character in enumerate(text):
            if not held and character not in self._firsts:
                continue
            held = self._beginning(held + character)
            if ends and character in self._lasts and (stop := self._complete(held)) is not None:
                whole = begun + text[: position + 1]
                self._held = ""
                return (whole if self._include else whole[: -len(stop)]), stop
        whole = begun + text
        self._held = held
        return whole[: len(whole) - len(held)], None

    def flush(self) -> str:
        """Return the text that was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, end: str) -> str:
        """Return the longest suffix of `end` that a stop string begins with."""
        while end:
            at = bisect_left(self._sorted, end)
            if at < len(self._sorted) and self._sorted[at].startswith(end):
                break
            end = end[1:]
        return end

    def _complete(self, end: str) -> str | None:
        """Return the longest stop string at the end of `end`; None: there is none."""
        if not end.endswith(self._stops):
            return None
        return next(stop for stop in self._stops if end.endswith(stop))
