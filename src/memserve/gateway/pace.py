"""`Pace`: the times between a stream's tokens, as its client gets them."""

from __future__ import annotations

from memserve.api.histogram import Histogram


class Pace:
    """Tokens of one stream of a single sequence. Its owner says when they were sent, and the end.

    Counts as instances do: tokens that come together share the time since the ones before. A
    pause for a failover is one of these times, since the client waits for it.
    """

    __slots__ = ("_behind_first", "_first", "_inter_token", "_last", "_per_token")

    def __init__(self, inter_token: Histogram, per_token: Histogram) -> None:
        """The histograms are the caller's: of all its streams together."""
        self._inter_token = inter_token
        self._per_token = per_token
        self._first: float | None = None  # clock time
        self._last = 0.0
        self._behind_first = 0  # tokens

    def sent(self, tokens: int, now: float) -> None:
        """Count so many tokens, at least one, that were written to the client at `now`."""
        if self._first is None:
            self._first = now
            self._behind_first = tokens - 1
        else:
            self._inter_token.observe((now - self._last) / tokens, tokens)
            self._behind_first += tokens
        self._last = now

    def ended(self) -> None:
        """Count the mean time per token behind the first one (TPOT). Only of a whole stream."""
        if self._first is not None and self._behind_first:
            self._per_token.observe((self._last - self._first) / self._behind_first)
