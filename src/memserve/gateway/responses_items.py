"""The items of a Response while they are generated, and the events that tell of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import msgspec

from memserve.api import responses
from memserve.api.responses import FunctionCallItem, OutputText, ReasoningText

_encode = msgspec.json.Encoder().encode
Tell = Callable[[str, bytes], None]  # an event's type, and its fields without braces


class _TopScore(msgspec.Struct, frozen=True):
    token: str
    logprob: float


class _Score(msgspec.Struct, frozen=True):
    """A token's log-probabilities in an event's delta: without bytes."""

    token: str
    logprob: float
    top_logprobs: tuple[_TopScore, ...] = ()


_score = msgspec.json.Decoder(_Score)


def event(name: str, sequence: int, fields: bytes) -> bytes:
    """Return a server-sent event. `fields`: of its JSON object, without braces."""
    kind = name.encode()
    return b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b}\n\n' % (
        kind,
        kind,
        sequence,
        fields,
    )


class Item(ABC):
    """An item that is generated. `_at`: the fields of every event that names it."""

    prefix = ""  # of ids

    def __init__(self, stem: str, index: int) -> None:
        """`stem`: part of its id. `index`: its place in the output."""
        self.id = f"{self.prefix}_{stem}_{index}"
        self._index = index
        self._texts: list[str] = []
        self._at = b'"item_id":"%b","output_index":%d' % (self.id.encode(), index)

    @abstractmethod
    def open(self, tell: Tell) -> None:
        """Tell that it begins."""

    @abstractmethod
    def add(self, text: str, tell: Tell, scores: Sequence[msgspec.Raw] = ()) -> None:
        """Add text, with its tokens' log-probabilities (JSON, as chats have them)."""

    @abstractmethod
    def close(self, status: str, tell: Tell) -> bytes:
        """Tell that it is done, and return its JSON."""

    def _added(self, item: object, tell: Tell) -> None:
        told = b'"output_index":%d,"item":%b' % (self._index, _encode(item))
        tell("response.output_item.added", told)

    def _done(self, item: object, tell: Tell) -> bytes:
        json = _encode(item)
        tell("response.output_item.done", b'"output_index":%d,"item":%b' % (self._index, json))
        return json


class MessageItem(Item):
    """The assistant's message, of one text."""

    prefix = "msg"

    def __init__(self, stem: str, index: int) -> None:
        super().__init__(stem, index)
        self._at += b',"content_index":0'
        self._scores: list[bytes] = []  # log-probabilities of each token, JSON
        self._told: list[bytes] = []  # of the same, what deltas have

    def open(self, tell: Tell) -> None:
        self._added(self._item((), "in_progress"), tell)
        tell("response.content_part.added", self._at + b',"part":' + _encode(OutputText("")))

    def add(self, text: str, tell: Tell, scores: Sequence[msgspec.Raw] = ()) -> None:
        self._texts.append(text)
        told = b""
        if scores:
            self._scores += map(bytes, scores)
            deltas = [_encode(_score.decode(score)) for score in scores]
            self._told += deltas
            told = b",".join(deltas)
        tell(
            "response.output_text.delta",
            b'%b,"delta":%b,"logprobs":[%b]' % (self._at, _encode(text), told),
        )

    def close(self, status: str, tell: Tell) -> bytes:
        text = "".join(self._texts)
        json, told = _encode(text), b",".join(self._told)
        tell("response.output_text.done", b'%b,"text":%b,"logprobs":[%b]' % (self._at, json, told))
        part = OutputText(text, msgspec.Raw(b"[" + b",".join(self._scores) + b"]"))
        tell("response.content_part.done", self._at + b',"part":' + _encode(part))
        return self._done(self._item((part,), status), tell)

    def _item(self, content: tuple[OutputText, ...], status: str) -> responses.MessageItem:
        return responses.MessageItem(self.id, "assistant", content, status)


class ReasoningItem(Item):
    """The model's reasoning before its answer."""

    prefix = "rs"

    def __init__(self, stem: str, index: int) -> None:
        super().__init__(stem, index)
        self._at += b',"content_index":0'

    def open(self, tell: Tell) -> None:
        self._added(responses.ReasoningItem(self.id, (), "in_progress"), tell)
        tell("response.content_part.added", self._at + b',"part":' + _encode(ReasoningText("")))

    def add(self, text: str, tell: Tell, scores: Sequence[msgspec.Raw] = ()) -> None:
        self._texts.append(text)
        tell("response.reasoning_text.delta", self._at + b',"delta":' + _encode(text))

    def close(self, status: str, tell: Tell) -> bytes:
        part = ReasoningText("".join(self._texts))
        tell("response.reasoning_text.done", self._at + b',"text":' + _encode(part.text))
        tell("response.content_part.done", self._at + b',"part":' + _encode(part))
        return self._done(responses.ReasoningItem(self.id, (part,), status), tell)


class CallItem(Item):
    """The call of a function. `number`: among the chat's tool calls."""

    prefix = "fc"

    def __init__(self, stem: str, index: int, number: int, call_id: str | None, name: str) -> None:
        super().__init__(stem, index)
        self.number = number
        self.call_id = call_id or f"call_{stem}_{index}"
        self._name = name

    def open(self, tell: Tell) -> None:
        self._added(self._item("", "in_progress"), tell)

    def add(self, text: str, tell: Tell, scores: Sequence[msgspec.Raw] = ()) -> None:
        self._texts.append(text)
        tell("response.function_call_arguments.delta", self._at + b',"delta":' + _encode(text))

    def close(self, status: str, tell: Tell) -> bytes:
        arguments = "".join(self._texts)
        tell(
            "response.function_call_arguments.done",
            self._at + b',"arguments":' + _encode(arguments),
        )
        return self._done(self._item(arguments, status), tell)

    def _item(self, arguments: str, status: str) -> FunctionCallItem:
        return FunctionCallItem(self.id, self.call_id, self._name, arguments, status)
