"""The dashboard's process beside a fake cluster: over plain HTTP, and in a real Chromium.

The browser's tests need Chromium and Playwright, which `make setup` does not install:
`make ui-test` says what to do.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from memserve.api.status import MediumTotals, PeerMoves, PoolTotals
from memserve.models.tokenizer import Tokenizer
from memserve.types import Role
from tests.fakes import FakeCluster, FakeEngine, until

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_MISSING = [
    *(() if _CHROMIUM else ("a Chromium (apt-get install chromium)",)),
    *(() if find_spec("playwright") else ("Playwright (.venv/bin/pip install playwright)",)),
]
in_browser = pytest.mark.skipif(bool(_MISSING), reason=f"needs {' and '.join(_MISSING)}")
PAGES = ("Cluster", "Requests", "Cache", "Latency", "Actions")
CHARTS = {"Cache": 3, "Latency": 4}


@contextmanager
def dashboard(*arguments: str, **environment: str) -> Iterator[str]:
    """The link that `memserve dashboard` prints."""
    command = [sys.executable, "-m", "memserve", "dashboard", "--port", "0", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        assert process.wait(20) == 0


class Busy:
    """A fake cluster whose members tell of memory and of KV that moves, and whose clients never
    stop asking."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.polls = 0
        self.ends = threading.Event()
        self.client = threading.Thread(target=self._ask)
        prefill, decode = cluster.instances[:2]
        cluster.call(lambda: prefill.change_role(Role.PREFILL))
        cluster.call(lambda: decode.change_role(Role.DECODE))
        told = decode.stats
        pool = PoolTotals(MediumTotals(100, 40, 10, 50, 5), MediumTotals(100, 90, 0, 10))

        def stats() -> object:
            self.polls += 1
            now = told()
            if now is None:
                return None
            moves = {prefill.identity.id: PeerMoves(self.polls << 20, self.polls << 18)}
            return msgspec.structs.replace(now, pool=pool, moves=moves)

        decode.stats = stats  # type: ignore[method-assign,assignment]

    def _ask(self) -> None:
        body = {"prompt": "the quick brown fox", "max_tokens": 8, "stream": True}
        while not self.ends.wait(0.05):
            connection = http.client.HTTPConnection(urlsplit(self.cluster.url).netloc)
            head = {"content-type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), head)
            connection.getresponse().read()
            connection.close()


@pytest.fixture(scope="module")
def busy(tokenizer: Tokenizer) -> Iterator[Busy]:
    engines = [FakeEngine(), FakeEngine(cached_tokens=4), FakeEngine()]
    with FakeCluster(tokenizer, engines) as cluster:
        made = Busy(cluster)
        made.client.start()
        try:
            yield made
        finally:
            made.ends.set()
            made.client.join()


def test_pages_are_behind_the_token(busy: Busy) -> None:
    with dashboard("--url", busy.cluster.url) as link:
        place = urlsplit(link)

        def get(path: str, **headers: str) -> http.client.HTTPResponse:
            connection = http.client.HTTPConnection(place.netloc)
            connection.request("GET", path, headers={"accept": "text/html", **headers})
            answer = connection.getresponse()
            answer.body = answer.read()  # type: ignore[attr-defined]
            connection.close()
            return answer

        assert get("/").status == 401
        assert get("/_nicegui_ws/socket.io/?EIO=4&transport=polling").status == 401
        met = get(f"/?{place.query}")
        assert met.status == 303
        cookie = str(met.headers["set-cookie"]).partition(";")[0]
        for path in ("/", "/requests?open=x", "/cache", "/latency", "/actions"):
            page = get(path, cookie=cookie)
            assert page.status == 200
            assert b"/assets/dashboard.js" in page.body  # type: ignore[attr-defined]
        assert get("/assets/dashboard.css", cookie=cookie).status == 200


def test_a_chosen_token_is_in_no_output_and_bad_settings_are_refused(tmp_path: Path) -> None:
    with dashboard("--url", "http://127.0.0.1:1", MEMSERVE_DASHBOARD_TOKEN="x" * 20) as link:
        assert urlsplit(link).query == ""
    command = [sys.executable, "-m", "memserve", "dashboard", "--host", "0.0.0.0"]
    environment = {k: v for k, v in os.environ.items() if k != "MEMSERVE_DASHBOARD_TOKEN"}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert told.returncode == 2
    assert "set MEMSERVE_DASHBOARD_TOKEN or --token-file" in told.stderr


class Browser:
    """A Chromium with one page, and what went wrong in it."""

    def __init__(self, chromium: Any, base: str, **options: Any) -> None:
        self.context = chromium.new_context(**options)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self._asked(request.url, base))

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(message.text)

    def _asked(self, url: str, base: str) -> None:
        host = urlsplit(base).netloc
        if not url.startswith(("data:", "blob:")) and urlsplit(url).netloc != host:
            self.wrong.append(f"asks elsewhere: {url}")

    def go(self, name: str) -> None:
        self.page.click(f"nav >> text={name}")
        self.page.wait_for_selector(f"nav a[aria-current]:text('{name}')")

    def drawn(self) -> int:
        """How many bytes a screenshot's PNG has: one of a single colour has a few thousand."""
        return len(self.page.screenshot())


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=list(_FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def link(busy: Busy) -> Iterator[str]:
    with dashboard("--url", busy.cluster.url) as told:
        yield told


@in_browser
@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")], ids=str
)
def test_every_page_is_drawn(chromium: Any, link: str, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900}
    browser = Browser(chromium, link, viewport=size, color_scheme=scheme)
    page = browser.page
    page.goto(link)
    page.wait_for_selector(".card")
    page.wait_for_selector("svg.flows path.forward", state="attached")
    page.wait_for_selector("svg.flows path.returned", state="attached")
    assert "token" not in page.url
    assert page.locator(".card").count() == 3
    assert page.locator("[data-member=i1] .bar i").count() == 6
    assert page.locator("svg.flows text").first.text_content().endswith("B/s")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 27)" if scheme == "dark" else "rgb(246, 247, 249)")
    for name in PAGES:
        browser.go(name)
        if name in CHARTS:
            count = f"document.querySelectorAll('.chart canvas').length === {CHARTS[name]}"
            page.wait_for_function(count)
            if name == "Latency":
                page.click("button:has-text('by policy')")
                page.wait_for_selector("text=At gateways of each policy")
                page.click("button:has-text('p99')")
        elif name == "Requests":
            page.click("table.list tbody tr:nth-child(2) a")
            page.wait_for_selector(".candidate.chosen .bar i.decode")
            assert "what happened" in page.inner_text(".panel")
        elif name == "Actions":
            page.wait_for_selector("button[aria-label='drain i2']")
        assert browser.drawn() > 8_000
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.wrong == []
    browser.context.close()


