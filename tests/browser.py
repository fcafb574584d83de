"""A tab of a real browser, over Chrome's DevTools protocol."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-zygote", "--single-process"),
    *("--remote-debugging-port=0", "--window-size=1250,900"),
)
BROWSER_SECONDS = 60.0  # a browser's first start on a busy machine takes a good part of it


class Tab:
    """A page, over Chrome's DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._session: str | None = None
        self._number = 0

    async def open(self) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        self._session = attached["sessionId"]

    async def call(self, method: str, **params: object) -> dict[str, Any]:
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        await self._socket.send_json(message)
        while True:
            answer = await self._socket.receive_json()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    async def value(self, expression: str) -> Any:
        """A JavaScript expression's value, once promises in it are done."""
        found = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True)
        return found["result"].get("value")

    async def until(self, expression: str) -> Any:
        """The expression's value as soon as it is true."""
        while not (value := await self.value(expression)):  # noqa: ASYNC110 - it is a browser's
            await asyncio.sleep(0.05)
        return value


def browser() -> str:
    named = os.environ.get("MEMSERVE_TEST_BROWSER")
    found = named or next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(
            "no browser: install Chromium, or name one with MEMSERVE_TEST_BROWSER=/path/to/chrome"
        )
    return found


@asynccontextmanager
async def tab(program: str, profile: Path) -> AsyncIterator[Tab]:
    process = await asyncio.create_subprocess_exec(
        *(program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async for line in process.stderr:
            address = line.decode().partition("DevTools listening on ")[2].strip()
            if address:
                break
        async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
            opened = Tab(socket)
            await opened.open()
            yield opened
    finally:
        process.kill()
        await process.wait()
