"""Answers in OpenAI's shape: whole JSON bodies, and the chunks of a stream.

An instance's stream names the tokens of its events, so that another instance can continue it.
Each output of the engine is one event, which begins with an SSE comment line (clients ignore it)
and ends with an empty line:

    :<choice> <token id>[,<token id>...]\n
    data: {...}\n                           (missing while the text is held back)
    \n

The comment names all token ids that the event adds, whether they have text or not, and a chat's
role comes in the first event of its choice. So the token ids of the events that a client has
received whole are its state of a choice: `GenerateCall.resumed`. Events without a comment (usage,
errors, [DONE]) add no tokens. Usage follows all tokens: a client that has it lacks only [DONE].
No line of JSON begins with a colon.

Chunks are on the hot path of every token: the constant parts are encoded once per stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType

from memserve.api.answer.delta import Delta
from memserve.api.answer.message import ChatMessage, delta_of, message_of
from memserve.api.generate import CallKind, FinishReason, GenerateCall
from memserve.api.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    TokenScore,
    by_id,
    chat_logprobs,
    completion_logprobs,
)
from memserve.api.request_stats import RequestStats

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Piece:
    """A choice's next part (in a stream), or the whole choice (in a body)."""

    choice: int
    text: str
    token_ids: Sequence[int]
    scores: Sequence[TokenScore] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string that the client had named
    delta: Delta | None = None  # what is in the text, if the call says what may be in it
    prompt_scores: Sequence[TokenScore] = ()  # for `prompt_logprobs`


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class CompletionUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    memserve: RequestStats | UnsetType = UNSET  # our extension of OpenAI's usage


def usage(
    prompt_tokens: int,
    completion_tokens: int,
    cached_tokens: int,
    stats: RequestStats | None = None,
) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        PromptTokensDetails(cached_tokens),
        stats or UNSET,
    )


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: Sequence[int] | UnsetType = UNSET


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: Sequence[int] | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The body that answers `POST /v1/chat/completions`."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    prompt_token_ids: Sequence[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The body that answers `POST /v1/completions`."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage


def body(call: GenerateCall, choices: Sequence[Piece], used: CompletionUsage) -> bytes:
    """Return the JSON body of an answer that is not streamed."""
    if call.kind is CallKind.CHAT:
        return _encode(
            ChatCompletion(
                id=call.id,
                created=call.created,
                model=call.model,
                choices=[_chat_choice(call, piece) for piece in choices],
                usage=used,
                prompt_token_ids=_prompt(call, 0) if call.return_token_ids else UNSET,
                prompt_logprobs=_prompt_logprobs(call, choices[0]),
            )
        )
    return _encode(
        Completion(
            id=call.id,
            created=call.created,
            model=call.model,
            choices=[_completion_choice(call, piece) for piece in choices],
            usage=used,
        )
    )


def _chat_choice(call: GenerateCall, piece: Piece) -> ChatChoice:
    return ChatChoice(
        index=piece.choice,
        message=ChatMessage("assistant", piece.text)
        if piece.delta is None
        else message_of(call, piece.choice, piece.delta),
        logprobs=chat_logprobs(piece.scores) if call.sampling.logprobs is not None else None,
        finish_reason=piece.finish_reason,
        stop_reason=piece.stop_reason,
        token_ids=piece.token_ids if call.return_token_ids else UNSET,
    )


def _completion_choice(call: GenerateCall, piece: Piece) -> CompletionChoice:
    return CompletionChoice(
        index=piece.choice,
        text=piece.text,
        logprobs=completion_logprobs(piece.scores) if call.sampling.logprobs is not None else None,
        finish_reason=piece.finish_reason,
        stop_reason=piece.stop_reason,
        token_ids=_own_ids(call, piece) if call.return_token_ids else UNSET,
        prompt_token_ids=_prompt(call, piece.choice) if call.return_token_ids else UNSET,
        prompt_logprobs=_prompt_logprobs(call, piece),
    )


def _own_ids(call: GenerateCall, piece: Piece) -> Sequence[int]:
    """Return the token ids that the client is told."""
    return () if call.prompt_only else piece.token_ids


def _prompt_logprobs(call: GenerateCall, piece: Piece) -> PromptLogprobs | UnsetType:
    if call.prompt_logprobs is None:
        return UNSET
    return [by_id(score, call.prompt_logprobs) for score in piece.prompt_scores]


