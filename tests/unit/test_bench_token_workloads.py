"""`memserve bench serve` with prompts of token ids: they are the served model's, and a run without
an answer is a failure."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memserve.bench.measure import BenchmarkError
from memserve.cli import app
from tests.fakes import save_tiny_tokenizer
from tests.tiny_models import save_tiny_model

CHUNK = {"choices": [{"text": "a", "token_ids": [1]}], "usage": {"completion_tokens": 1}}


class Server(ThreadingHTTPServer):
    """Answers completions whose token ids its vocabulary has; 400 for others."""

    def __init__(self, vocabulary: int, told: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.vocabulary = vocabulary
        self.told = told
        self.refused = 0  # first requests that are refused whatever they ask
        self.highest: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        card: dict[str, object] = {"id": "m"}
        if self.server.told:
            card["vocab_size"] = self.server.vocabulary
        self._send(200, json.dumps({"data": [card]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.highest.append(max(body["prompt"]))
        early = len(self.server.highest) <= self.server.refused
        if early or self.server.highest[-1] >= self.server.vocabulary:
            self._send(400, json.dumps({"error": {"message": "no such token"}}).encode())
        else:
            self._send(200, f"data: {json.dumps(CHUNK)}\n\ndata: [DONE]\n\n".encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("model"))
    save_tiny_tokenizer(directory)
    return directory


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": at, "input_length": 1000, "output_length": 9, "hash_ids": [0, 10**15 + at]}
        for at in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def serve() -> Iterator[type[Server]]:
    started: list[Server] = []

    class Started(Server):
        def __init__(self, vocabulary: int, told: bool = True) -> None:
            super().__init__(vocabulary, told)
            started.append(self)
            threading.Thread(target=self.serve_forever, daemon=True).start()

    yield Started
    for one in started:
        one.shutdown()
        one.server_close()


def measured(server: Server, *flags: str) -> dict[str, int]:
    command = ["bench", "serve", "--url", server.url, "--rate", "1000", "--sessions", "4"]
    result = CliRunner().invoke(app, [*command, "--warm-up", "0", "--json", "-", *flags])
    if result.exception is not None:
        raise result.exception
    summary: dict[str, int] = json.loads(result.stdout)["result"]["runs"][0]["summary"]
    return summary


@pytest.mark.parametrize("workload", ["trace", "synthetic"])
def test_token_ids_are_the_served_models(
    serve: type[Server], trace: Path, model: Path, workload: str
) -> None:
    server = serve(61, True)
    flags = ("--workload", workload, "--data", str(trace), "--model", str(model))
    summary = measured(server, *flags)
    assert (summary["requests"], summary["failed"]) == (4, 0)
    assert 30 < max(server.highest) < 61
    # An option counts, and so does the model that is named, where the server tells nothing.
    with pytest.raises(BenchmarkError, match="all 4 requests failed: HTTP 400: no such token"):
        measured(server, *flags, "--vocabulary", "5000")
    silent = serve(512, False)
    assert measured(silent, *flags)["failed"] == 0


def test_some_failures_are_counted_and_are_no_failure_of_the_run(
    serve: type[Server], model: Path
) -> None:
    server = serve(61, True)
    server.refused = 3
    summary = measured(server, "--workload", "synthetic", "--model", str(model))
    assert (summary["requests"], summary["failed"]) == (4, 3)
