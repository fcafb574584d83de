"""A server that says what a vLLM would, with no model: `python -m tests.fake_vllm --uds PATH`.

Its answer to a prompt of token ids is a function of them, so that it goes on where another one
stopped. Forms are those that vLLM 0.32 was seen to send. `MEMSERVE_FAKE_VLLM` has settings as JSON:
`die_after` so many tokens of one answer (once, if `once` names a file that is not there yet),
`fail`: do not start.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import zmq
from aiohttp import web
from msgspec import msgpack

from memserve.api.forward import ForwardPath
from memserve.api.kv_events import BlockStored, EventBatch

SETTINGS_VARIABLE = "MEMSERVE_FAKE_VLLM"
BLOCK, BLOCKS, LENGTH = 16, 64, 256
END, MODULUS = 1, 200
STUBBORN = (
    "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
)
METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{{engine="0",model_name="m"}} {running}
vllm:num_requests_waiting{{engine="0",model_name="m"}} {waiting}
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} 0.25
vllm:iteration_tokens_total_count{{engine="0",model_name="m"}} {steps}
vllm:cache_config_info{{block_size="{block}",engine="0",num_gpu_blocks="{blocks}"}} 1.0
"""


def answer(tokens: list[int]) -> int:
    """The token that follows."""
    return 2 + (sum(tokens[-3:]) + len(tokens)) % MODULUS


def expected(prompt: list[int], tokens: int) -> list[int]:
    """The next `tokens` tokens of a prompt."""
    made = list(prompt)
    for _ in range(tokens):
        made.append(answer(made))
    return made[len(prompt) :]