def _prompt(call: GenerateCall, choice: int) -> list[int]:
    """Return the token ids of a choice's prompt."""
    ids: list[int] = call.prompts[choice // call.n].tolist()
    return ids


class StreamFormat:
    """Formats one call's server-sent events."""

    def __init__(self, call: GenerateCall) -> None:
        chat = call.kind is CallKind.CHAT
        name = b"chat.completion.chunk" if chat else b"text_completion"
        self._head = b'data: {"id":%b,"object":"%b","created":%d,"model":%b' % (
            _encode(call.id),
            name,
            call.created,
            _encode(call.model),
        )
        # As in OpenAI's API: with `include_usage`, every chunk but the last has a null usage.
        plain_usage = call.include_usage and not call.continuous_usage
        choices = b',"usage":null' if plain_usage else b""
        self._choice_head = self._head + choices + b',"choices":[{"index":'
        self._text_head = b',"delta":{"content":' if chat else b',"text":'
        self._no_text = b',"delta":{' if chat else b',"text":""'
        self._role_head = b',"delta":{"role":"assistant","content":'
        self._text_end = b'},"logprobs":' if chat else b',"logprobs":'
        self._plain_end = self._text_end + b'null,"finish_reason":null}]}\n\n'
        self._prefixes = [
            b"%b%d%b" % (self._choice_head, choice, self._text_head)
            for choice in range(len(call.prompts) * call.n)
        ]
        self._logprobs = (
            None
            if call.sampling.logprobs is None
            else chat_logprobs
            if chat
            else completion_logprobs
        )
        self._chat = chat
        self._call = call
        self._token_ids = call.return_token_ids
        # By choice, with `continuous_usage`: the tokens so far.
        self._counts = [0] * (len(self._prefixes) if call.continuous_usage else 0)
        for choice, tokens in enumerate(call.resumed if self._counts else ()):
            self._counts[choice] = len(tokens)
        self._plain = self._logprobs is None and not self._token_ids and not self._counts

    def event(self, piece: Piece, first: bool = False) -> bytes:
        """Return the event of one choice's next tokens, with their text if any. `first`: the
        choice's first event, with a chat's role and, if asked for, the prompt's token ids."""
        role = first and self._chat
        ids = piece.token_ids
        named = b"%d" % ids[0] if len(ids) == 1 else ",".join(map(str, ids)).encode()
        comment = b":%d %b\n" % (piece.choice, named)
        if self._counts:
            self._counts[piece.choice] += len(_own_ids(self._call, piece))
        if role or piece.finish_reason is not None or not self._plain or piece.delta is not None:
            # A piece whose text is held back still has ids and scores.
            said = piece.text if piece.delta is None else not piece.delta.empty
            wanted = role or said or piece.finish_reason is not None
            if wanted or self._token_ids or piece.scores:
                return comment + self._full_chunk(piece, first)
        elif piece.text:
            chunk = self._prefixes[piece.choice] + _encode(piece.text)
            return comment + chunk + self._plain_end
        return comment + b"\n"

    def usage(self, used: CompletionUsage) -> bytes:
        """Return the usage chunk, for `include_usage`."""
        return self._head + b',"choices":[],"usage":' + _encode(used) + b"}\n\n"

    def _full_chunk(self, piece: Piece, first: bool) -> bytes:
        if piece.delta is not None:
            head = b'%b%d,"delta":' % (self._choice_head, piece.choice)
            head += _encode(delta_of(self._call, piece.choice, piece.delta, first))[:-1]
        elif first and self._chat:
            head = b"%b%d%b" % (self._choice_head, piece.choice, self._role_head)
            head += _encode(piece.text)
        elif piece.text:
            head = self._prefixes[piece.choice] + _encode(piece.text)
        else:
            head = b"%b%d%b" % (self._choice_head, piece.choice, self._no_text)
        parts = [
            head,
            self._text_end,
            _encode(self._logprobs(piece.scores)) if self._logprobs and piece.scores else b"null",
            b',"finish_reason":',
            _encode(piece.finish_reason),
        ]
        if piece.finish_reason is not None:
            parts += (b',"stop_reason":', _encode(piece.stop_reason))
        if self._token_ids:
            parts += (b',"token_ids":', _encode(_own_ids(self._call, piece)))
        parts.append(b"}]}\n\n")
        if self._token_ids and first:
            # As in vLLM: in the choice for completions, at the top level for chats.
            prompt = b',"prompt_token_ids":' + _encode(_prompt(self._call, piece.choice))
            parts[-1] = b"}]" + prompt + b"}\n\n" if self._chat else prompt + b"}]}\n\n"
        if self._counts:
            parts[-1] = parts[-1].removesuffix(b"}\n\n") + self._usage_so_far(piece.choice)
        return b"".join(parts)

    def _usage_so_far(self, choice: int) -> bytes:
        """Return a chunk's end, with the usage of one choice, as vLLM has it."""
        prompt = len(self._call.prompts[choice // self._call.n])
        count = self._counts[choice]
        used = b',"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}\n\n'
        return used % (prompt, count, prompt + count)
