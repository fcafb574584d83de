"""The gateway's pages for people: `/`, and `/docs` over `/openapi.json`.

Each is one file without anything from elsewhere, the same for everybody: what a page shows, its
script asks the API for, with the reader's own key. Its Content-Security-Policy allows exactly the
style and script in it, and requests to this server.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Response

LANDING_PATH = "/"
DOCS_PATH = "/docs"

_INLINE = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Page:
    """An HTML document and the headers that it is sent with."""

    body: bytes
    headers: dict[str, str]


@cache
def read_page(name: str) -> Page:
    """Return a page of the folder `html`."""
    text = (files("memserve.gateway") / "html" / name).read_text(encoding="utf-8")
    hashes: dict[str, list[str]] = {"style": [], "script": []}
    for kind, inline in _INLINE.findall(text):
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    policy = (
        "default-src 'none'",
        f"style-src {' '.join(hashes['style'])}",
        f"script-src {' '.join(hashes['script'])}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    headers = {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Page(text.encode(), headers)


def page_routes() -> APIRouter:
    """Return the routes of the pages."""
    routes = APIRouter(include_in_schema=False)

    @routes.get(LANDING_PATH)
    async def landing() -> Response:
        return _answer(read_page("landing.html"))

    @routes.get(DOCS_PATH)
    async def docs() -> Response:
        return _answer(read_page("docs.html"))

    return routes


def _answer(page: Page) -> Response:
    return Response(page.body, headers=page.headers, media_type="text/html")
