"""`vllm_url`: a server that somebody else has started, as a member."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes import MODEL, save_tiny_tokenizer, until
from tests.insider import ask

KEY = "a key of vLLM's"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 320, "eos_token_id": 1}')
    return tmp_path


@contextmanager
def running(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    places = [os.environ.get("PYTHONPATH", ""), str(Path.cwd())]
    process = subprocess.Popen(
        (sys.executable, "-m", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), **environment},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def instance(model: Path, url: str, *more: str) -> tuple[str, ...]:
    command = ("memserve", "instance", "--engine", "vllm", "--vllm-url", url)
    return (*command, "--model", str(model), "--served-name", MODEL, *more)


def test_it_serves_through_a_server_that_wants_a_key_and_follows_its_events(model: Path) -> None:
    with running("tests.fake_vllm", "--port", "0", "--api-key", KEY) as server:
        url, events = first_line(server).split()
        told = ("--vllm-events", events)
        with running(*instance(model, url, *told), VLLM_API_KEY=KEY) as process:
            address = first_line(process)
            until(lambda: ask(address, "/info").json["state"] == "ready")
            info = ask(address, "/info").json
            assert (info["kind"], info["pool"]) == ("vllm", False)
            assert info["kv_events"]["secured"] is True
            assert info["kv_events"]["snapshot"] is False
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 0
        assert server.poll() is None  # it is not ours to end


def test_it_waits_for_a_server_until_it_is_asked_to_end(model: Path) -> None:
    with running(*instance(model, "http://127.0.0.1:9")) as process:
        address = first_line(process)
        until(lambda: ask(address, "/info").json["state"] == "starting")
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0


def test_one_that_goes_away_ends_the_instance(model: Path) -> None:
    with running("tests.fake_vllm", "--port", "0") as server:
        url, _ = first_line(server).split()
        with running(*instance(model, url)) as process:
            address = first_line(process)
            until(lambda: ask(address, "/info").json["state"] == "ready")
            server.kill()
            assert process.wait() == 1  # whoever supervises it starts it again
