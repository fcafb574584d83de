"""Stop strings in a text that arrives in pieces.

The text ends at the first place where a stop string is complete; of several that end there,
the longest counts. This does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Searches one text for stop strings (Knuth, Morris, Pratt: linear in the text)."""

    __slots__ = ("_borders", "_held", "_include", "_matched", "_stops")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`include`: the stop string stays in the text. Stops must not be empty."""
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop that the text ends with
        self._held = ""  # the longest such end: not given out yet
        self._include = include

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that can be given out, and the stop string if one ended it."""
        for position, character in enumerate(text):
            for which, stop in enumerate(self._stops):
                matched = self._step(which, stop, character)
                if matched == len(stop):
                    whole = self._held + text[: position + 1]
                    self._held = ""
                    kept = whole if self._include else whole[: -len(stop)]
                    return kept, stop
        whole = self._held + text
        certain = len(whole) - max(self._matched, default=0)
        self._held = whole[certain:]
        return whole[:certain], None

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _step(self, which: int, stop: str, character: str) -> int:
        matched = self._matched[which]
        borders = self._borders[which]
        while matched and stop[matched] != character:
            matched = borders[matched - 1]
        if stop[matched] == character:
            matched += 1
        self._matched[which] = matched
        return matched


def _borders(pattern: str) -> list[int]:
    """For each prefix of the pattern, the length of its longest proper border."""
    borders = [0] * len(pattern)
    length = 0
    for position in range(1, len(pattern)):
        while length and pattern[position] != pattern[length]:
            length = borders[length - 1]
        if pattern[position] == pattern[length]:
            length += 1
        borders[position] = length
    return borders
