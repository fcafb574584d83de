"""Stop strings in a text that arrives in pieces.

The text ends at the first place where a stop string is complete; of several that end there,
the longest counts. This does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from copy import copy


class StopStrings:
    """Searches one text for stop strings.

    Of the text so far, only its longest end that begins a stop string matters: that is held
    back, and each new character makes it one longer, or shorter until it begins one again (the
    automaton of Aho and Corasick, its states as strings, found by bisection). Over a text every
    character is added once and dropped once, however many stop strings there are.
    """

    __slots__ = ("_firsts", "_held", "_include", "_lasts", "_sorted", "_stops")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`include`: the stop string stays in the text. Stops must not be empty."""
        self._sorted = sorted(set(stops))
        self._stops = tuple(sorted(self._sorted, key=len, reverse=True))
        self._firsts = frozenset([stop[0] for stop in self._stops])
        self._lasts = frozenset([stop[-1] for stop in self._stops])
        self._held = ""  # the longest end of the text that begins a stop: not given out yet
        self._include = include

    def anew(self) -> StopStrings:
        """A search of another text for the same."""
        other = copy(self)
        other._held = ""
        return other

    def push(self, text: str, ends: bool = True) -> tuple[str, str | None]:
        """Text that can be given out, and the stop string if one ended it. `ends`: a stop string
        that is complete within `text` ends it; else only one that begins there and is complete
        later."""
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
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, end: str) -> str:
        """The longest end of `end` that a stop string begins with."""
        while end:
            at = bisect_left(self._sorted, end)
            if at < len(self._sorted) and self._sorted[at].startswith(end):
                break
            end = end[1:]
        return end

    def _complete(self, end: str) -> str | None:
        """The longest stop string at the end of `end`."""
        if not end.endswith(self._stops):
            return None
        return next(stop for stop in self._stops if end.endswith(stop))
