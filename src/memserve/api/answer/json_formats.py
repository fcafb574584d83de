"""Parsers of tool calls that are written as JSON objects."""

from __future__ import annotations

import re
from collections.abc import Mapping

from memserve.api.answer.delta import Collector
from memserve.api.answer.format import Function
from memserve.api.answer.json_call import JsonValue
from memserve.api.answer.staged import Stage, StagedParser, skip_blank
from memserve.api.limits import MAX_FUNCTION_NAME


class HermesParser(StagedParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, anywhere and repeatedly."""

    markers = ("<tool_call>",)
    closing = "</tool_call>"

    def _marked(self, marker: str) -> Stage:
        return self._begin_json

    def _after(self, text: str, at: int) -> int:
        begin = skip_blank(text, at)
        if text.startswith(self.closing, begin):
            self._stage = self._content
            return begin + len(self.closing)
        if self.closing.startswith(text[begin:]):  # what there is of it
            return begin
        self._stage = self._content
        return begin

    def _unread(self, rest: str) -> bool:
        return self._stage == self._after


class LlamaParser(StagedParser):
    """`{"name": ..., "parameters": {...}}` as the whole answer, more of them behind `;`, or
    anywhere behind `<|python_tag|>`. Source: Meta's prompt format of Llama 3.1 and 3.2."""

    markers = ("<|python_tag|>",)

    def __init__(self, functions: Mapping[str, Function], out: Collector) -> None:
        super().__init__(functions, out)
        self._stage = self._start

    def _marked(self, marker: str) -> Stage:
        return self._begin_json

    def _start(self, text: str, at: int) -> int:
        return self._open(text, at, "{", self._begin_json)

    def _after(self, text: str, at: int) -> int:
        begin = self._skip(text, at)
        if begin == len(text):
            return begin
        if text[begin] == "{":
            self._stage = self._begin_json
        elif text[begin] == ";":
            self._raw.append(";")
            self._stage = self._next
            return begin + 1
        else:
            self._fail()
        return begin

    def _next(self, text: str, at: int) -> int:
        begin = self._skip(text, at)
        if begin == len(text):
            return begin
        if text[begin] == "{":
            self._stage = self._begin_json
        else:
            self._fail()
        return begin

    def _release(self) -> None:
        if self._stage == self._after:  # white space, which is framing
            self._raw = []
        super()._release()


class JsonListParser(StagedParser):
    """`[{"name": ..., "parameters": {...}}, ...]` as the whole answer: the form that a grammar
    gives it when a call is required. Behind it, content."""

    def __init__(self, functions: Mapping[str, Function], out: Collector) -> None:
        super().__init__(functions, out)
        self._stage = self._list

    def _list(self, text: str, at: int) -> int:
        begin = self._skip(text, at)
        if begin == len(text):
            return begin
        if text[begin] == "[":
            self._raw.append("[")
            self._stage = self._item
            return begin + 1
        if text[begin] == "{":
            self._stage = self._begin_json
        else:
            self._no_list()
        return begin

    def _no_list(self) -> None:
        self._fail()

    def _item(self, text: str, at: int) -> int:
        begin = self._skip(text, at)
        if begin == len(text):
            return begin
        if text[begin] == "{":
            self._stage = self._begin_json
        else:
            self._fail()
        return begin

    def _after(self, text: str, at: int) -> int:
        begin = skip_blank(text, at)
        if begin == len(text):
            return begin
        if text[begin] == ",":
            self._raw.append(",")
            self._stage = self._item
            return begin + 1
        self._stage = self._content
        return begin + 1 if text[begin] == "]" else begin


class MistralParser(JsonListParser):
    """`[TOOL_CALLS]` and a JSON array of calls, or (from version 11 of its tokenizers on) for each
    call `[TOOL_CALLS]name[ARGS]{...}`, also with `[CALL_ID]...` and without `[ARGS]`."""

    markers = ("[TOOL_CALLS]",)
    _inner = ("[ARGS]", "[CALL_ID]")
    _name_end = re.compile(r"[\[{\s]")

    def __init__(self, functions: Mapping[str, Function], out: Collector) -> None:
        super().__init__(functions, out)
        self._stage = self._content
        self._name: list[str] = []
        self._value = JsonValue()

    def _marked(self, marker: str) -> Stage:
        self._name = []
        return self._list

    def _no_list(self) -> None:
        self._stage = self._read_name

    def _read_name(self, text: str, at: int) -> int:
        found = self._name_end.search(text, at)
        end = len(text) if found is None else found.start()
        self._name.append(text[at:end])
        self._raw.append(text[at:end])
        if sum(map(len, self._name)) > MAX_FUNCTION_NAME:
            self._fail()
        elif found is not None:
            if "".join(self._name) in self._functions:
                self._stage = self._before_arguments
            else:
                self._fail()
        return end

    def _before_arguments(self, text: str, at: int) -> int:
        begin = self._skip(text, at)
        if begin == len(text):
            return begin
        if text[begin] == "{":
            self._begin("".join(self._name))
            self._value.begin("{")
            self._stage = self._arguments
            return begin
        for marker in self._inner:
            if text.startswith(marker, begin):
                self._raw.append(marker)
                if marker == "[CALL_ID]":
                    self._stage = self._call_id
                return begin + len(marker)
            if marker.startswith(text[begin:]):
                return begin
        self._fail()
        return begin

    def _call_id(self, text: str, at: int) -> int:
        found = self._name_end.search(text, at)
        end = len(text) if found is None else found.start()
        self._raw.append(text[at:end])
        if found is not None:
            self._stage = self._before_arguments
        return end

    def _arguments(self, text: str, at: int) -> int:
        end = self._value.push(text, at)
        self._out.arguments(text[at:end])
        if self._value.ended:
            self._out.end()
            self._stage = self._content  # the next call has a marker of its own
        return end


class GraniteParser(JsonListParser):
    """`<|tool_call|>` and a JSON array of calls; `<tool_call>` in Granite 3.0."""

    markers = ("<|tool_call|>", "<tool_call>")

    def __init__(self, functions: Mapping[str, Function], out: Collector) -> None:
        super().__init__(functions, out)
        self._stage = self._content

    def _marked(self, marker: str) -> Stage:
        return self._list


class JsonArgumentsParser(StagedParser):
    """The arguments of the only function, as the whole answer: the form that a grammar gives it
    when one function is named. Behind them, content."""

    def __init__(self, functions: Mapping[str, Function], out: Collector) -> None:
        super().__init__(functions, out)
        self._stage = self._start
        self._value = JsonValue()

    def _start(self, text: str, at: int) -> int:
        begin = self._skip(text, at)
        if begin < len(text):
            if text[begin] == "{":
                self._begin(next(iter(self._functions)))
                self._value.begin("{")
                self._stage = self._arguments
            else:
                self._fail()
        return begin

    def _arguments(self, text: str, at: int) -> int:
        end = self._value.push(text, at)
        self._out.arguments(text[at:end])
        if self._value.ended:
            self._end()
        return end
