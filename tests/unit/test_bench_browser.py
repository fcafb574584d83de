"""A report in a real browser, light and dark: it is drawn, and asks for nothing else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from evaluation.paper.page import paper_page
from evaluation.paper.tables import reduce_runs
from memserve.bench.environment import capture_environment
from tests.browser import BROWSER_SECONDS, browser, tab
from tests.paper_runs import made_up_runs

_LOOK = """(() => {
  const plot = document.querySelector("img.plot");
  return document.readyState === "complete" && JSON.stringify({
    plots: document.querySelectorAll("img.plot").length,
    loaded: performance.getEntriesByType("resource").filter(
      (one) => !one.name.startsWith("data:")).length,
    drawn: plot.complete && plot.naturalWidth > 300 && plot.naturalHeight > 200,
    filter: getComputedStyle(plot).filter,
    paper: getComputedStyle(document.body).backgroundColor,
    tooWide: document.documentElement.scrollWidth > innerWidth });
})()"""


async def test_a_report_is_drawn_in_light_and_dark_and_loads_nothing(tmp_path: Path) -> None:
    program = browser()
    result = reduce_runs(made_up_runs(lambda cell: cell.rate), (), (), ())
    file = tmp_path / "report.html"
    file.write_text(paper_page(capture_environment(), result, ()), encoding="utf-8")
    seen = {}
    async with asyncio.timeout(BROWSER_SECONDS), tab(program, tmp_path / "profile") as opened:
        await opened.call("Page.navigate", url=file.as_uri())
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            await opened.call("Emulation.setEmulatedMedia", features=[feature])
            seen[scheme] = json.loads(await opened.until(_LOOK))
    for found in seen.values():
        assert (found["plots"], found["loaded"], found["drawn"]) == (12, 0, True)
        assert not found["tooWide"]
    assert seen["light"]["paper"] == "rgb(255, 255, 255)"
    assert seen["dark"]["paper"] == "rgb(21, 24, 28)"
    assert seen["light"]["filter"] == "none"
    assert "invert" in seen["dark"]["filter"]
