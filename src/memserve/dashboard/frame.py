"""Frame of all pages: navigation, colours, and a line while the gateway is away."""

from __future__ import annotations

import html
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from nicegui import context, ui

import memserve
from memserve.watch import text
from memserve.watch.watcher import POLL_SECONDS, Watcher

ASSETS = "/assets"


class Link(NamedTuple):
    """A page of the navigation."""

    path: str
    title: str


LINKS = (
    Link("/", "Cluster"),
    Link("/requests", "Requests"),
    Link("/cache", "Cache"),
    Link("/latency", "Latency"),
    Link("/actions", "Actions"),
)
_COLOURS = {"auto": None, "light": False, "dark": True}


@dataclass(frozen=True, slots=True)
class Frame:
    """Sources of the pages' data."""

    watcher: Watcher

    @property
    def epoch(self) -> float:
        """Unix time at the watcher's clock's 0."""
        return time.time() - self.watcher.clock.now()

    @contextmanager
    def page(
        self, path: str, refresh: Callable[[], None] | Callable[[], Awaitable[None]]
    ) -> Iterator[None]:
        """Context of a page's content. `refresh` is called once it is there, and each second."""
        link = next(link for link in LINKS if link.path == path)
        ui.page_title(f"{link.title} - memserve")
        version = memserve.__version__
        ui.add_head_html(
            f'<link rel="stylesheet" href="{ASSETS}/dashboard.css?{version}">'
            f'<script src="{ASSETS}/dashboard.js?{version}" defer></script>'
        )
        with ui.header(wrap=False).classes("items-center justify-between q-py-xs"):
            ui.html(_navigation(path), sanitize=False)
            self._colours()
        trouble = ui.html(sanitize=False).classes("w-full")
        with ui.element("main").classes("w-full").props('id="content" tabindex="-1"') as content:
            yield

        async def look() -> None:
            trouble.set_content(self._trouble())
            if self.watcher.lost:
                content.classes("stale")
            else:
                content.classes(remove="stale")
            if (drawn := refresh()) is not None:
                await drawn

        ui.timer(POLL_SECONDS, look)

    def _trouble(self) -> str:
        words, latest = self.watcher.trouble, self.watcher.history.latest
        if words is None:
            return "" if latest is not None else '<p class="soft">Asking the gateway…</p>'
        told = f"Trying again: {words}"
        if self.watcher.lost and latest is not None:
            old = text.age(self.watcher.clock.now() - latest.at)
            told = f"What you see is {old} old. {told}"
        return f'<div class="trouble" role="alert">{html.escape(told)}</div>'

    def _colours(self) -> None:
        """A button that goes from automatic to light to dark, which the browser keeps."""
        dark = ui.dark_mode(None)
        button = ui.button("auto", icon="contrast").props("flat dense no-caps size=sm")
        button.tooltip("colours: automatic, light, dark")

        async def use(script: str) -> None:
            chosen = str(await ui.run_javascript(script))
            if chosen in _COLOURS:
                dark.value = _COLOURS[chosen]
                button.set_text(chosen)

        button.on_click(lambda: use("return memserveNextColours()"))
        context.client.on_connect(lambda: use("return memserveColours()"))


def _navigation(path: str) -> str:
    links = "".join(
        f'<a href="{link.path}"{" aria-current=page" if link.path == path else ""}>{link.title}</a>'
        for link in LINKS
    )
    return (
        f'<a class="skip" href="#content">To the content</a><nav aria-label="pages">{links}</nav>'
    )
