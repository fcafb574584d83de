"""What instances with real engines publish: prompts, answers, and what others hand over."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from memserve.api.status import REPORT_PATH, InstanceReport, InstanceStats
from memserve.types import Role
from tests.fakes import save_tiny_tokenizer
from tests.handoff_harness import BLOCK, Node, node, pair, prompt_of
from tests.insider import peers
from tests.kv_events_harness import Following, following, prefixes_of
from tests.tiny_models import save_tiny_model
from tests.waiting import until

_reports = msgspec.json.Decoder(InstanceReport)
_stats = msgspec.json.Decoder(InstanceStats)
PROMPT = prompt_of(70, seed=1)  # four whole blocks and six tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


def follow(gateway: Following, instance: Node) -> None:
    identity = instance.instance.identity
    gateway.feed.follow(identity.id, identity.epoch, instance.url, identity.role)


async def agreed(gateway: Following, *instances: Node) -> None:
    def equal() -> bool:
        return all(
            gateway.feed.synchronised(each.instance.identity.id)
            and gateway.tree.held(each.instance.identity.id) == prefixes_of(each.pool)
            for each in instances
        )

    await until(equal, "trees that equal the indexes")


async def test_both_sides_of_a_hand_over_are_known(model: Path) -> None:
    async with pair(model) as (p, d), following() as gateway:
        follow(gateway, p)
        follow(gateway, d)
        answer = await d.complete(*PROMPT, tokens=30, prefill=[p])
        await until(lambda: d.totals.returns == 1, "the return")
        await agreed(gateway, p, d)
        conversation = np.array(PROMPT + answer.tokens[0], dtype=np.int32)
        held = gateway.tree.match("", conversation)
        assert set(held.values()) == {99 // BLOCK * BLOCK}  # the last token has no KV
        assert list(gateway.tree.match("", conversation, Role.PREFILL)) == [p.instance.identity.id]
        private = await d.complete(*PROMPT, cache_salt="tenant")
        assert private.cached == 0
        await agreed(gateway, p, d)
        found = gateway.tree.match("salt:tenant", conversation)
        assert found == {d.instance.identity.id: 4 * BLOCK}


async def test_nothing_is_said_of_what_is_not_kept(model: Path) -> None:
    async with node(model, Role.COLOCATED, "off") as one, following() as gateway:
        follow(gateway, one)
        await one.complete(*PROMPT, tokens=4)
        await until(lambda: gateway.feed.synchronised(one.instance.identity.id), "the feed")
        assert gateway.tree.held(one.instance.identity.id) == set()
        assert gateway.tree.match("", np.array(PROMPT, dtype=np.int32)) == {}


async def test_an_instance_says_where_its_events_are(model: Path) -> None:
    async with node(model, Role.COLOCATED) as one, peers() as client:
        events = one.instance.info().kv_events
        assert events is not None
        assert events.endpoint.startswith("tcp://127.0.0.1:")
        assert events.block_tokens == BLOCK
        answer = await client.ask("GET", f"{one.url}/info")
        assert json.loads(answer.body)["kv_events"]["topic"] == events.topic


async def test_a_poll_is_one_question(model: Path) -> None:
    async with node(model, Role.COLOCATED) as one, peers() as client:
        report = await client.call("GET", one.url + REPORT_PATH, _reports.decode)
        assert report.stats is not None
        assert report.stats == await client.call("GET", f"{one.url}/stats", _stats.decode)
        info = msgspec.structs.asdict(one.instance.info())
        assert InstanceReport(**info, stats=report.stats) == report
        assert "stats" not in json.loads((await client.ask("GET", f"{one.url}/info")).body)
