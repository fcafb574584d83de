"""A client's request for a vLLM server: checked, filtered and encoded again.

The server gets only fields that were decoded here, encoded again: of an ambiguous body, gateway
and server so read the same. Prompts and token ids are checked and copied as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from memserve.api.errors import invalid
from memserve.api.forward import (
    FIELDS,
    GIVEN_FIELDS,
    IGNORED_FIELDS,
    Forward,
    ForwardPath,
)
from memserve.api.json_body import decode_json, not_understood
from memserve.api.limits import (
    MAX_INT32,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
)
from memserve.api.neutral import is_neutral, unsupported
from memserve.api.openai import SharedFields, check_best_of
from memserve.gateway.body_scan import check_body, plain_token_ids
from memserve.gateway.conversation import TEMPLATE_STEERING
from memserve.gateway.prompts import Prompt, read_prompts

_Positive = Annotated[int, Meta(ge=1, le=MAX_INT32)]
_Scores = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
_StopString = Annotated[str, Meta(max_length=MAX_STOP_CHARACTERS)]

# Suffix of the fields, in message parts, with a URL from which vLLM would fetch the content.
_MEDIA_SUFFIX = "_url"
_DATA = "data:"
# Fields without message content, whose URLs vLLM does not fetch. A chat's `documents` are texts
# for the template (see `read_request`); those of other paths have parts, as messages do.
_NO_CONTENT = frozenset(
    {
        "chat_template_kwargs",
        "metadata",
        "output_config",
        "response_format",
        "structured_outputs",
        "text",
        "tools",
    }
)


class Asked(SharedFields, frozen=True, kw_only=True):
    """Fields that the gateway reads. The server checks all others."""

    max_completion_tokens: _Positive | None = None
    max_output_tokens: _Positive | None = None
    logprobs: bool | _Scores | None = None
    top_logprobs: _Scores | None = None
    prompt_logprobs: _Scores | None = None
    messages: Annotated[tuple[Any, ...], Meta(max_length=MAX_MESSAGES)] | None = None
    stop_sequences: Annotated[tuple[_StopString, ...], Meta(max_length=MAX_STOP_STRINGS)] | None = (
        None
    )

    @property
    def output_tokens(self) -> int | None:
        """The most output tokens of each sample; None: not given."""
        return self.max_completion_tokens or self.max_tokens or self.max_output_tokens


@dataclass(frozen=True, slots=True)
class ForwardRequest:
    """A request that may be forwarded. `fields`: decoded, as the server gets them."""

    path: ForwardPath
    asked: Asked
    prompts: tuple[Prompt, ...]  # of a completion
    fields: dict[str, Any]

    def forward(self, renders: bool) -> Forward:
        """Return the request as a part of a call. `renders`: see `Forward`."""
        return Forward(self.path, _encode(self.fields), renders)


_encode = msgspec.json.Encoder().encode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read_request(path: ForwardPath, body: bytes) -> ForwardRequest:
    """Decode and check a body. Raises ApiError (400) that names the field at fault."""
    check_body(body)
    members = decode_json(_members.decode, body)
    prompts, unread = _read_tokens(path, members)
    fields = {
        name: decode_json(msgspec.json.decode, value, name[:64])
        for name, value in members.items()
        if name not in unread
    }
    kept = {name: value for name, value in fields.items() if _passes(path, name, value)}
    try:
        asked = msgspec.convert(fields, Asked, str_keys=True)
    except msgspec.ValidationError as error:
        raise not_understood(error) from error
    check_best_of(asked)
    _check_template(kept)
    _check_tools(kept)
    for name, value in kept.items():
        if name not in _NO_CONTENT and (path, name) != (ForwardPath.CHAT, "documents"):
            _check_media(value, name)
    if path is ForwardPath.RESPONSES:
        _keep_nothing(kept)
    kept |= unread
    return ForwardRequest(path, asked, prompts, kept)


def _read_tokens(
    path: ForwardPath, members: dict[str, msgspec.Raw]
) -> tuple[tuple[Prompt, ...], dict[str, msgspec.Raw]]:
    """Return a completion's prompts, and the fields that may have thousands of tokens as raw JSON:
    they are copied for the server, so that no object is made for each token."""
    if path in (ForwardPath.COMPLETIONS, ForwardPath.TOKENIZE) and "prompt" in members:
        return read_prompts(members["prompt"]), {"prompt": members["prompt"]}
    if path is ForwardPath.DETOKENIZE and "tokens" in members:
        if plain_token_ids(members["tokens"]) is None:
            raise invalid("'tokens' is a list of token ids.", "tokens")
        return (), {"tokens": members["tokens"]}
    return (), {}


def _passes(path: ForwardPath, name: str, value: object) -> bool:
    """Return whether to send a field to the server. Raises ApiError for an unsupported one."""
    if name in FIELDS[path]:
        return name not in GIVEN_FIELDS
    if name in GIVEN_FIELDS or name in IGNORED_FIELDS or is_neutral(name, value):
        return False
    raise unsupported(name[:64])


def _check_template(fields: dict[str, Any]) -> None:
    variables = fields.get("chat_template_kwargs")
    if variables is None:
        return
    if not isinstance(variables, dict):
        raise invalid("'chat_template_kwargs' is an object.", "chat_template_kwargs")
    for name in TEMPLATE_STEERING:
        if name in variables:
            raise unsupported(f"chat_template_kwargs.{name}")


def _check_tools(fields: dict[str, Any]) -> None:
    """Raise ApiError if a tool names a server: only the operator may configure these."""
    tools = fields.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        if isinstance(tool, dict) and not tool.keys().isdisjoint(("server_url", "connector_id")):
            raise unsupported("tools[].server_url")


def _check_media(value: object, field: str) -> None:
    """Raise ApiError for content at a URL: vLLM would fetch it from inside the cluster."""
    if isinstance(value, list):
        for item in value:
            _check_media(item, field)
    elif isinstance(value, dict):
        for name, content in value.items():
            if name.endswith(_MEDIA_SUFFIX) or (name == "source" and isinstance(content, dict)):
                _check_place(content, field)
            elif name == "uuid" and content is not None:
                # vLLM would take cached media under that name, also another tenant's.
                raise unsupported("uuid")
            # vLLM takes a tool call's arguments as text.
            if not (name == "input" and value.get("type") == "tool_use"):
                _check_media(content, field)


def _check_place(content: object, field: str) -> None:
    place = content.get("url") if isinstance(content, dict) else content
    if isinstance(place, str) and not place.startswith(_DATA):
        raise invalid(
            "Images, audio and video are taken as 'data:' URLs only; nothing is fetched.",
            field,
            "unsupported_url",
        )


def _keep_nothing(fields: dict[str, Any]) -> None:
    """Set `store` to false; raise ApiError if it is set: a stored answer is at one server, and
    the next request may go to another."""
    if fields.get("store"):
        raise invalid(
            "'store' is not supported: no answer is kept.", "store", "unsupported_parameter"
        )
    fields["store"] = False
