"""Prefill and decode instances that are killed or stopped in the middle of a request."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import save_tiny_tokenizer
from tests.handoff_harness import prompt_of
from tests.tiny_models import Reference, save_tiny_model

# Much longer than anything takes, leases included: a test that gets there has failed.
PATIENCE = 45.0
# Prefilled one token a step, so that there is time to end the instance that does it.
PROMPT = prompt_of(900, seed=1)
SLOW = ("--max-batch-tokens", "1", "--mixed-batch-tokens", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.02)


def get(url: str | urllib.request.Request) -> Any:
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return json.load(answer)


def quiet(instance: Served) -> bool:
    """No sequence, and no block that a sequence or a peer holds."""
    stats = get(f"{instance.url}/stats")
    media = (stats["pool"]["hbm"], stats["pool"]["dram"])
    held = sum(medium["active"] + medium["pinned"] for medium in media)
    return not held + stats["pool"]["matches"] + stats["engine"]["running"]


@dataclass
class Served:
    """A process that serves."""

    process: subprocess.Popen[str]
    url: str

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Processes:
    """Everything is ended with the test."""

    model: Path
    running: list[Served] = field(default_factory=list)

    def start(self, *arguments: str) -> Served:
        options = ("--model", str(self.model), "--served-name", "tiny", "--port", "0")
        process = subprocess.Popen(
            [sys.executable, "-m", "memserve", *arguments, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        served = Served(process, process.stdout.readline().strip())
        self.running.append(served)
        return served

    def instance(self, role: str, *settings: str) -> Served:
        sizes = ("--dtype", "float32", "--threads", "1", "--hbm-blocks", "128")
        return self.start("instance", "--role", role, "--id", role, *sizes, *settings)

    def gateway(self, *instances: Served) -> Served:
        urls = [word for instance in instances for word in ("--instances", instance.url)]
        # By what is faster, tiny prompts would not be handed over.
        gateway = self.start("gateway", *urls, "--policy", "round-robin")
        until(lambda: len(ready(gateway)) == len(instances), "instances that are ready")
        return gateway


def ready(gateway: Served) -> list[str]:
    members = get(f"{gateway.url}/cluster")["instances"]
    return [member["id"] for member in members if member["state"] == "ready"]


@pytest.fixture
def processes(model: Path) -> Iterator[Processes]:
    started = Processes(model)
    yield started
    for served in started.running:
        served.kill()
        assert served.process.stdout is not None
        served.process.stdout.close()


def ask(gateway: Served, prompt: list[int], tokens: int, stream: bool = False) -> Any:
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": stream,
    }
    return urllib.request.Request(
        f"{gateway.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )


def tokens_of(answer: Any) -> list[int]:
    tokens: list[int] = answer["choices"][0]["token_ids"]
    return tokens


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_what_a_lost_prefill_instance_had_is_computed_by_the_decode_instance(
    processes: Processes, model: Path, how: signal.Signals
) -> None:
    prefill, decode = processes.instance("prefill", *SLOW), processes.instance("decode")
    gateway = processes.gateway(prefill, decode)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        answer = pool.submit(get, ask(gateway, PROMPT, 8))
        until(lambda: get(f"{prefill.url}/stats")["engine"]["steps"] > 20, "the prompt at work")
        prefill.process.send_signal(how)
        expected = Reference(model).generate(PROMPT, 8)
        assert tokens_of(answer.result(PATIENCE)) == expected
    until(lambda: quiet(decode), "the end of all leases")
    handoff = get(f"{decode.url}/stats")["handoff"]
    assert (handoff["asked"], handoff["failed"]) == (1, 1)
    until(lambda: ready(gateway) == ["decode"], "the prefill instance's end")
    assert tokens_of(get(ask(gateway, PROMPT[:50], 8)))
    assert get(f"{decode.url}/stats")["handoff"]["asked"] == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_decode_instance_ends_its_streams_and_holds_nothing_elsewhere(
    processes: Processes, model: Path, how: signal.Signals
) -> None:
    prefill, decode = processes.instance("prefill"), processes.instance("decode")
    gateway = processes.gateway(prefill, decode)
    with urllib.request.urlopen(ask(gateway, PROMPT[:50], 950, stream=True)) as stream:
        first = next(line for line in stream if line.startswith(b"data:"))
        assert b"token_ids" in first
        decode.process.send_signal(how)
        events = [line for line in stream if line.startswith(b"data:")]
    error = json.loads(events[-1].removeprefix(b"data:"))["error"]
    assert error["code"] == "instance_lost"
    until(lambda: quiet(prefill), "the end of all leases")
    until(lambda: ready(gateway) == ["prefill"], "the decode instance's end")
    # Roles are soft: who is left does all of it.
    answer = get(ask(gateway, PROMPT[:50], 8))
    assert tokens_of(answer) == Reference(model).generate(PROMPT[:50], 8)
