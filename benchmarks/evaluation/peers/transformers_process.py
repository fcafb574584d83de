"""Transformers' `generate` behind OpenAI's API, as one would put it there for a trial:
`python -m evaluation.peers.transformers_process MODEL DTYPE THREADS CORES PORT`.

One request at a time, each with a cache of its own; the others wait.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from aiohttp import web
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from evaluation.peers.process import end_with_parent
from memserve.engine.team import use_one_thread
from memserve.models.tokenizer import Tokenizer

_Body = TypeVar("_Body", bound=msgspec.Struct)


class _Message(msgspec.Struct):
    role: str
    content: str


class _Chat(msgspec.Struct):
    messages: list[_Message]
    max_tokens: int


class _Completion(msgspec.Struct):
    prompt: str | list[int]
    max_tokens: int


class _Choice(msgspec.Struct):
    index: int
    text: str
    token_ids: list[int]
    delta: dict[str, str]


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(msgspec.Struct, omit_defaults=True):
    choices: list[_Choice]
    usage: _Usage | None = None


class _Tokens(BaseStreamer):
    """Hands on each new token; the first that it is given is the prompt."""

    def __init__(self, take: Callable[[int], None]) -> None:
        self._take = take
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self._take(int(value.reshape(-1)[0]))

    def end(self) -> None:
        """All tokens have been handed on."""


class _Server:
    def __init__(self, model: Path, dtype: str, threads: int) -> None:
        self._tokenizer = Tokenizer.load(model)
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=vars(torch)[dtype], local_files_only=True
        )
        self._model.generation_config.eos_token_id = None  # as many tokens as are asked for
        # One at a time, all in one thread: each that computes would have a team of threads.
        self._turn = ThreadPoolExecutor(1, "generate", torch.set_num_threads, (threads,))

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "peer", "object": "model"}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, _Chat)
        messages = [{"role": one.role, "content": one.content} for one in body.messages]
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return await self._stream(request, self._ids(text, special=False), body.max_tokens)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, _Completion)
        given = body.prompt
        ids = self._ids(given, special=True) if isinstance(given, str) else given
        return await self._stream(request, ids, body.max_tokens)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=special)

    async def _stream(
        self, request: web.Request, prompt: list[int], count: int
    ) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        loop, tokens = asyncio.get_running_loop(), asyncio.Queue[int]()

        def take(token: int) -> None:
            loop.call_soon_threadsafe(tokens.put_nowait, token)

        generating = loop.run_in_executor(self._turn, self._generate, prompt, count, take)
        made: list[int] = []
        while len(made) < count:
            made.append(await tokens.get())
            # The text is only whole at the end: a token may be a part of a character.
            text = self._tokenizer.decode(made) if len(made) == count else ""
            await answer.write(_event(_Chunk([_Choice(0, text, made[-1:], {"content": text})])))
        await generating
        await answer.write(_event(_Chunk([], _Usage(len(prompt), len(made)))) + b"data: [DONE]\n\n")
        return answer

    def _generate(self, prompt: list[int], count: int, take: Callable[[int], None]) -> None:
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            self._model.generate(  # type: ignore[misc]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                streamer=_Tokens(take),
            )


async def _body(request: web.Request, kind: type[_Body]) -> _Body:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.DecodeError as error:
        raise web.HTTPBadRequest(text=str(error)) from error


def _event(chunk: _Chunk) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def main() -> None:
    model, dtype, threads, cores, port = sys.argv[1:]
    os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    use_one_thread()
    end_with_parent()
    server = _Server(Path(model), dtype, int(threads))
    app = web.Application(client_max_size=1 << 24)
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/v1/chat/completions", server.chat)
    app.router.add_post("/v1/completions", server.completion)
    web.run_app(app, host="127.0.0.1", port=int(port), print=None)


if __name__ == "__main__":
    main()
