"""The dashboard's door: nobody passes without the token, and no other site's page with it."""

from __future__ import annotations

from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.dashboard.guard import MIN_TOKEN, TOKEN_VARIABLE, Guard, dashboard_token
from memserve.errors import ConfigError

TOKEN = "a token of some length"
HOST = "127.0.0.1:8090"


class Asked:
    """What came back of one request, and whether the application behind saw it."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.passed = False
        self.closed: int | None = None

    @property
    def cookie(self) -> str:
        (morsel,) = SimpleCookie(self.headers["set-cookie"]).values()
        return f"{morsel.key}={morsel.value}"


class Door:
    def __init__(self, tls: bool = False) -> None:
        self._asked = Asked()
        self.guard = Guard(self._behind, TOKEN, 8090, tls)

    async def _behind(self, scope: Any, receive: Any, send: Any) -> None:
        self._asked.passed = True
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"inside"})

    async def ask(
        self,
        path: str = "/",
        method: str = "GET",
        body: bytes = b"",
        kind: str = "http",
        query: str = "",
        **headers: str,
    ) -> Asked:
        asked = self._asked = Asked()
        named = {"host": HOST, "accept": "text/html", **headers}
        scope = {
            "type": kind,
            "path": path,
            "method": method,
            "query_string": query.encode(),
            "headers": [(n.encode(), v.encode("latin-1")) for n, v in named.items() if v],
        }

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                asked.status = message["status"]
                asked.headers = {n.decode(): v.decode() for n, v in message["headers"]}
            elif message["type"] == "http.response.body":
                asked.body += message["body"]
            elif message["type"] == "websocket.close":
                asked.closed = message["code"]

        await self.guard(scope, receive, send)
        return asked


async def test_without_the_token_there_is_only_the_form() -> None:
    door = Door()
    for path in ("/", "/actions", "/assets/dashboard.js", "/_nicegui_ws/socket.io/", "/login"):
        asked = await door.ask(path)
        assert (asked.status, asked.passed) == (401, False)
        assert b'type="password"' in asked.body
    assert (await door.ask("/", accept="*/*")).body == b"Show the dashboard's token first."
    socket = await door.ask("/_nicegui_ws/socket.io/", kind="websocket")
    assert (socket.passed, socket.closed) == (False, 1008)


async def test_the_link_lets_in_and_leaves_no_token_in_the_address() -> None:
    door = Door()
    asked = await door.ask("/requests", query=f"open=x&token={TOKEN.replace(' ', '+')}")
    assert (asked.status, asked.passed) == (303, False)
    assert asked.headers["location"] == "/requests?open=x"
    words = asked.headers["set-cookie"]
    assert "HttpOnly" in words
    assert "SameSite=Strict" in words
    assert "Secure" not in words
    assert TOKEN not in words
    inside = await door.ask("/requests", cookie=asked.cookie)
    assert (inside.passed, inside.body) == (True, b"inside")
    assert "frame-ancestors 'none'" in inside.headers["content-security-policy"]
    assert (await door.ask(kind="websocket", cookie=asked.cookie)).passed


async def test_the_form_lets_in() -> None:
    door = Door(tls=True)
    asked = await door.ask(
        "/login", "POST", b"token=a+token+of+some+length", origin=f"https://{HOST}"
    )
    assert asked.status == 303
    assert "Secure" in asked.headers["set-cookie"]
    assert (await door.ask(cookie=asked.cookie)).passed


@pytest.mark.parametrize(
    "body", [b"", b"token=", b"token=wrong", b"\xff=\xfe", b"token=" + b"x" * 10_000]
)
async def test_a_wrong_token_does_not(body: bytes) -> None:
    asked = await Door().ask("/login", "POST", body)
    assert asked.status == 401
    assert "set-cookie" not in asked.headers
    assert b"That is not the token" in asked.body


@pytest.mark.parametrize("origin", ["http://evil.example", "null", f"http://{HOST}1", "http://["])
async def test_other_sites_pages_are_refused_even_with_the_cookie(origin: str) -> None:
    door = Door()
    cookie = (await door.ask(query=f"token={TOKEN.replace(' ', '+')}")).cookie
    assert (await door.ask("/", "POST", cookie=cookie, origin=origin)).status == 403
    socket = await door.ask(kind="websocket", cookie=cookie, origin=origin)
    assert (socket.passed, socket.closed) == (False, 1008)
    assert (await door.ask(kind="websocket", cookie=cookie, origin=f"http://{HOST}")).passed


@pytest.mark.parametrize("path", ["//evil.example/x", "/\\evil.example", "///evil.example"])
async def test_the_redirect_stays_here(path: str) -> None:
    asked = await Door().ask(path, query=f"token={TOKEN.replace(' ', '+')}")
    assert asked.headers["location"].startswith("/evil.example")


async def test_cookies_are_of_one_process_and_port() -> None:
    cookie = (await Door().ask(query=f"token={TOKEN.replace(' ', '+')}")).cookie
    assert cookie.startswith("memserve-dashboard-8090=")
    assert (await Door().ask(cookie=cookie)).status == 401  # another life


@given(st.text(max_size=80), st.text(max_size=80))
async def test_whatever_is_sent_is_answered(cookie: str, query: str) -> None:
    asked = await Door().ask(
        cookie=cookie.encode().decode("latin-1"), query=query.encode("utf-8", "replace").decode()
    )
    assert asked.status == 401
    assert not asked.passed


def test_a_token_is_made_on_loopback_and_wanted_beyond(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    first, made = dashboard_token(None, "127.0.0.1")
    assert made
    assert len(first) >= 32
    assert dashboard_token(None, "localhost")[0] != first
    with pytest.raises(ConfigError, match=f"set {TOKEN_VARIABLE} or --token-file"):
        dashboard_token(None, "0.0.0.0")
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert dashboard_token(None, "0.0.0.0") == (TOKEN, False)
    file = tmp_path / "token"
    file.write_text("another token of some length\n")
    assert dashboard_token(file, "0.0.0.0") == ("another token of some length", False)


@pytest.mark.parametrize("text", ["", "\n", "x" * (MIN_TOKEN - 1), "a\nb" * MIN_TOKEN])
def test_a_poor_token_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(ConfigError, match="16 printable characters"):
        dashboard_token(file, "127.0.0.1")
    with pytest.raises(ConfigError, match="cannot be read"):
        dashboard_token(tmp_path / "none", "127.0.0.1")
