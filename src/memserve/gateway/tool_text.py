"""Conversations with tools, in plain text, for chat templates that know no tools.

The format is that of Nous Research's Hermes models, which many others have learnt, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Message = dict[str, Any]

_TOLD = """\
You may call functions. Their signatures, as JSON schemas:
<tools>
{}
</tools>
To call one, write its name and arguments as a JSON object between tags, once for each call:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


def in_text(messages: Iterable[Message], tools: Sequence[object] | None) -> list[Message]:
    """Return a conversation without tools, tool calls and tool messages, which tells of them in
    its texts. Roles alternate where they did, tool messages counting as a user's."""
    said = _merged(map(_plain, messages))
    if tools:
        told = _TOLD.format("\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        first = said[0] if said else None
        if first is not None and first["role"] == "system":
            said[0] = {**first, "content": f"{first['content']}\n\n{told}"}
        elif first is not None and first["role"] == "user":  # some templates know no system role
            said[0] = {**first, "content": f"{told}\n\n{first['content']}"}
        else:
            said.insert(0, {"role": "system", "content": told})
    return said


def _plain(message: Message) -> Message:
    if message["role"] == "tool":
        content = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": content}
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [message["content"]] if message["content"] else []
    for call in calls:
        called = json.dumps(
            {"name": call["function"]["name"], "arguments": call["function"]["arguments"]},
            ensure_ascii=False,
        )
        texts.append(f"<tool_call>\n{called}\n</tool_call>")
    plain = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**plain, "content": "\n".join(texts)}


def _merged(messages: Iterator[Message]) -> list[Message]:
    """Return the messages, consecutive ones of users as one."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last is not None and message["role"] == last["role"] == "user":
            merged[-1] = {**last, "content": f"{last['content']}\n{message['content']}"}
        else:
            merged.append(message)
    return merged
