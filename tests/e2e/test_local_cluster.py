"""`memserve up` as a person runs it: it serves, and whatever ends it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import openai
import psutil
import pytest

from tests.fakes import metric, save_tiny_tokenizer, until
from tests.tiny_models import save_tiny_model

# Failures take this long to be noticed; nothing that works comes near it.
DEADLINE = 60.0
MEMORY = ["--port", "0", "--hbm-blocks", "64", "--dram-blocks", "8", "--dtype", "float32"]
SMALL = [*MEMORY, "--role", "colocated"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


@dataclass
class Up:
    """A running `memserve up` and everything it started."""

    process: subprocess.Popen[str]
    url: str
    family: list[psutil.Process]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def child(self, command: str) -> psutil.Process:
        return next(p for p in self.family if command in p.cmdline())

    def end(self) -> tuple[int, str]:
        """Wait for its end; exit code and standard error."""
        _, errors = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, errors

    def assert_nothing_is_left(self) -> None:
        _, alive = psutil.wait_procs(self.family, timeout=DEADLINE)
        assert not alive
        assert not self.segments()

    def segments(self) -> list[str]:
        """Shared memory of the processes that were there at first."""
        pids = {str(process.pid) for process in self.family}
        return [
            p.name for p in Path("/dev/shm").glob("memserve-*") if pids & set(p.name.split("-"))
        ]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "memserve", "up", "--no-dashboard", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def serving(process: subprocess.Popen[str]) -> Iterator[Up]:
    family: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if " on http://" in line), None)
        assert line is not None, process.communicate()
        url = line.partition(" on ")[2].partition(";")[0]
        family = psutil.Process(process.pid).children(recursive=True)
        yield Up(process, url, family)
    finally:
        process.kill()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()


@pytest.fixture
def up(model: Path) -> Iterator[Up]:
    with serving(start("--model", str(model), "--served-name", "tiny", *SMALL)) as running:
        yield running


class Collected:
    """Reads what a process prints, so that it never waits for somebody to."""

    def __init__(self, stream: IO[str] | None) -> None:
        assert stream is not None
        self._stream = stream
        self._lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def text(self) -> str:
        return "".join(self._lines)

    def _read(self) -> None:
        for line in self._stream:
            self._lines.append(line)


def test_it_serves_and_ctrl_c_lets_running_requests_finish_and_leaves_nothing(up: Up) -> None:
    client = up.client()
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "quick"}], max_tokens=5
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 5

    stream = client.completions.create(
        model="tiny",
        prompt="the lazy dog",
        max_tokens=100,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    next(stream)
    up.process.send_signal(signal.SIGINT)
    last = list(stream)[-1]
    assert last.usage is not None
    assert last.usage.completion_tokens == 100

    code, errors = up.end()
    assert code == 0, errors
    up.assert_nothing_is_left()


def test_killing_the_parent_leaves_nothing(up: Up) -> None:
    up.process.kill()
    up.assert_nothing_is_left()


def test_what_is_killed_comes_back_and_its_memory_is_not_left(up: Up) -> None:
    errors = Collected(up.process.stderr)
    instance, gateway = up.child("instance"), up.child("gateway")
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": [3, 4, 5],
        "max_tokens": 2,
        "temperature": 0,
    }
    before = up.client().completions.create(**asked)
    instance.kill()
    gateway.kill()

    def answers() -> bool:
        try:
            return up.client().completions.create(**asked).choices == before.choices
        except openai.APIError:
            return False

    until(answers)  # at the same address
    for name in ("gateway", "colocated-0"):
        assert f"{name} ended with signal SIGKILL; starting it again" in errors.text()
    assert not up.segments()
    up.family += psutil.Process(up.process.pid).children(recursive=True)
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(timeout=DEADLINE) == 0
    up.assert_nothing_is_left()


def test_a_stream_goes_on_when_the_only_instance_is_back(up: Up) -> None:
    errors = Collected(up.process.stderr)
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": [3, 4, 5],
        "max_tokens": 900,
        "temperature": 0,
        "stream": True,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }

    def ids(chunk: Any) -> list[int]:
        return [token for choice in chunk.choices for token in choice.token_ids or ()]

    undisturbed = [
        token for chunk in up.client().completions.create(**asked) for token in ids(chunk)
    ]
    stream = iter(up.client().completions.create(**asked))
    heard = ids(next(stream))
    up.child("instance").kill()
    heard += [token for chunk in stream for token in ids(chunk)]
    assert len(heard) == 900
    assert heard == undisturbed
    assert metric(up.url, "memserve_failovers_total") == 1
    assert "ended with signal SIGKILL; starting it again" in errors.text()
    up.family += psutil.Process(up.process.pid).children(recursive=True)


def test_without_a_file_it_is_one_prefill_and_one_decode_instance(model: Path) -> None:
    process = start("--model", str(model), "--served-name", "tiny", *MEMORY)
    with serving(process) as up:
        asked = {"model": "tiny", "prompt": list(range(3, 40)), "max_tokens": 4}
        answer = up.client().completions.create(**asked)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4
        listed = subprocess.run(
            [sys.executable, "-m", "memserve", "cluster", "list", "--url", up.url, "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        view = json.loads(listed.stdout)
        members = sorted((m["id"], m["role"], m["state"]) for m in view["instances"])
        assert members == [
            ("decode-1", "decode", "ready"),
            ("prefill-0", "prefill", "ready"),
        ]


def test_a_model_that_does_not_load_ends_the_start_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_tiny_tokenizer(tmp_path)
    process = start("--model", str(tmp_path), *SMALL)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert "colocated-0 ended with exit code 1" in errors
    assert "safetensors" in errors


def test_a_port_that_is_taken_is_named(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = start("--model", str(model), *SMALL, "--port", port)
        _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert f"{port}: Address already in use" in errors


def test_ctrl_c_while_starting_leaves_nothing(model: Path) -> None:
    process = start("--model", str(model), *SMALL)
    assert process.stderr is not None
    next(line for line in process.stderr if "loading" in line)
    family = psutil.Process(process.pid).children(recursive=True)
    drained = threading.Thread(target=process.stderr.read)
    process.send_signal(signal.SIGINT)
    drained.start()
    assert process.wait(timeout=DEADLINE) == 0
    drained.join()
    Up(process, "", family).assert_nothing_is_left()
