"""`GET /cluster/prefixes`: the hottest prefixes of the prompt trees, and who holds them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
from fastapi import APIRouter, Query, Response

from memserve.clock import Clock
from memserve.cluster.client import PREFIXES_PATH
from memserve.gateway.asgi import JsonResponse
from memserve.gateway.siblings import Siblings
from memserve.models.tokenizer import Tokenizer
from memserve.scheduler.hot_prefixes import (
    MAX_PREFIXES,
    HotPrefix,
    HotPrefixes,
    reading_prefixes,
)
from memserve.scheduler.prefix_view import PrefixReport, PrefixView, merged_reports
from memserve.scheduler.prompt_tree import PromptTree
from memserve.types import TokenArray

log = logging.getLogger(__name__)

SHOWN_PREFIXES = 20  # default n
_ENDS_TOKENS = 48  # of a text, at its beginning and at its end

_reports = msgspec.json.Decoder(PrefixReport)


def prefix_routes(
    tree: PromptTree, clock: Clock, tokenizer: Tokenizer, siblings: Siblings | None
) -> APIRouter:
    """Return the route. `clock`: of the tree's expectations. With `siblings`, the hits of all
    workers of the gateway are added up."""
    routes = APIRouter()

    @routes.get(PREFIXES_PATH)
    async def prefixes(
        n: Annotated[int, Query(ge=1, le=MAX_PREFIXES)] = SHOWN_PREFIXES, text: bool = False
    ) -> Response:
        """The prefixes whose hits saved the most tokens, and the largest tenants. `text`: with
        what they say, shortened."""
        found = await _read(tree, n, clock.now())
        report = found.report
        if text:
            log.warning("an operator asked for the texts of %d prefixes", len(found.prefixes))
            views = await asyncio.to_thread(_told, tokenizer, found.prefixes)
            report = msgspec.structs.replace(report, prefixes=tuple(views))
        if siblings is not None:
            path = f"{PREFIXES_PATH}?n={n}&text={str(text).lower()}"
            others = (await siblings.answers(path)).values()
            report = merged_reports([report, *map(_reports.decode, others)], n)
        return JsonResponse(report)

    return routes


async def _read(tree: PromptTree, n: int, now: float) -> HotPrefixes:
    reading = reading_prefixes(tree, n, now)
    while True:
        try:
            next(reading)
        except StopIteration as end:
            found: HotPrefixes = end.value
            return found
        await asyncio.sleep(0)


def _told(tokenizer: Tokenizer, found: Sequence[HotPrefix]) -> list[PrefixView]:
    return [
        msgspec.structs.replace(each.view, text=_text(tokenizer, np.frombuffer(each.own, np.int32)))
        for each in found
    ]


def _text(tokenizer: Tokenizer, tokens: TokenArray) -> str:
    """Return the text of tokens [n] int32, with its middle left out if it is long."""
    if len(tokens) <= 2 * _ENDS_TOKENS:
        return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    ends = tokens[:_ENDS_TOKENS], tokens[-_ENDS_TOKENS:]
    first, last = (tokenizer.decode(each.tolist(), skip_special_tokens=False) for each in ends)
    return f"{first} … {last}"
