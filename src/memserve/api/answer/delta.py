"""A part of an answer, and the collector that parsers write it to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from memserve.api.answer.format import ToolFormat

_ID_BYTES = 12
_SHORT_ID = 9  # Mistral's chat templates take no other length


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A part of a tool call. `name` is in the call's first part alone. `arguments` is JSON, or a
    fragment of it."""

    index: int
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Delta:
    """A part of an answer; any part of it may be empty."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.content or self.reasoning or self.calls)


def joined(deltas: Iterable[Delta]) -> Delta:
    """Return consecutive deltas as one."""
    collector = Collector()
    for delta in deltas:
        collector.content(delta.content)
        collector.reasoning(delta.reasoning)
        for call in delta.calls:
            if call.name is not None:
                collector.begin(call.name)
            collector.arguments(call.arguments)
    return collector.take()


class Collector:
    """Collects what parsers find. Once `over`, nothing is added."""

    __slots__ = ("_arguments", "_content", "_names", "_reasoning", "calls", "one", "over")

    def __init__(self, one: bool = False) -> None:
        """`one`: the answer is over after one call."""
        self.calls = 0  # begun so far
        self.one = one
        self.over = False
        self._clear()

    def _clear(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._names: dict[int, str] = {}
        self._arguments: dict[int, list[str]] = {}

    def content(self, text: str) -> None:
        if text and not self.over:
            self._content.append(text)

    def reasoning(self, text: str) -> None:
        if text and not self.over:
            self._reasoning.append(text)

    def begin(self, name: str) -> None:
        """Begin the next tool call."""
        if not self.over:
            self._names[self.calls] = name
            self._arguments[self.calls] = []
            self.calls += 1

    def arguments(self, text: str) -> None:
        """Add to the arguments of the call that was begun last."""
        if text and not self.over:
            self._arguments.setdefault(self.calls - 1, []).append(text)

    def end(self) -> None:
        """End the call that was begun last."""
        self.over = self.over or self.one

    def take(self) -> Delta:
        """Return what was collected since the last time."""
        delta = Delta(
            "".join(self._content),
            "".join(self._reasoning),
            tuple(
                CallDelta(index, self._names.get(index), "".join(parts))
                for index, parts in self._arguments.items()
            ),
        )
        self._clear()
        return delta


def tool_call_id(call_id: str, choice: int, index: int, tools: ToolFormat) -> str:
    """Return the id of a tool call: the same at each instance that continues the stream."""
    name = f"{call_id}/{choice}/{index}".encode()
    digest = blake2b(name, digest_size=_ID_BYTES).hexdigest()
    return digest[:_SHORT_ID] if tools is ToolFormat.MISTRAL else f"call_{digest}"
