"""What vLLM's prefill/decode split needs before it: each request goes to the server that computes
its prompt, and then to the one that decodes.
`python -m evaluation.peers.split_proxy PREFILL_URL DECODE_URL PORT`.

What of a prompt counts as cached is what the first has not computed: to the second, everything is.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

from evaluation.peers.process import end_with_parent

Body = dict[str, Any]
_MAX_BODY = 1 << 24
_LINE_BYTES = 1 << 20
_CONNECT_SECONDS = 10.0
_KEEP_KV = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def prompt_request(body: Body) -> Body:
    """One token, after which the KV is kept for who fetches it."""
    asked = {**body, "stream": False, "max_tokens": 1, "kv_transfer_params": _KEEP_KV}
    if "max_completion_tokens" in asked:
        asked["max_completion_tokens"] = 1
    for name in ("stream_options", "min_tokens", "return_token_ids"):
        asked.pop(name, None)
    return asked


def decode_request(body: Body, answer: Body) -> Body:
    """The request, and where the KV of its prompt is."""
    return {**body, "kv_transfer_params": answer.get("kv_transfer_params")}


def cached_tokens(answer: Body) -> int:
    """Of the prompt, as the server says that computed the rest."""
    details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def with_cached(event: bytes, cached: int) -> bytes:
    """An event of a stream; if it tells of usage, with so many tokens that were cached."""
    if b'"usage"' not in event or not event.startswith(b"data:"):
        return event
    try:
        chunk = msgspec.json.decode(event.removeprefix(b"data:").strip(), type=Body)
    except msgspec.DecodeError:
        return event
    if not chunk.get("usage"):
        return event
    chunk["usage"]["prompt_tokens_details"] = {"cached_tokens": cached}
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


class SplitProxy:
    """Two servers as one."""

    def __init__(self, prefill: str, decode: str) -> None:
        self._prefill = prefill
        self._decode = decode
        self._client: ClientSession

    async def running(self, _: web.Application) -> AsyncIterator[None]:
        """Its connections, as long as the application runs."""
        timeout = ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
        connections = TCPConnector(limit=0)
        async with ClientSession(
            connector=connections, timeout=timeout, read_bufsize=_LINE_BYTES
        ) as self._client:
            yield

    async def models(self, _: web.Request) -> web.Response:
        async with self._client.get(f"{self._decode}/v1/models") as answer:
            return web.Response(
                body=await answer.read(), status=answer.status, content_type="application/json"
            )

    async def ask(self, request: web.Request) -> web.StreamResponse:
        try:
            body = msgspec.json.decode(await request.read(), type=Body)
        except msgspec.DecodeError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        try:
            async with self._client.post(
                self._prefill + request.path, json=prompt_request(body)
            ) as answer:
                told = await answer.read()
                if answer.status != web.HTTPOk.status_code:
                    return web.Response(body=told, status=answer.status)
            first = msgspec.json.decode(told, type=Body)
            return await self._decoded(request, decode_request(body, first), cached_tokens(first))
        except (ClientError, msgspec.DecodeError) as error:
            raise web.HTTPBadGateway(text=str(error)) from error

    async def _decoded(self, request: web.Request, body: Body, cached: int) -> web.StreamResponse:
        async with self._client.post(self._decode + request.path, json=body) as answer:
            if answer.status != web.HTTPOk.status_code:
                return web.Response(body=await answer.read(), status=answer.status)
            stream = web.StreamResponse(headers={"content-type": answer.content_type})
            await stream.prepare(request)
            event = b""
            async for line in answer.content:
                event += line
                if line == b"\n":
                    await stream.write(with_cached(event, cached))
                    event = b""
            if event:
                await stream.write(event)
            return stream


def application(prefill: str, decode: str) -> web.Application:
    proxy = SplitProxy(prefill, decode)
    app = web.Application(client_max_size=_MAX_BODY)
    app.cleanup_ctx.append(proxy.running)
    app.router.add_get("/v1/models", proxy.models)
    app.router.add_post("/v1/chat/completions", proxy.ask)
    app.router.add_post("/v1/completions", proxy.ask)
    return app


def main() -> None:
    prefill, decode, port = sys.argv[1:]
    end_with_parent()
    web.run_app(application(prefill, decode), host="127.0.0.1", port=int(port), print=None)


if __name__ == "__main__":
    main()
