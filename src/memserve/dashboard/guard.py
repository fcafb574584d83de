"""The dashboard's door: a token for everybody, and no other site's pages.

The dashboard holds the cluster's secret, and other users of the machine are strangers on loopback,
too. Who shows the token, in a link or the form, gets a cookie of this process's life.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from memserve.errors import ConfigError
from memserve.hosts import is_loopback

TOKEN_VARIABLE = "MEMSERVE_DASHBOARD_TOKEN"
MIN_TOKEN = 16  # characters of a token that a person chooses
MAX_FORM_BYTES = 4096
LOGIN_PATH = "/login"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
_FORM = (Path(__file__).parent / "templates" / "login.html").read_text(encoding="utf-8")


def dashboard_token(file: Path | None, host: str) -> tuple[str, bool]:
    """Return the token, of `file`, of MEMSERVE_DASHBOARD_TOKEN, or a random one, and whether it is
    random. Raises ConfigError for one that is too short, and beyond loopback without one that was
    chosen."""
    text = os.environ.get(TOKEN_VARIABLE, "")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from error
    text = text.strip()
    if not text and file is None:
        if is_loopback(host):
            return secrets.token_urlsafe(24), True
        raise ConfigError(
            f"{host} can be reached from other machines, and the dashboard may change the cluster: "
            f"set {TOKEN_VARIABLE} or --token-file, or listen on 127.0.0.1"
        )
    if len(text) < MIN_TOKEN or not text.isprintable():
        raise ConfigError(f"the dashboard's token must have {MIN_TOKEN} printable characters")
    return text, False


def link_of(address: str, token: str | None) -> str:
    """Return the link to open. `token`: one that was made here; a chosen one is in no output."""
    return f"{address}/" if token is None else f"{address}/?token={token}"


class Guard:
    """An ASGI application around another: 401 or the form for whoever has not shown the token,
    403 for requests of other sites' pages."""

    def __init__(self, app: App, token: str, port: int, tls: bool = False) -> None:
        self._app = app
        self._token = _digest(token)
        # Cookies are shared by all ports of a host, their names are not.
        self._cookie = f"memserve-dashboard-{port}"
        self._session = secrets.token_urlsafe(32)
        self._secure = "; Secure" if tls else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = {n.decode("latin-1"): v.decode("latin-1") for n, v in scope["headers"]}
        if not _same_site(headers):
            await _refuse(scope, send, 403, "This page belongs to another site.")
        elif kind == "websocket":
            if self._knows(headers):
                await self._app(scope, receive, send)
            else:
                await _refuse(scope, send, 401, "")
        else:
            await self._http(scope, receive, send, headers)

    async def _http(
        self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str]
    ) -> None:
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        shown = dict(query).get("token")
        if shown is not None and scope["method"] == "GET":
            left = urlencode([(name, value) for name, value in query if name != "token"])
            back = _local(scope["path"]) + (f"?{left}" if left else "")
            await self._let_in(send, shown, back)
        elif scope["path"] == LOGIN_PATH and scope["method"] == "POST":
            form = dict(parse_qsl((await _body(receive)).decode("latin-1")))
            await self._let_in(send, form.get("token", ""), "/")
        elif self._knows(headers):
            await self._app(scope, receive, _with_headers(send))
        elif scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            await _answer(send, 401, _FORM.replace("MESSAGE", ""), "text/html")
        else:
            await _answer(send, 401, "Show the dashboard's token first.")

    def _knows(self, headers: dict[str, str]) -> bool:
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        found = cookies.get(self._cookie)
        return found is not None and hmac.compare_digest(
            _digest(found.value), _digest(self._session)
        )

    async def _let_in(self, send: Send, shown: str, back: str) -> None:
        if not hmac.compare_digest(_digest(shown), self._token):
            wrong = "<p role='alert'>That is not the token.</p>"
            await _answer(send, 401, _FORM.replace("MESSAGE", wrong), "text/html")
            return
        cookie = f"{self._cookie}={self._session}; Path=/; HttpOnly; SameSite=Strict{self._secure}"
        await _answer(
            send, 303, "", more=((b"location", back.encode()), (b"set-cookie", cookie.encode()))
        )


def _same_site(headers: dict[str, str]) -> bool:
    """Return whether a request comes from a page of the dashboard itself, or from no page."""
    origin = headers.get("origin")
    if origin is None:
        return True
    try:
        return urlsplit(origin).netloc == headers.get("host") != ""
    except ValueError:
        return False


def _local(path: str) -> str:
    """Return a path that stays on this host: `//other` is another one's."""
    return "/" + quote(path.lstrip("/\\"))


async def _body(receive: Receive) -> bytes:
    """Return a form's body; empty if it is too large."""
    body = b""
    while True:
        message = await receive()
        part: bytes = message.get("body", b"")
        body += part
        if len(body) > MAX_FORM_BYTES or message["type"] == "http.disconnect":
            return b""
        if not message.get("more_body"):
            return body


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
        await send(message)

    return sending


async def _refuse(scope: Scope, send: Send, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await _answer(send, status, text)


async def _answer(
    send: Send,
    status: int,
    text: str,
    media: str = "text/plain",
    more: tuple[tuple[bytes, bytes], ...] = (),
) -> None:
    body = text.encode()
    headers = [
        (b"content-type", f"{media}; charset=utf-8".encode()),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        *_HEADERS,
        *more,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
