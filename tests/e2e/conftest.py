"""A tokenizer's directory, and clusters and processes that end with their test."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from memserve.config import GatewayConfig, ReasoningParser
from memserve.models.tokenizer import Tokenizer
from tests.fakes import FakeCluster, FakeEngine, save_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_directory)


class StartCluster(Protocol):
    def __call__(
        self,
        *engines: FakeEngine,
        gateway: GatewayConfig | None = None,
        reasoning_parser: ReasoningParser = "auto",
    ) -> FakeCluster: ...


def _starting(tokenizer: Tokenizer) -> Iterator[StartCluster]:
    with ExitStack() as stack:

        def start(
            *engines: FakeEngine,
            gateway: GatewayConfig | None = None,
            reasoning_parser: ReasoningParser = "auto",
        ) -> FakeCluster:
            cluster = FakeCluster(tokenizer, engines, gateway, reasoning_parser=reasoning_parser)
            return stack.enter_context(cluster)

        yield start


@pytest.fixture
def start_cluster(tokenizer: Tokenizer) -> Iterator[StartCluster]:
    yield from _starting(tokenizer)


@pytest.fixture(scope="module")
def start_module_cluster(tokenizer: Tokenizer) -> Iterator[StartCluster]:
    yield from _starting(tokenizer)


@dataclass
class Served:
    """A process that serves."""

    process: subprocess.Popen[str]
    url: str


@pytest.fixture
def spawn(tokenizer_directory: Path) -> Iterator[Callable[..., Served]]:
    """`spawn("instance", engine arguments, gateway's URL or nothing)`, `spawn("gateway", urls)`."""
    processes: list[subprocess.Popen[str]] = []

    def start(
        kind: str,
        urls: Sequence[str] = (),
        name: str = "spawned",
        **engine: object,
    ) -> Served:
        directory = str(tokenizer_directory)
        arguments = [directory] if kind == "gateway" else [name, directory, json.dumps(engine)]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.serve_fake", kind, *arguments, *urls],
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        return Served(process, process.stdout.readline().strip())

    yield start
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
