"""Every field that the openai package or vLLM knows: null and the default are accepted; a value
that would change the answer is supported, or refused by name."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi.routing import APIRoute

from memserve.api.forward import OWN_PATHS, WHOLE_PATHS
from memserve.cluster.membership import Membership
from memserve.gateway.admin import admin_app
from tests.api_fields import EFFECTS, PAGE, Place, all_places, page_with, tables
from tests.fakes import MODEL

with tempfile.TemporaryDirectory() as directory:
    PLACES = all_places(Path(directory))
FIELDS = [
    pytest.param(place, name, id=f"{place.title.strip('`')}-{name}".replace(" ", "-"))
    for place in PLACES
    for name in place.names
]


@pytest.mark.parametrize(("place", "name"), FIELDS)
async def test_a_field(place: Place, name: str) -> None:
    if name not in place.required:
        assert await place.refusal({name: None}) is None
    default = place.vllm.get(name)
    if default is not None:
        assert await place.refusal({name: default}) is None
    refusal = await place.refusal(place.effect(name))
    if refusal is not None:
        assert refusal.status == 400
        assert refusal.detail.param is not None
        named = {*place.effect(name), "messages", "text.format", "reasoning.effort"}
        assert name in str(refusal) or refusal.detail.param in named


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.title)
@pytest.mark.parametrize("value", [1, "x", True, [1], {"x": 1}])
async def test_an_unknown_field_is_refused_by_name(place: Place, value: Any) -> None:
    refusal = await place.refusal({"nonsense": value})
    assert refusal is not None
    assert "nonsense" in str(refusal)


def test_every_effect_is_some_field_s() -> None:
    assert EFFECTS.keys() <= {name for place in PLACES for name in place.names}


def test_the_page_has_every_endpoint(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    app = admin_app(
        MODEL, Membership(), cast(Any, None), cast(Any, None), lambda: False, lambda n: ()
    )
    own = {route.path for route in app.routes if isinstance(route, APIRoute)}
    assert "/load" in own
    shown = {path for path in own if not path.startswith("/cluster")}
    for path in {*shown, *OWN_PATHS, *WHOLE_PATHS}:
        assert f"`{path.replace('{name:path}', '{name}')}`" in page, path


async def test_the_page_is_what_the_code_does() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with(page, await tables(PLACES)), "run `make api-docs`"