@in_browser
def test_an_action_says_what_will_happen_and_asks(chromium: Any, link: str, busy: Busy) -> None:
    browser = Browser(chromium, link)
    page = browser.page
    page.goto(link.replace("/?", "/actions?"))

    def state() -> str:
        return str(busy.cluster.instances[2].state)

    page.click("button[aria-label='drain i2']")
    page.wait_for_selector("text=i2 gets no new requests.")
    page.keyboard.press("Escape")
    page.wait_for_selector(".q-dialog", state="detached")
    assert state() == "ready"
    page.focus("button[aria-label='drain i2']")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Resume undoes this.")
    page.wait_for_function("document.activeElement.innerText === 'Cancel'")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Drain i2: done")
    until(lambda: state() == "draining", 0.05)
    page.click("button[aria-label='resume i2']")
    page.click(".q-dialog button:has-text('Resume i2')")
    page.wait_for_selector("text=Resume i2: done")
    until(lambda: state() == "ready", 0.05)
    page.wait_for_selector("button[aria-label='drain i2']")
    page.click("button[aria-label='to decode i2']")
    page.wait_for_selector("text=New requests use i2 as a decode instance instead of colocated.")
    page.click(".q-dialog button:has-text('Make i2')")
    page.wait_for_selector("text=Make i2 a decode instance: done")
    assert browser.wrong == []
    browser.context.close()


@in_browser
def test_a_keyboard_keeps_its_place_while_the_list_moves(chromium: Any, link: str) -> None:
    browser = Browser(chromium, link)
    page = browser.page
    page.goto(link.replace("/?", "/requests?"))
    page.wait_for_selector("table.list a")
    page.focus("table.list tbody tr:first-child a")
    place = "document.activeElement.getAttribute('href')"
    held = page.evaluate(place)
    page.wait_for_function(
        """held => !document.querySelector(
        'table.list tbody tr:first-child a[href="' + CSS.escape(held) + '"]')""",
        arg=held,
    )
    page.wait_for_function(f"held => {place} === held", arg=held)
    page.keyboard.press("Enter")
    page.wait_for_selector(".candidate.chosen")
    assert browser.wrong == []
    browser.context.close()


@in_browser
def test_colours_are_kept_and_a_dashboard_may_only_show(chromium: Any, busy: Busy) -> None:
    with dashboard("--url", busy.cluster.url, "--read-only") as link:
        browser = Browser(chromium, link, color_scheme="light")
        page = browser.page
        page.goto(link.replace("/?", "/actions?"))
        page.wait_for_selector("text=i2: ")
        assert page.locator("main button").count() == 0
        button = "header button"
        page.click(button)
        page.wait_for_selector(f"{button}:has-text('light')")
        page.click(button)
        page.wait_for_selector("body.body--dark")
        page.reload()
        page.wait_for_selector("body.body--dark")
        assert browser.wrong == []
        browser.context.close()


@in_browser
def test_a_gateway_that_is_away_is_said(chromium: Any, tokenizer: Tokenizer) -> None:
    with FakeCluster(tokenizer, [FakeEngine()]) as cluster:
        context = dashboard("--url", cluster.url)
        link = context.__enter__()
        browser = Browser(chromium, link)
        browser.page.goto(link)
        browser.page.wait_for_selector(".card")
    try:
        browser.page.wait_for_selector(".trouble:has-text('What you see is')")
        assert browser.page.locator(".card").count() == 1
        assert browser.wrong == []
        browser.context.close()
    finally:
        context.__exit__(None, None, None)
