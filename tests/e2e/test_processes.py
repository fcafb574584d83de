"""Instances and gateways as processes: signals, exit codes, the address that they announce."""

from __future__ import annotations

import http.client
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest

from tests.e2e.conftest import Served
from tests.e2e.test_lifecycle import ASKED, LONG, client_of, completes, get
from tests.fakes import until

Spawn = Callable[..., Served]


def wait_until_ready(served: Served) -> None:
    def healthy() -> bool:
        try:
            return get(served.url, "/health")[0] == 200
        except (ConnectionError, http.client.HTTPException):
            return False

    until(healthy)


@pytest.fixture
def pair(spawn: Spawn) -> tuple[Served, Served]:
    """A gateway and its instance."""
    instance = spawn("instance", step_seconds=0.01)
    gateway = spawn("gateway", [instance.url])
    wait_until_ready(instance)
    wait_until_ready(gateway)
    return gateway, instance


@pytest.mark.parametrize("which", [0, 1])
def test_sigterm_lets_a_stream_finish_and_exits_with_0(
    pair: tuple[Served, Served], which: int
) -> None:
    gateway, _ = pair
    with client_of(gateway.url) as client:
        stream = iter(client.completions.create(**LONG, stream=True))
        next(stream)
        pair[which].process.send_signal(signal.SIGTERM)
        until(lambda: get(pair[which].url, "/health")[0] == 503)
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(**ASKED)
        assert refused.value.status_code == 503
        assert list(stream)[-1].choices[0].finish_reason == "length"
    assert pair[which].process.wait() == 0


def test_a_second_signal_ends_an_instance_at_once(pair: tuple[Served, Served]) -> None:
    gateway, instance = pair
    with client_of(gateway.url) as client:
        stream = iter(client.completions.create(**LONG, stream=True))
        next(stream)
        instance.process.send_signal(signal.SIGTERM)
        until(lambda: get(instance.url, "/health")[0] == 503)
        instance.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="stopped"):
            list(stream)
    assert instance.process.wait() == 0


def test_a_gateway_finds_its_instances_again(pair: tuple[Served, Served], spawn: Spawn) -> None:
    gateway, instance = pair
    gateway.process.kill()
    successor = spawn("gateway", [instance.url])
    wait_until_ready(successor)
    assert completes(successor.url)


def test_an_instance_without_a_model_says_so_and_exits_with_1(tokenizer_directory: Path) -> None:
    arguments = ["instance", "x", str(tokenizer_directory), "none"]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.e2e.serve_fake", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "there is no such model" in ended.stderr


def test_a_port_that_is_taken_is_no_traceback(pair: tuple[Served, Served]) -> None:
    _, instance = pair
    port = urlsplit(instance.url).port
    program = (
        "from memserve.config import *\n"
        "from memserve.instance.run import run_instance\n"
        f"exit(run_instance(ClusterConfig(), InstanceConfig(port={port}), 'x'))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "Address already in use" in ended.stderr
    assert "Traceback" not in ended.stderr
