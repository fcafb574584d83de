"""Clients that leave, queues that fill, instances that go away, and orderly ends."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from memserve.api.status import InstanceState
from memserve.config import GatewayConfig
from tests.e2e.conftest import Served, StartCluster
from tests.fakes import MODEL, FakeCluster, FakeEngine, metric, until
from tests.insider import told

Spawn = Callable[..., Served]
ASKED: dict[str, Any] = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 8}
LONG: dict[str, Any] = {**ASKED, "max_tokens": 200}


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def get(url: str, path: str, method: str = "GET") -> tuple[int, Any]:
    status, body = told(url, path, method=method)
    return status, body


def completes(url: str) -> bool:
    with client_of(url) as client:
        answer = client.completions.create(**ASKED)
        return bool(answer.choices[0].finish_reason == "length")


def send_request(url: str, asked: dict[str, Any], headers: str = "") -> socket.socket:
    """A connection on which a request is under way."""
    host, port = urlsplit(url).netloc.split(":")
    body = json.dumps(asked).encode()
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    connection.sendall(f"{head}{headers}\r\n".encode() + body)
    return connection


def test_a_client_that_leaves_while_streaming_cancels_within_a_step(
    start_cluster: StartCluster,
) -> None:
    engine = FakeEngine(step_seconds=0.05)
    cluster = start_cluster(engine)
    with client_of(cluster.url) as client:
        stream = client.completions.create(**LONG, stream=True)
        next(iter(stream))
        engine.gate.clear()  # not one step more
        stream.close()
    until(lambda: engine.cancels == [engine.submitted[-1].id])


def test_a_client_that_leaves_before_the_first_token_cancels_every_sample(
    start_cluster: StartCluster,
) -> None:
    engine = FakeEngine()
    cluster = start_cluster(engine)
    engine.gate.clear()
    connection = send_request(cluster.url, {**LONG, "prompt": ["a", "b"], "n": 2})
    until(lambda: len(engine.submitted) == 5)  # the first one was the self-test
    connection.close()
    until(lambda: set(engine.cancels) == {request.id for request in engine.submitted[1:]})
    engine.gate.set()
    assert completes(cluster.url)


def test_a_full_queue_is_told_with_a_time_to_come_back(start_cluster: StartCluster) -> None:
    engine = FakeEngine(max_waiting=1, max_running=1)
    cluster = start_cluster(engine)
    engine.gate.clear()
    waiting = send_request(cluster.url, LONG)
    until(lambda: engine.stats().waiting == 1)
    with client_of(cluster.url) as client:
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(**ASKED)
        assert full.value.code == "queue_full"
        assert int(full.value.response.headers["retry-after"]) >= 1
        # More than the queue could ever hold is not a matter of time.
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**ASKED, n=2)
    engine.gate.set()
    waiting.close()
    assert completes(cluster.url)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_s_error_reaches_the_client(start_cluster: StartCluster, stream: bool) -> None:
    engine = FakeEngine()
    cluster = start_cluster(engine)
    engine.fails = "the device is on fire"
    with client_of(cluster.url) as client:
        with pytest.raises(openai.InternalServerError, match="on fire"):
            client.completions.create(**ASKED, stream=stream)
        engine.fails = None
        assert completes(cluster.url)


def test_an_engine_s_end_in_mid_stream_reaches_the_client(start_cluster: StartCluster) -> None:
    engine = FakeEngine(step_seconds=0.01)
    cluster = start_cluster(engine)
    with client_of(cluster.url) as client:
        stream = iter(client.completions.create(**LONG, stream=True))
        next(stream)
        engine.crash()
        with pytest.raises(openai.APIError, match="engine"):
            list(stream)
    until(lambda: cluster.instances[0].state is InstanceState.DEAD)
    assert get(cluster.urls[0], "/health")[0] == 503


def test_a_draining_instance_finishes_what_it_has(start_cluster: StartCluster) -> None:
    first, second = FakeEngine(), FakeEngine()
    cluster = start_cluster(first, second)
    first.gate.clear()
    # Round-robin: one of the two goes to the first instance.
    pending = [send_request(cluster.url, ASKED) for _ in range(2)]
    until(lambda: len(first.submitted) == 2)
    assert get(cluster.urls[0], "/drain", "POST") == (200, get(cluster.urls[0], "/info")[1])
    assert get(cluster.urls[0], "/health")[0] == 503
    # New requests go elsewhere, before the gateway has polled the news and after.
    assert all(completes(cluster.url) for _ in range(3))
    cluster.until_ready(1)
    assert len(first.submitted) == 2
    first.gate.set()
    answers = [connection.recv(4096) for connection in pending]
    assert [answer.split(b" ", 2)[1] for answer in answers] == [b"200", b"200"]
    for connection in pending:
        connection.close()


def test_a_draining_gateway_finishes_what_it_has(start_cluster: StartCluster) -> None:
    engine = FakeEngine(step_seconds=0.01)
    cluster = start_cluster(engine)
    with client_of(cluster.url) as client:
        stream = iter(client.completions.create(**LONG, stream=True))
        next(stream)
        engine.gate.clear()
        cluster.drain_gateway()
        until(lambda: get(cluster.url, "/health")[0] == 503)
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(**ASKED)
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"] == "1"
        assert refused.value.response.headers["connection"] == "close"
        engine.gate.set()
        assert list(stream)[-1].choices[0].finish_reason == "length"


def test_a_gateway_that_cannot_wait_tells_its_clients(start_cluster: StartCluster) -> None:
    engine = FakeEngine(step_seconds=0.01)
    cluster = start_cluster(engine, gateway=GatewayConfig(port=0, drain_seconds=0.1))
    with client_of(cluster.url) as client:
        stream = iter(client.completions.create(**LONG, stream=True))
        next(stream)
        engine.gate.clear()
        cluster.drain_gateway()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
    until(lambda: len(engine.cancels) == 1)


def test_without_an_instance_there_is_a_503(start_cluster: StartCluster) -> None:
    cluster = start_cluster(gateway=GatewayConfig(port=0, instance_wait_seconds=0))
    with client_of(cluster.url) as client, pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(**ASKED)
    assert (refused.value.status_code, refused.value.code) == (503, "no_instance")
    assert refused.value.response.headers["retry-after"] == "1"
    assert get(cluster.url, "/health")[0] == 503


def test_what_comes_before_a_gateway_has_met_its_instances_waits_for_them(
    start_cluster: StartCluster,
) -> None:
    (member,) = get(start_cluster(FakeEngine()).url, "/cluster")[1]["instances"]
    restarted = start_cluster()  # which the instance has yet to join
    with send_request(restarted.url, ASKED) as asked:
        until(lambda: metric(restarted.url, "memserve_requests_running") == 1)
        body = json.dumps({"address": member["address"]})
        assert told(restarted.url, "/cluster/members", body, "POST")[0] == 200
        assert asked.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_leaves_before_there_is_an_instance_is_forgotten(
    start_cluster: StartCluster,
) -> None:
    cluster = start_cluster()
    with send_request(cluster.url, ASKED):
        until(lambda: metric(cluster.url, "memserve_requests_running") == 1)
    until(lambda: metric(cluster.url, "memserve_requests_running") == 0)
    assert metric(cluster.url, "memserve_client_hang_ups_total") == 1


def test_the_cluster_shows_an_instance_that_joins_and_dies(
    start_cluster: StartCluster, spawn: Spawn
) -> None:
    cluster = start_cluster()
    joined = spawn("instance", [cluster.url])
    cluster.until_ready(1)
    assert completes(cluster.url)
    _, view = get(cluster.url, "/cluster")
    (member,) = view["instances"]
    assert (member["id"], member["state"]) == ("spawned", "ready")
    assert (member["address"], member["pid"]) == (joined.url, joined.process.pid)
    joined.process.kill()
    until(lambda: get(cluster.url, "/cluster")[1]["instances"][0]["state"] == "dead")
    assert get(cluster.url, "/cluster")[1]["epoch"] > view["epoch"]


def test_an_instance_joins_several_gateways_and_leaves_them_in_order(
    start_cluster: StartCluster, spawn: Spawn
) -> None:
    gateways = [start_cluster(), start_cluster()]
    joined = spawn("instance", [gateway.url for gateway in gateways])
    for gateway in gateways:
        gateway.until_ready(1)
        assert completes(gateway.url)
    joined.process.send_signal(signal.SIGTERM)
    assert joined.process.wait() == 0
    for gateway in gateways:
        assert get(gateway.url, "/cluster")[1]["instances"] == []


def test_a_name_that_another_instance_has_is_refused(
    start_cluster: StartCluster, spawn: Spawn
) -> None:
    cluster = start_cluster()
    first = spawn("instance", [cluster.url], name="twin")
    cluster.until_ready(1)
    later = spawn("instance", [cluster.url], name="twin")

    def join(epoch: int) -> tuple[int, str | None]:
        body = json.dumps({"address": later.url, "id": "twin", "epoch": epoch})
        status, answer = told(cluster.url, "/cluster/members", body, "POST")
        return status, answer.get("error", {}).get("code")

    def ready() -> list[str]:
        members = get(cluster.url, "/cluster")[1]["instances"]
        return [m["address"] for m in members if m["state"] == "ready"]

    for epoch in (1, (1 << 63) - 1):  # whatever its clock says
        assert join(epoch) == (409, "instance_replaced")
    assert ready() == [first.url]
    assert completes(cluster.url)
    first.process.kill()
    until(lambda: ready() == [later.url])  # it has registered again and again
    assert completes(cluster.url)


def test_a_namesake_that_wakes_up_has_been_replaced(
    start_cluster: StartCluster, spawn: Spawn
) -> None:
    cluster = start_cluster()
    stopped = spawn("instance", [cluster.url], name="twin")
    cluster.until_ready(1)
    epoch = told(stopped.url, "/info")[1]["epoch"]
    stopped.process.send_signal(signal.SIGSTOP)
    try:
        later = spawn("instance", [cluster.url], name="twin")

        def shown() -> list[tuple[str, str]]:
            members = get(cluster.url, "/cluster")[1]["instances"]
            return [(m["address"], m["state"]) for m in members]

        until(lambda: shown() == [(later.url, "ready")])  # once the other one counts as dead
    finally:
        stopped.process.send_signal(signal.SIGCONT)
    body = json.dumps({"address": stopped.url, "id": "twin", "epoch": epoch})
    until(lambda: told(stopped.url, "/info")[1]["state"] == "ready")  # it is awake
    status, answer = told(cluster.url, "/cluster/members", body, "POST")
    assert (status, answer["error"]["code"]) == (409, "instance_replaced")
    assert shown() == [(later.url, "ready")]
    assert completes(cluster.url)


@pytest.fixture
def doomed(start_cluster: StartCluster, spawn: Spawn) -> tuple[FakeCluster, Served]:
    """A gateway in front of one instance, in a process of its own, that is slow."""
    cluster = start_cluster(gateway=GatewayConfig(port=0, instance_wait_seconds=0.5))
    served = spawn("instance", [cluster.url], step_seconds=0.02)
    cluster.until_ready(1)
    return cluster, served


def test_an_instance_s_death_in_mid_stream_is_an_error_in_the_stream(
    doomed: tuple[FakeCluster, Served],
) -> None:
    cluster, served = doomed
    with client_of(cluster.url) as client:
        stream = iter(client.completions.create(**LONG, stream=True))
        next(stream)
        served.process.kill()
        with pytest.raises(openai.APIError) as lost:
            list(stream)
    assert lost.value.code == "instance_lost"


def test_an_instance_that_hangs_in_mid_stream_is_given_up(
    doomed: tuple[FakeCluster, Served],
) -> None:
    cluster, served = doomed
    with client_of(cluster.url) as client:
        stream = iter(client.completions.create(**LONG, stream=True))
        next(stream)
        served.process.send_signal(signal.SIGSTOP)
        with pytest.raises(openai.APIError) as lost:
            list(stream)
    assert lost.value.code == "instance_lost"


def test_an_instance_s_death_before_its_first_byte_is_not_noticed(
    start_cluster: StartCluster, spawn: Spawn
) -> None:
    cluster = start_cluster(FakeEngine())
    served = spawn("instance", [cluster.url], step_seconds=0.05)
    cluster.until_ready(2)
    answers: list[bool] = []
    threads = [
        threading.Thread(target=lambda: answers.append(completes(cluster.url))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    until(lambda: get(served.url, "/stats")[1]["engine"]["running"] == 1)
    served.process.kill()
    for thread in threads:
        thread.join()
    assert answers == [True, True]
