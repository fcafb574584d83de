"""The watcher beside a real gateway: what it sees, and what it does when the gateway is away."""

from __future__ import annotations

import asyncio
import http.client
import json
from contextlib import ExitStack
from urllib.parse import urlsplit

import msgspec
import pytest
from textual.widgets import DataTable

from memserve.cluster.client import ClusterClient, GatewayUnreachable
from memserve.cluster.figures import STATS_PATH, ClusterFigures
from memserve.models.tokenizer import Tokenizer
from memserve.top.app import TopApp
from memserve.watch import watcher as watching
from memserve.watch.watcher import Watcher
from tests.e2e.conftest import StartCluster
from tests.fakes import FakeCluster, FakeEngine, metric, until


def complete(cluster: FakeCluster, stream: bool = True) -> None:
    connection = http.client.HTTPConnection(urlsplit(cluster.url).netloc)
    body = {"prompt": "the quick brown fox", "max_tokens": 6, "stream": stream, "ignore_eos": True}
    head = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), head)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    assert answer.status == 200


async def test_what_happened_is_seen_beside_what_was_predicted(start_cluster: StartCluster) -> None:
    cluster = start_cluster(FakeEngine(cached_tokens=2), FakeEngine())
    async with Watcher([cluster.url + "/", cluster.url]) as watcher:
        await watcher.poll()
        complete(cluster)
        complete(cluster, stream=False)
        await watcher.poll()
        assert watcher.urls == (cluster.url,)
        assert (watcher.trouble, watcher.lost) == (None, False)
        seen = watcher.history.latest
        assert seen is not None
        assert [member.id for member in seen.members] == ["i0", "i1"]
        assert all(member.stats is not None for member in seen.members)
        assert (seen.totals.answered, seen.totals.running) == (2, 0)
        assert sum(seen.totals.first_token.counts) == 1
        # Of the stream's six tokens; those that came with the first one had no time between.
        assert sum(seen.totals.inter_token.counts) <= 5
        assert sum(seen.totals.per_token.counts) == 1
        assert sum(seen.totals.whole.counts) == 2
        found = watcher.history.rates.policies["prompt-tree"]
        assert (found.first_token.count, found.per_token.count, found.whole.count) == (1, 1, 2)
        assert [worker.life > 0 for worker in seen.by_gateway[0].workers] == [True]
        whole, streamed = (each.view for each in seen.decisions)
        assert (streamed.considered, len(streamed.candidates)) == (2, 2)
        assert streamed.happened.first_token is not None
        assert streamed.happened.whole is not None
        assert 0 < streamed.happened.first_token <= streamed.happened.whole
        assert whole.happened.first_token is None  # it comes with everything else
        assert whole.happened.whole is not None
        assert seen.decisions[0].made >= seen.decisions[1].made
        assert seen.at - 60 < seen.decisions[1].made <= seen.at
        (point,) = watcher.history.points
        assert point.answered == pytest.approx(2 / watcher.history.rates.seconds)


async def test_only_whole_answers_have_a_completion_time(start_cluster: StartCluster) -> None:
    """Else the gateway that refuses most would look like the fastest one."""
    engine = FakeEngine(step_seconds=0.005)
    cluster = start_cluster(engine)

    def send(body: dict[str, object]) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(urlsplit(cluster.url).netloc)
        head = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), head)
        return connection

    def answered() -> float:
        return metric(cluster.url, "memserve_request_seconds_count")

    complete(cluster)
    assert send({"prompt": "fox", "max_tokens": -1}).getresponse().status == 400
    stream: dict[str, object] = {
        "prompt": "fox",
        "max_tokens": 200,
        "stream": True,
        "ignore_eos": True,
    }
    engine.gate.clear()
    leaves = send(stream)
    until(lambda: len(engine.submitted) == 2)
    leaves.close()
    until(lambda: answered() == 3)
    engine.gate.set()
    answer = send(stream).getresponse()
    assert answer.read(6) == b"data: "
    engine.fails = "it fails"
    answer.read()
    until(lambda: answered() == 4)
    assert metric(cluster.url, "memserve_streams_broken_total") == 1
    assert metric(cluster.url, "memserve_client_hang_ups_total") == 1
    assert metric(cluster.url, "memserve_answer_seconds_count") == 1
    async with Watcher([cluster.url]) as watcher:
        await watcher.poll()
        assert watcher.history.latest is not None
        assert sum(watcher.history.latest.totals.whole.counts) == 1


