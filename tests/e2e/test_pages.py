"""The gateway's pages: the same for everybody, from this server alone; they work in a browser."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.client
import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from memserve.config import GatewayConfig
from tests.browser import BROWSER_SECONDS, browser, tab
from tests.e2e.conftest import StartCluster
from tests.fakes import MODEL, FakeEngine

KEY = "k" * 24


def get(url: str, path: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_has_everything_in_itself_and_allows_nothing_else(
    start_cluster: StartCluster, path: str
) -> None:
    url = start_cluster(FakeEngine()).url
    status, headers, body = get(url, path)
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(|<link|<img""", body)
    assert not re.search(r"""\son[a-z]+\s*=|\sstyle\s*=|innerHTML|javascript:""", body)
    policy = dict(one.split(" ", 1) for one in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for kind in ("style", "script"):
        (inline,) = re.findall(f"<{kind}>(.*?)</{kind}>", body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    assert headers["x-content-type-options"] == "nosniff"


def test_a_stranger_sees_the_same_page_with_and_without_keys(start_cluster: StartCluster) -> None:
    open_url = start_cluster(FakeEngine()).url
    closed_url = start_cluster(FakeEngine(), gateway=GatewayConfig(port=0, api_keys=(KEY,))).url
    for path in ("/", "/docs", "/openapi.json"):
        assert get(closed_url, path)[0] == 200
        assert get(open_url, path)[2] == get(closed_url, path)[2]
        assert MODEL not in get(closed_url, path)[2]
    assert get(closed_url, "/v1/models")[0] == 401
    (card,) = json.loads(get(open_url, "/v1/models")[2])["data"]
    assert card["id"] == MODEL
    assert card["vocab_size"] == FakeEngine().info.vocab_size  # for who makes prompts of token ids
    assert get(closed_url, "/docs/oauth2-redirect")[0] == 404


async def test_who_has_no_key_is_asked_for_one_and_it_works(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    program = browser()
    gateway = GatewayConfig(port=0, api_keys=(KEY,))
    cluster = await asyncio.to_thread(start_cluster, FakeEngine(), gateway=gateway)
    async with asyncio.timeout(BROWSER_SECONDS), tab(program, tmp_path / "profile") as page:
        await page.call("Page.navigate", url=f"{cluster.url}/")
        text = """document.getElementById("%s").textContent"""
        await page.until("""document.getElementById("keybox")?.hidden === false""")
        assert await page.value(text % "state") == "ready"
        assert await page.value(text % "ready") == "1"
        assert MODEL not in await page.value("document.body.textContent")
        await page.value("""document.getElementById("go").click()""")
        await page.until("""document.getElementById("answer").className === "bad" """)
        assert "API key" in await page.value(text % "answer")
        await page.value(f"""(() => {{ const key = document.getElementById("key");
            key.value = "{KEY}"; key.dispatchEvent(new Event("change")); }})()""")
        await page.until(f"""{text % "model"}.startsWith("{MODEL}")""")
        for kind in ("completions", "chat/completions"):
            await page.value(f"""document.getElementById("kind").value = "{kind}" """)
            await page.value("""document.getElementById("tokens").value = 3""")
            await page.value("""document.getElementById("go").click()""")
            await page.until(f"""{text % "answer"}.length > 2
                && !document.getElementById("go").disabled""")
            assert await page.value("""document.getElementById("answer").className""") == ""
        loaded = await page.value("""JSON.stringify(
            performance.getEntriesByType("resource").map((one) => one.name))""")
        assert json.loads(loaded)
        assert all(name.startswith(cluster.url) for name in json.loads(loaded))


async def test_the_reference_shows_every_path_and_type(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    program = browser()
    cluster = await asyncio.to_thread(start_cluster, FakeEngine())
    api = json.loads((await asyncio.to_thread(get, cluster.url, "/openapi.json"))[2])
    async with asyncio.timeout(BROWSER_SECONDS), tab(program, tmp_path / "profile") as page:
        await page.call("Page.navigate", url=f"{cluster.url}/docs#type-ChatRequest")
        shown = await page.until("""document.querySelectorAll("#types details").length""")
        assert shown == len(api["components"]["schemas"])
        paths = json.loads(
            await page.value("""JSON.stringify(
            [...document.querySelectorAll("#paths summary code")].map((one) => one.textContent))""")
        )
        assert set(paths) == set(api["paths"])
        assert "/v1/chat/completions" in paths
        named = """document.getElementById("type-ChatRequest")"""
        await page.until(f"{named}.open")
        fields = await page.value(f"{named}.textContent")
        assert "messages" in fields
        assert "required" in fields
        chat = """[...document.querySelectorAll("#paths details")].find(
            (one) => one.textContent.includes("/v1/chat/completions")).textContent"""
        assert "temperature" in await page.value(chat)
