"""What a new user does first: start a cluster, look at it, ask it, find it, read its log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import save_tiny_tokenizer
from tests.tiny_models import save_tiny_model

DEADLINE = 120.0
SMALL = ("--port", "0", "--role", "colocated", "--hbm-blocks", "64", "--dram-blocks", "8",
         "--dtype", "float32", "--served-name", "tiny", "--profile", "off")  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "MEMSERVE_RUNTIME_DIR": str(tmp_path / "runtime")}


@contextmanager
def up(environment: dict[str, str], *flags: str, errors: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "memserve", "up", "--no-dashboard", *flags]
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def memserve(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "memserve", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=DEADLINE,
        check=False,
    )


def post(url: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
        return json.load(answer)


def test_a_cluster_is_found_and_its_log_is_json(
    model: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    errors = tmp_path / "errors"
    flags = ("--model", str(model), *SMALL, "--log-format", "json")
    with up(environment, *flags, errors=errors) as process:

        def lines() -> list[dict[str, Any]]:
            return [json.loads(line) for line in errors.read_text().splitlines()]

        serves = until_said(process, errors, '"memserve serves tiny on ')
        url = json.loads(serves)["message"].rpartition(" ")[2]
        listed = memserve(environment, "cluster", "list", "--json")
        assert listed.returncode == 0, listed.stderr
        (member,) = json.loads(listed.stdout)["instances"]
        assert member["state"] == "ready"
        elsewhere = {**environment, "MEMSERVE_RUNTIME_DIR": str(tmp_path / "other")}
        assert memserve(elsewhere, "cluster", "list", "--url", url).returncode == 1  # no secret

        # A chat of a model without a template: 5 is asked for, else what stands for its end.
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
        assert post(f"{url}/v1/chat/completions", chat)["usage"]["completion_tokens"] <= 5
        with pytest.raises(urllib.error.HTTPError):
            post(f"{url}/v1/completions", {"prompt": "a", "max_tokens": 10**6})

        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=DEADLINE)
        assert (process.returncode, out) == (0, "")
    asked = [line for line in lines() if "path" in line]
    assert [line["status"] for line in asked] == [200, 400]
    assert asked[0]["process"] == asked[1]["process"] == "gateway"
    assert asked[0]["prompt_tokens"] > 0
    assert asked[1]["reason_code"] == "context_length_exceeded"
    assert {line.get("process") for line in lines()} == {None, "gateway", "colocated-0"}
    assert not list((tmp_path / "runtime").glob("gateway-*"))


def until_said(process: subprocess.Popen[str], errors: Path, what: str) -> str:
    """The line of standard error that has `what`."""
    for _ in range(int(DEADLINE * 20)):
        for line in errors.read_text().splitlines():
            if what in line:
                return line
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
            break
    raise AssertionError(errors.read_text())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--dram-blocks", "2000000000"), "not enough memory: "),
        (("--dram", "98%", "--hbm", "98%"), "not enough memory: "),
        (("--cpus", "0,4095"), "instance.cpus = [0, 4095]: this process may not use 4095"),
        (("--device", "cuda:99"), "model.device = 'cuda:99': PyTorch finds"),
        (("--chat-template", "/no/such"), "gateway.chat_template = '/no/such': No such file"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_anything_is_loaded(
    model: Path, environment: dict[str, str], flags: tuple[str, ...], said: str
) -> None:
    done = memserve(environment, "up", "--no-dashboard", "--model", str(model), *SMALL, *flags)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"memserve: {said}")
    assert "loading" not in done.stderr
    assert "Traceback" not in done.stderr
