"""A saturated gateway over HTTP: who waits, who is refused, and what can be seen of routing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import openai
import pytest

from memserve.config import GatewayConfig
from memserve.scheduler.admission import AdmissionLimits
from tests.e2e.conftest import StartCluster
from tests.e2e.test_lifecycle import ASKED, LONG, client_of, completes, send_request
from tests.e2e.test_refusals import Answer, ask
from tests.fakes import FakeCluster, FakeEngine, until
from tests.insider import ask as ask_signed
from tests.insider import told


class Saturated:
    """One request runs, which does not go on until the engine may; one may wait."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        (self.engine,) = cluster.engines
        self.queue = cluster.gateway._router.queue
        self.queue._admission.limits = AdmissionLimits(requests=1, waiting=1)
        before = len(self.engine.submitted)
        self.engine.gate.clear()
        self.running = send_request(cluster.url, ASKED)
        until(lambda: len(self.engine.submitted) == before + 1)

    def until_waiting(self, count: int) -> None:
        until(lambda: self.cluster.call(lambda: self.queue.waiting) == count)

    def nobody_is_left(self) -> bool:
        return self.cluster.call(lambda: not self.queue._tickets and not self.queue._waiters)


@pytest.fixture
def saturated(start_cluster: StartCluster) -> Iterator[Saturated]:
    made = Saturated(start_cluster(FakeEngine(), gateway=GatewayConfig(port=0, drain_seconds=0.1)))
    yield made
    made.running.close()


def test_who_waits_is_answered_and_who_finds_the_queue_full_is_told(saturated: Saturated) -> None:
    cluster = saturated.cluster
    waiting = send_request(cluster.url, ASKED)
    saturated.until_waiting(1)
    with client_of(cluster.url) as client, pytest.raises(openai.RateLimitError) as full:
        # A tenant is who has a key, or a salt; the two before had neither.
        client.completions.create(**ASKED, extra_headers={"Authorization": openai.Omit()})
    assert (full.value.code, full.value.type) == ("queue_full", "rate_limit_error")
    assert int(full.value.response.headers["retry-after"]) >= 1
    assert full.value.response.headers["x-request-id"]
    others = [
        send_request(cluster.url, {**ASKED, "cache_salt": "salt"}),
        send_request(cluster.url, ASKED, "authorization: Bearer key\r\n"),
    ]
    saturated.until_waiting(3)
    saturated.engine.gate.set()
    for connection in (waiting, *others):
        assert connection.recv(4096).split(b" ", 2)[1] == b"200"
        connection.close()
    until(saturated.nobody_is_left)


def test_a_client_that_leaves_while_it_waits_makes_room(saturated: Saturated) -> None:
    cluster = saturated.cluster
    waiting = send_request(cluster.url, LONG)
    saturated.until_waiting(1)
    waiting.close()
    saturated.until_waiting(0)
    text = ask(cluster.url, "/metrics", method="GET").text.decode()
    assert 'status="499"} ' in text
    saturated.engine.gate.set()
    assert completes(cluster.url)
    assert len(saturated.engine.submitted) == 3  # with the self-test: none that nobody wanted
    until(saturated.nobody_is_left)


def test_a_gateway_that_ends_tells_those_who_wait(saturated: Saturated) -> None:
    waiting = send_request(saturated.cluster.url, ASKED)
    saturated.until_waiting(1)
    saturated.cluster.drain_gateway()
    answer = waiting.recv(4096)
    assert answer.split(b" ", 2)[1] == b"503"
    assert b'"code":"gateway_stopping"' in answer
    waiting.close()


@pytest.mark.parametrize("n", ["x", "-1", "1.5", "", "9" * 5000])
def test_a_number_of_decisions_that_is_none_is_refused(start_cluster: StartCluster, n: str) -> None:
    answer = Answer(ask_signed(start_cluster().url, f"/cluster/decisions?n={n}"))
    assert answer.status == 400
    assert (answer.error["type"], answer.error["param"]) == ("invalid_request_error", "n")
    assert "'n'" in answer.error["message"]


def test_decisions_are_shown_newest_first(start_cluster: StartCluster) -> None:
    cluster = start_cluster(FakeEngine(), FakeEngine())
    assert told(cluster.url, "/cluster/decisions") == (200, [])
    ids = []
    for _ in range(3):
        answer = ask(cluster.url, "/v1/completions", json.dumps(ASKED))
        ids.append(json.loads(answer.text)["id"])
    _, decisions = told(cluster.url, "/cluster/decisions?n=2")
    assert [decision["request"] for decision in decisions] == ids[:0:-1]
    for decision in decisions:
        assert decision["policy"] == "prompt-tree"
        assert decision["considered"] == len(decision["candidates"]) == 2
        assert decision["chosen"] in decision["candidates"]
        assert decision["chosen"]["prompt_tokens"] == 3
        assert decision["chosen"]["terms"]["prefill"] > 0
    assert told(cluster.url, "/cluster/decisions?n=0") == (200, [])
    assert len(told(cluster.url, "/cluster/decisions?n=100000")[1]) == 3


def test_metrics_tell_of_routing(start_cluster: StartCluster) -> None:
    cluster = start_cluster(FakeEngine())
    assert completes(cluster.url)
    text = ask(cluster.url, "/metrics", method="GET").text.decode()
    for line in (
        'memserve_scheduler_plans_total{policy="prompt-tree",plan="alone"} 1.0',
        "memserve_scheduler_prompt_tokens_total 3.0",
        "memserve_scheduler_predicted_first_token_seconds_count 1.0",
        "memserve_requests_waiting 0.0",
        "memserve_prompt_tree_instances 0.0",  # a fake engine publishes nothing
        'memserve_kv_feed_synchronised{instance_id="i0"} 0.0',
        'memserve_kv_feed_recoveries_total{instance_id="i0",how="snapshot"} 0.0',
    ):
        assert line in text.splitlines(), line


@pytest.mark.parametrize("access_log", [True, False])
def test_each_request_is_one_line_that_says_why_it_went_there(
    start_cluster: StartCluster, caplog: pytest.LogCaptureFixture, access_log: bool
) -> None:
    caplog.set_level(logging.INFO)
    cluster = start_cluster(FakeEngine(), gateway=GatewayConfig(port=0, access_log=access_log))
    caplog.clear()
    body = json.dumps(ASKED)
    answer = ask(cluster.url, "/v1/completions", body, **{"X-Request-Id": "mine\tand 'x'" * 99})
    call = json.loads(answer.text)["id"]
    ask(cluster.url, "/v1/completions", "{")
    until(lambda: cluster.call(lambda: cluster.gateway._app._metrics.running) == 0)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("memserve.gateway")]
    if not access_log:
        assert lines == []
        return
    good, bad = lines
    assert good.startswith("/v1/completions request=mine\\tand 'x'mine")
    assert f" call={call} instance=i0 status=200 prompt_tokens=3 first=- total=" in good
    assert " plan=i0, 0 of 3 tokens cached, first token in 0." in good
    assert good.endswith("(prompt-tree, 1 candidates)")
    assert len(good) < 700
    assert bad.startswith("/v1/completions request=- call=- instance=- status=400 prompt_tokens=-")
    assert " reason=invalid_json: " in bad
