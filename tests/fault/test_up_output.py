"""`memserve up` whose output nobody takes: what it started serves all the same."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.fakes import MODEL, save_tiny_tokenizer

# The log of so many requests is more than all pipes and buffers on its way hold.
REQUESTS = 1500
PATIENCE = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_tokenizer(directory)
    (directory / "config.json").write_text("{}")
    return directory


@contextmanager
def up(model: Path, stderr: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parents[2])]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.e2e.fake_memserve",
            "up",
            "--no-dashboard",
            "--model",
            str(model),
            "--served-name",
            MODEL,
            "--role",
            "colocated",
            "--port",
            "0",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = next(line for line in process.stdout if " on http://" in line)
        yield process, line.partition(" on ")[2].partition(";")[0]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(url: str, times: int) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    body = json.dumps({"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 1})
    for _ in range(times):
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
    connection.close()


def test_a_log_that_nobody_reads_stops_nobody(model: Path) -> None:
    reader, writer = os.pipe()
    with up(model, writer) as (process, url):
        ask(url, REQUESTS)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    os.close(reader)
    os.close(writer)


def test_a_log_on_a_full_disk_stops_nobody(model: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with up(model, full) as (process, url):
        ask(url, 20)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    os.close(full)
