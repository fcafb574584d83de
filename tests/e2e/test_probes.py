"""What a supervisor asks, as Kubernetes does: `/live` fails where only a restart helps, `/ready`
where no new requests should come. A member's loss is neither for anybody else."""

from __future__ import annotations

import http.client
import signal
from collections.abc import Callable
from typing import Any

import openai

from memserve.api.status import InstanceState
from tests.e2e.conftest import Served, StartCluster
from tests.fakes import MODEL, FakeEngine, until
from tests.insider import told

Spawn = Callable[..., Served]
LONG: dict[str, Any] = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 200}


def probe(url: str, path: str) -> int:
    """The status, as strangers get it: probes have no secret."""
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_gateway_stays_ready_without_the_instances_that_it_had(
    start_cluster: StartCluster, spawn: Spawn
) -> None:
    """Its clients' requests wait for them; without any gateway behind their address they could
    not. A gateway that never had one is of no use yet."""
    gateway = start_cluster()
    assert (probe(gateway.url, "/live"), probe(gateway.url, "/ready")) == (200, 503)
    joined = spawn("instance", [gateway.url])
    until(lambda: probe(gateway.url, "/ready") == 200)
    joined.process.kill()
    until(lambda: probe(gateway.url, "/health") == 503)
    assert (probe(gateway.url, "/live"), probe(gateway.url, "/ready")) == (200, 200)


def test_a_draining_gateway_lives_and_is_not_ready(start_cluster: StartCluster) -> None:
    engine = FakeEngine(step_seconds=0.01)
    cluster = start_cluster(engine)
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        stream = iter(client.completions.create(**LONG, stream=True))
        next(stream)
        engine.gate.clear()
        cluster.drain_gateway()
        until(lambda: probe(cluster.url, "/ready") == 503)
        assert probe(cluster.url, "/live") == 200
        engine.gate.set()
        list(stream)


def test_an_instance_that_loads_lives_and_is_not_ready(spawn: Spawn) -> None:
    loading = spawn("instance", step_seconds=3.0)  # it is ready with the first token
    assert (probe(loading.url, "/live"), probe(loading.url, "/ready")) == (200, 503)
    until(lambda: probe(loading.url, "/ready") == 200)
    assert probe(loading.url, "/live") == 200


def test_a_draining_instance_lives_and_is_not_ready(start_cluster: StartCluster) -> None:
    cluster = start_cluster(FakeEngine(), FakeEngine())
    url, other = cluster.urls
    assert told(url, "/drain", method="POST")[0] == 200
    assert (probe(url, "/live"), probe(url, "/ready")) == (200, 503)
    assert (probe(other, "/live"), probe(other, "/ready")) == (200, 200)
    assert told(url, "/resume", method="POST")[0] == 200
    assert probe(url, "/ready") == 200


def test_only_a_dead_engine_s_own_instance_does_not_live(start_cluster: StartCluster) -> None:
    engine = FakeEngine(step_seconds=0.01)
    cluster = start_cluster(engine, FakeEngine())
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        streams = [iter(client.completions.create(**LONG, stream=True)) for _ in range(2)]
        for stream in streams:
            next(stream)
        engine.crash()
        for stream in streams:
            list(stream)  # the other instance goes on
    until(lambda: cluster.instances[0].state is InstanceState.DEAD)
    dead, other = cluster.urls
    assert (probe(dead, "/live"), probe(dead, "/ready")) == (503, 503)
    assert (probe(other, "/live"), probe(other, "/ready")) == (200, 200)
    assert (probe(cluster.url, "/live"), probe(cluster.url, "/ready")) == (200, 200)


def test_instances_live_without_any_gateway(spawn: Spawn, start_cluster: StartCluster) -> None:
    gateway = spawn("gateway")
    instance = spawn("instance", [gateway.url])
    until(lambda: probe(gateway.url, "/ready") == 200)
    gateway.process.send_signal(signal.SIGKILL)
    gateway.process.wait()
    assert (probe(instance.url, "/live"), probe(instance.url, "/ready")) == (200, 200)