class FakeVllm:
    """Counts what runs, and caches prompts by their first block."""

    def __init__(
        self, settings: dict[str, Any], events: str | None, key: str | None = None
    ) -> None:
        self._key = key
        self.running = self.steps = self.cancelled = 0
        self.waiting = 0  # what it says
        self.lost = False  # its engine: it answers nothing of that any more
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []  # of what was passed on
        self.parents: list[str | None] = []  # `traceparent` of each request that has a body
        self._settings = settings
        self._cached: set[bytes] = set()
        self._sequence = 0
        self._events: zmq.Socket[bytes] | None = None
        if events is not None:
            self._events = zmq.Context[zmq.Socket[bytes]]().socket(zmq.PUB)
            self._events.bind(events)
            self.endpoint = self._events.getsockopt_string(zmq.LAST_ENDPOINT)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/version", self._version)
        app.router.add_post("/v1/completions", self._complete)
        for path in ForwardPath:
            if path is not ForwardPath.COMPLETIONS:
                app.router.add_post(path.value, self._forwarded)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        wanted = request.path.startswith("/v1/") and self._key is not None  # as vLLM does
        if wanted and request.headers.get("authorization") != f"Bearer {self._key}":
            raise web.HTTPUnauthorized
        answered: web.StreamResponse = await handler(request)
        return answered

    async def _health(self, request: web.Request) -> web.Response:
        if self.lost:
            raise web.HTTPServiceUnavailable
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "max_model_len": LENGTH}]})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def _metrics(self, request: web.Request) -> web.Response:
        if self.lost:
            raise web.HTTPInternalServerError
        figures = {"running": float(self.running), "steps": float(self.steps)}
        figures["waiting"] = float(self.waiting)
        return web.Response(text=METRICS.format(**figures, block=BLOCK, blocks=BLOCKS))

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request)
        tokens = list(body["prompt"])
        if body.get("cache_salt") == "refuse":
            error = {"message": "not this one", "type": "BadRequestError", "code": 400}
            return web.json_response({"error": error}, status=400)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        self.running += 1
        try:
            await self._stream(body, tokens, response)
        except (ConnectionResetError, asyncio.CancelledError):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return response

    async def _forwarded(self, request: web.Request) -> web.StreamResponse:
        """What an instance passes on: said again, whole or as a stream of `max_tokens` words."""
        body = await self._read(request)
        self.paths.append(request.path)
        if body.get("temperature") == -1:
            error = {"message": "not this one", "type": "BadRequestError", "code": 400}
            return web.json_response({"error": error}, status=400)
        self.running += 1
        try:
            if not body.get("stream"):
                await asyncio.sleep(self._settings.get("answer_seconds", 0))
                return web.json_response({"path": request.path, "body": body})
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            if request.path == ForwardPath.RESPONSES:
                return await self._respond(response)
            await asyncio.sleep(self._settings.get("first_token_seconds", 0))
            for number in range(body.get("max_tokens", 4)):
                delta = {"content": f"<{number}>"}
                await _send(response, {"choices": [{"index": 0, "delta": delta}]})
                await asyncio.sleep(self._settings.get("step_seconds", 0.001))
                if number == self._settings.get("break_after"):
                    assert request.transport is not None
                    request.transport.abort()
            await response.write(b"data: [DONE]\n\n")
            return response
        except (ConnectionResetError, asyncio.CancelledError):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _respond(self, response: web.StreamResponse) -> web.StreamResponse:
        """A stream of `/v1/responses`: its first two events come before the first token."""
        names = ["created", "in_progress", "output_item.added", "output_text.delta", "completed"]
        for number, name in enumerate(names):
            if number == 2:
                await asyncio.sleep(self._settings.get("first_token_seconds", 0))
            event = json.dumps({"type": f"response.{name}"}).encode()
            await response.write(b"event: response.%b\ndata: %b\n\n" % (name.encode(), event))
        return response

    async def _read(self, request: web.Request) -> dict[str, Any]:
        """A body, with the salts that vLLM takes."""
        body: dict[str, Any] = await request.json()
        self.bodies.append(body)
        self.parents.append(request.headers.get("traceparent"))
        salt = body.get("cache_salt")
        if salt is not None and (not 0 < len(salt) <= 128 or set(salt) & set("@/\\\0")):
            error = {"message": "Parameter 'cache_salt' must ...", "type": "BadRequestError"}
            text = json.dumps({"error": error | {"code": 400}})
            raise web.HTTPBadRequest(text=text, content_type="application/json")
        return body

    async def _stream(
        self, body: dict[str, Any], tokens: list[int], response: web.StreamResponse
    ) -> None:
        cached, made, finish = self._lookup(tokens, body.get("cache_salt")), 0, None
        prompt = len(tokens)
        await asyncio.sleep(self._settings.get("prompt_token_seconds", 0) * (prompt - cached))
        while finish is None:
            token = answer(tokens)
            tokens.append(token)
            made += 1
            self.steps += 1
            if self.lost:
                error = {"message": "EngineCore encountered an issue.", "code": 500}
                await response.write(b"data: " + json.dumps({"error": error}).encode() + b"\n\n")
                return
            if token == END or token in body["stop_token_ids"]:
                finish = "stop" if made > body["min_tokens"] else None
            if finish is None and made == body["max_tokens"]:
                finish = "length"
            choice: dict[str, Any] = {"index": 0, "text": "x", "token_ids": [token]}
            choice |= {"finish_reason": finish, "stop_reason": None, "logprobs": None}
            if "logprobs" in body:
                name = f"token_id:{token}"
                top = {name: -0.5} | {
                    f"token_id:{token + n}": -1.0 * n for n in range(1, body["logprobs"])
                }
                choice["logprobs"] = {"tokens": [name], "token_logprobs": [-0.5]}
                choice["logprobs"] |= {"top_logprobs": [top]}
            await _send(response, {"choices": [choice]})
            if made == self._settings.get("die_after") and self._may_die():
                os._exit(9)
            await asyncio.sleep(self._settings.get("step_seconds", 0.001))
        usage: dict[str, Any] = {"prompt_tokens": prompt}
        if not self._settings.get("secretive"):  # --enable-prompt-tokens-details
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        await _send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")

    def _may_die(self) -> bool:
        once = self._settings.get("once")
        if once is None:
            return True
        try:
            Path(once).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _lookup(self, tokens: list[int], salt: str | None) -> int:
        """How many tokens of the prompt were here; its whole blocks are from now on."""
        ends = range(BLOCK, len(tokens) + 1, BLOCK)
        names = [_name(tokens[:end], salt) for end in ends]
        held = next((at for at, name in enumerate(names) if name not in self._cached), len(names))
        self._cached.update(names)
        if names[held:]:
            self._publish(tokens[held * BLOCK : len(names) * BLOCK], names, held, salt)
        return min(held * BLOCK, (len(tokens) - 1) // BLOCK * BLOCK)

    def _publish(self, tokens: list[int], names: list[bytes], held: int, salt: str | None) -> None:
        if self._events is None:
            return
        stored = BlockStored(
            block_hashes=[*names[held:]],
            parent_block_hash=names[held - 1] if held else None,
            token_ids=tokens,
            block_size=BLOCK,
            lora_id=None,
            medium="GPU",
            lora_name=None,
            extra_keys=[(salt,) if salt else None] * len(names[held:]),
        )
        payload = msgpack.encode(EventBatch(0.0, [stored], 0))
        self._events.send_multipart((b"", self._sequence.to_bytes(8, "big"), payload))
        self._sequence += 1


def _name(tokens: list[int], salt: str | None) -> bytes:
    return hashlib.sha256(repr((tokens, salt)).encode()).digest()


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: %b\n\n" % json.dumps(event).encode())


async def serve(fake: FakeVllm, path: str) -> web.AppRunner:
    """Listening; the caller cleans it up."""
    runner = web.AppRunner(fake.app(), shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, path).start()
    return runner


class Server:
    """A fake one, on a thread of its own."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path = path
        self.fake = FakeVllm({"step_seconds": 0.002, **settings}, None)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner = self._call(serve(self.fake, str(path)))

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def end(self) -> None:
        self._call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _main(fake: FakeVllm, path: str) -> None:
    await serve(fake, path)
    await asyncio.Event().wait()


async def _main_tcp(fake: FakeVllm) -> None:
    """Prints its URL, and where its events are."""
    runner = web.AppRunner(fake.app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    print(f"http://{host}:{port} {fake.endpoint}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model", "--uds", "--served-model-name", "--dtype", "--kv-events-config"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    parser.add_argument("--api-key")
    parser.add_argument("--enable-prompt-tokens-details", action="store_true")
    parser.add_argument("--disable-uvicorn-access-log", action="store_true")
    given = parser.parse_args()
    settings = json.loads(os.environ.get(SETTINGS_VARIABLE, "{}"))
    if settings.get("fail"):
        sys.exit("this vLLM does not start")
    if given.port is not None:
        asyncio.run(_main_tcp(FakeVllm(settings, "tcp://127.0.0.1:*", given.api_key)))
        return
    # As an engine may be: a process of its own, which no SIGTERM ends.
    engine = subprocess.Popen((sys.executable, "-c", STUBBORN), stdout=subprocess.PIPE)
    if told := settings.get("told"):
        secret = os.environ.get("MEMSERVE_SECRET")
        said = {"args": sys.argv[1:], "pid": os.getpid(), "engine": engine.pid, "secret": secret}
        Path(told).write_text(json.dumps(said))
    events = json.loads(given.kv_events_config)["endpoint"]
    asyncio.run(_main(FakeVllm(settings, events), given.uds))


if __name__ == "__main__":
    main()