async def test_a_request_that_runs_has_no_end_yet(start_cluster: StartCluster) -> None:
    engine = FakeEngine()
    cluster = start_cluster(engine)
    engine.gate.clear()
    connection = http.client.HTTPConnection(urlsplit(cluster.url).netloc)
    body = json.dumps({"prompt": "fox", "max_tokens": 4, "stream": True})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    async with Watcher([cluster.url]) as watcher:
        while watcher.history.latest is None or not watcher.history.latest.decisions:
            await watcher.poll()
        (decision,) = watcher.history.latest.decisions
        assert decision.view.happened == type(decision.view.happened)()
        assert watcher.history.latest.totals.running == 1
    engine.gate.set()
    connection.getresponse().read()
    connection.close()


async def test_a_gateway_that_is_away_is_named_and_met_again(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start_cluster(FakeEngine())
    away = False
    secrets = 0
    view = ClusterClient.view

    class Client(ClusterClient):
        def __init__(self, *args: object, **more: object) -> None:
            nonlocal secrets
            secrets += 1
            super().__init__(*args, **more)  # type: ignore[arg-type]

        async def view(self):  # type: ignore[no-untyped-def]
            if away:
                raise GatewayUnreachable("no answer: refused")
            return await view(self)

    monkeypatch.setattr(watching, "ClusterClient", Client)
    async with Watcher([cluster.url]) as watcher:
        await watcher.poll()
        known = watcher.history.latest
        away = True
        await watcher.poll()
        assert watcher.lost
        assert watcher.trouble == f"{cluster.url}: no answer: refused"
        assert watcher.history.latest is known  # still shown
        away = False
        await watcher.poll()
        assert not watcher.lost
        assert watcher.trouble is None
        assert watcher.history.latest is not known
        assert secrets == 2  # one for each time that it was met


async def test_one_gateway_of_two_is_enough(start_cluster: StartCluster) -> None:
    cluster = start_cluster(FakeEngine())
    async with Watcher([cluster.url, "http://127.0.0.1:1"]) as watcher:
        await watcher.poll()
        assert not watcher.lost
        assert watcher.trouble is not None
        assert "http://127.0.0.1:1" in watcher.trouble
        assert watcher.history.latest is not None
        assert watcher.history.latest.gateways == (cluster.url,)


async def test_without_the_secret_it_says_so(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start_cluster(FakeEngine())
    monkeypatch.setenv("MEMSERVE_SECRET", "another one")
    async with Watcher([cluster.url]) as watcher:
        await watcher.poll()
        assert watcher.lost
        assert "secret" in str(watcher.trouble)


async def test_top_shows_a_cluster_and_says_when_its_gateway_is_gone(tokenizer: Tokenizer) -> None:
    with ExitStack() as stack:
        cluster = stack.enter_context(FakeCluster(tokenizer, [FakeEngine(), FakeEngine()]))
        complete(cluster)
        app = TopApp([cluster.url], pause=0.05)
        async with app.run_test(size=(80, 24)) as pilot:
            members, decisions = (
                app.query_one(f"#{n}", DataTable) for n in ("members", "decisions")
            )
            while not (members.row_count and decisions.row_count):
                await pilot.pause(0.05)
            assert [str(members.get_cell(row, "id")) for row in members.rows] == ["i0", "i1"]
            await asyncio.to_thread(stack.close)
            while not (app.watcher.lost and app.query_one("#trouble").display):
                await pilot.pause(0.05)
            assert members.row_count == 2


async def test_a_large_cluster_is_encoded_whole(start_cluster: StartCluster) -> None:
    cluster = start_cluster(FakeEngine())
    urls = [f"http://127.0.0.1:{port}" for port in range(1, 101)]
    cluster.call(lambda: [cluster.gateway.membership.join(url) for url in urls])
    async with ClusterClient(cluster.url) as client:
        figures = await client.read(STATS_PATH, msgspec.json.Decoder(ClusterFigures).decode)
    assert {*(each.id for each in figures.members)} == {"i0", *urls}
    assert len(figures.workers) == 1
