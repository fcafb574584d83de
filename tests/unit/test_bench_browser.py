"""A report in a real browser, light and dark: it is drawn, and asks for nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from evaluation.paper.page import paper_page
from evaluation.paper.tables import reduce_runs
from memserve.bench.environment import capture_environment
from tests.paper_runs import made_up_runs

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-zygote", "--single-process"),
    *("--remote-debugging-port=0", "--window-size=1250,900"),
)
_SECONDS = 60.0  # a browser's first start on a busy machine takes a good part of it
_LOOK = """JSON.stringify((() => {
  const plot = document.querySelector("img.plot");
  return {
    ready: document.readyState, plots: document.querySelectorAll("img.plot").length,
    loaded: performance.getEntriesByType("resource").filter(
      (one) => !one.name.startsWith("data:")).length,
    drawn: plot.complete && plot.naturalWidth > 300 && plot.naturalHeight > 200,
    filter: getComputedStyle(plot).filter,
    paper: getComputedStyle(document.body).backgroundColor,
    tooWide: document.documentElement.scrollWidth > innerWidth };
})())"""


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

    async def look(self) -> dict[str, Any]:
        """What `_LOOK` finds once the page is there."""
        while True:
            found = await self.call("Runtime.evaluate", expression=_LOOK)
            text = found["result"].get("value")
            if text is not None:
                seen: dict[str, Any] = json.loads(text)
                if seen["ready"] == "complete":
                    return seen
            await asyncio.sleep(0.05)


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


async def test_a_report_is_drawn_in_light_and_dark_and_loads_nothing(tmp_path: Path) -> None:
    program = browser()
    result = reduce_runs(made_up_runs(lambda cell: cell.rate), (), (), ())
    file = tmp_path / "report.html"
    file.write_text(paper_page(capture_environment(), result, ()), encoding="utf-8")
    seen = {}
    async with asyncio.timeout(_SECONDS), tab(program, tmp_path / "profile") as opened:
        await opened.call("Page.navigate", url=file.as_uri())
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            await opened.call("Emulation.setEmulatedMedia", features=[feature])
            seen[scheme] = await opened.look()
    for found in seen.values():
        assert (found["plots"], found["loaded"], found["drawn"]) == (12, 0, True)
        assert not found["tooWide"]
    assert seen["light"]["paper"] == "rgb(255, 255, 255)"
    assert seen["dark"]["paper"] == "rgb(21, 24, 28)"
    assert seen["light"]["filter"] == "none"
    assert "invert" in seen["dark"]["filter"]
