"""Streamed requests over the OpenAI API, with the arrival time of each chunk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from memserve.api.request_stats import RequestStats
from memserve.clock import Clock

# A request fails if the server sends nothing for this time. Longer than any sensible wait for a
# first token, which includes queueing.
SILENCE_TIMEOUT = 300.0
CONNECT_TIMEOUT = 10.0

# One line of a stream; a chunk with token ids and logprobs may be long.
_MAX_LINE_BYTES = 1 << 20


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta = _Delta()
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    memserve: RequestStats | None = None  # from memserve's servers only


class _Error(msgspec.Struct, frozen=True):
    message: str = ""


class _Chunk(msgspec.Struct, frozen=True):
    """The fields used of a chat or completion chunk, or of an error in its place."""

    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: _Error | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer to one request. Times are the client's clock's, in seconds."""

    sent: float
    chunk_times: tuple[float, ...]  # of the chunks with tokens
    end: float
    text: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    figures: RequestStats | None
    error: str | None

    @property
    def first_token(self) -> float | None:
        """Time of the first chunk with tokens; None if there was none."""
        return self.chunk_times[0] if self.chunk_times else None


def api_key_headers() -> dict[str, str]:
    """Return the header with the key in OPENAI_API_KEY; none without that variable."""
    key = os.environ.get("OPENAI_API_KEY")
    return {} if not key else {"Authorization": f"Bearer {key}"}


class OpenAIClient:
    """A connection pool to one server. An async context manager."""

    def __init__(self, url: str, model: str, clock: Clock, cache_salt: str | None = None) -> None:
        """`url`: the server's root, without /v1. `model`: name in the server's API.

        `cache_salt`: vLLM and memserve share no cached KV between different salts.
        """
        self.url = url.rstrip("/")
        self._model = model
        self._clock = clock
        self._salt = {} if cache_salt is None else {"cache_salt": cache_salt}
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> OpenAIClient:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_TIMEOUT, sock_read=SILENCE_TIMEOUT
            ),
            read_bufsize=_MAX_LINE_BYTES,
            headers=api_key_headers(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        output_tokens: int,
        session: str | None = None,
    ) -> Answer:
        """Send a chat request for exactly `output_tokens` tokens. Errors of the server are in the
        answer's `error`, and not raised.

        `session`: id for servers that keep a session's requests on one instance.
        """
        fields = {"messages": list(messages), **self._fields(output_tokens)}
        return await self._post("/v1/chat/completions", fields, session)

    async def complete(
        self, prompt: str | Sequence[int], output_tokens: int, session: str | None = None
    ) -> Answer:
        """Send a completion request, as `chat`, with a text or token ids as the prompt."""
        given = prompt if isinstance(prompt, str) else list(prompt)
        fields = {"prompt": given, **self._fields(output_tokens)}
        return await self._post("/v1/completions", fields, session)

    async def _post(self, path: str, body: dict[str, Any], session: str | None) -> Answer:
        headers = {} if session is None else {"X-Session-Id": session}
        received = _Received(self._clock)
        sent = self._clock.now()
        try:
            async with self._session.post(self.url + path, json=body, headers=headers) as response:
                if response.status == 200:
                    async for line in response.content:
                        received.line(line)
                else:
                    received.refused(response.status, await response.read())
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            # ValueError: a line over the limit, or one that is no JSON.
            received.error = f"{type(error).__name__}: {error}"
        return received.answer(sent)

    def _fields(self, output_tokens: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,  # to see the arrival of tokens without text, too
            **self._salt,
        }


class _Received:
    """The part of an answer received so far."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._times: list[float] = []
        self._texts: list[str] = []
        self._usage = _Usage()
        self._done = False
        self.error: str | None = None

    def line(self, line: bytes) -> None:
        data = line.strip().removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or not data:
            return
        if data == b"[DONE]":
            self._done = True
            return
        chunk = _decode_chunk(data)
        if chunk.error is not None:
            self.error = chunk.error.message or "error without a message"
        if chunk.usage is not None:
            self._usage = chunk.usage
        for choice in chunk.choices:
            text = choice.delta.content or choice.text or ""
            if text or choice.token_ids:
                self._times.append(self._clock.now())
                self._texts.append(text)

    def refused(self, status: int, body: bytes) -> None:
        try:
            error = _decode_chunk(body).error
        except msgspec.DecodeError:
            error = None
        said = error.message if error else body[:200].decode(errors="replace")
        self.error = f"HTTP {status}: {said}"

    def answer(self, sent: float) -> Answer:
        usage = self._usage
        details = usage.prompt_tokens_details or _PromptDetails()
        if self.error is None and not self._done:
            self.error = "the stream ended without [DONE]"
        return Answer(
            sent=sent,
            chunk_times=tuple(self._times),
            end=self._clock.now(),
            text="".join(self._texts),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=details.cached_tokens or 0,
            output_tokens=usage.completion_tokens,
            figures=usage.memserve,
            error=self.error,
        )
