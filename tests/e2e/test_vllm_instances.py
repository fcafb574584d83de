"""`engine = "vllm"`: servers that `memserve up` starts, with no model in them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import openai
import psutil
import pytest

from memserve.api.serving import Shutdown
from memserve.api.status import InstanceState
from memserve.cluster.client import ClusterClient
from memserve.cluster.cluster import Cluster
from memserve.cluster.local import LocalBackend
from memserve.cluster.member import ClusterView
from memserve.cluster.restarts import RestartLimits
from memserve.config import ClusterConfig, GatewayConfig, InstanceConfig, ModelConfig
from tests.fake_vllm import BLOCK, SETTINGS_VARIABLE, expected
from tests.fakes import MODEL, save_tiny_tokenizer, until

T = TypeVar("T")
PROMPT = list(range(10, 40))
COMMAND = (sys.executable, "-m", "tests.fake_vllm")


class Up:
    """Two vLLM servers and a gateway, on an event loop of its own."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory = directory
        self.said: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        instance = InstanceConfig(engine="vllm", vllm_command=COMMAND, count=2)
        config = ClusterConfig(
            model=ModelConfig(path=str(directory), served_name=MODEL),
            gateway=GatewayConfig(port=0),
            instance=(instance,),
        )
        limits = RestartLimits(first_pause=0.01, longest_pause=0.05)
        backend = LocalBackend(config, self.said.append, limits=limits)
        self.cluster = Cluster(config, backend, Shutdown(), self.said.append)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def begin(self) -> None:
        self._thread.start()
        self.run(self.cluster.start())
        self._client = ClusterClient(self.cluster.url)
        self.run(self._client.__aenter__())
        self.cluster.show_output(self.said.append)
        self._supervising = asyncio.run_coroutine_threadsafe(self.cluster.supervise(), self._loop)

    def end(self) -> None:
        self._supervising.cancel()
        self.run(self._client.__aexit__(None, None, None))
        self.run(self.cluster.stop())
        self.run(asyncio.sleep(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def view(self) -> ClusterView:
        return self.run(self._client.view())

    def ready(self) -> dict[str, int | None]:
        members = self.view().instances
        return {m.id: m.pid for m in members if m.state is InstanceState.READY}

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.cluster.url}/v1", api_key="none", max_retries=0)

    def complete(self, prompt: list[int], tokens: int = 6, **more: Any) -> tuple[list[int], int]:
        """The answer's token ids, and how much of the prompt was cached."""
        with self.client() as client:
            done = client.completions.create(
                model=MODEL,
                prompt=prompt,
                max_tokens=tokens,
                temperature=0,
                extra_body={"return_token_ids": True, **more},
            )
        assert done.usage is not None
        details = done.usage.prompt_tokens_details
        cached = 0 if details is None else details.cached_tokens or 0
        return done.choices[0].token_ids, cached  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_tokenizer(directory)
    (directory / "config.json").write_text('{"vocab_size": 320, "eos_token_id": 1}')
    settings = {
        "told": str(directory / "told"),
        "prompt_token_seconds": 0.001,
        "die_after": 100,
        "once": str(directory / "died"),
    }
    running = Up(directory, settings)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(SETTINGS_VARIABLE, json.dumps(settings))
        paths = [os.environ.get("PYTHONPATH", ""), str(Path.cwd())]
        environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        running.begin()
        yield running
        told = json.loads((directory / "told").read_text())
        running.end()
    assert not psutil.pid_exists(told["pid"])
    assert not _runs(told["engine"])


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_members_are_shown_as_what_they_are(up: Up) -> None:
    assert [(m.kind, m.pool) for m in up.view().instances] == [("vllm", False)] * 2


def test_a_server_is_told_what_it_needs_and_no_secret(up: Up) -> None:
    told = json.loads((up.directory / "told").read_text())
    assert told["secret"] is None
    arguments = told["args"]
    assert arguments[arguments.index("--model") + 1] == str(up.directory.resolve())
    assert arguments[arguments.index("--served-model-name") + 1] == MODEL
    # Nobody but this user reaches it.
    directory = Path(arguments[arguments.index("--uds") + 1]).parent
    assert directory.stat().st_mode & 0o077 == 0


def test_answers_are_right_and_go_where_their_prefix_is(up: Up) -> None:
    for first in range(50, 54):  # so that both have something
        prompt = [first, *range(2, 194)]
        whole = len(prompt) // BLOCK * BLOCK
        assert up.complete(prompt) == (expected(prompt, 6), 0)

        def stays(prompt: list[int] = prompt, whole: int = whole) -> bool:
            return [up.complete(prompt)[1] for _ in range(4)] == [whole] * 4

        until(stays)  # a member that others slow down just then may look slower than a prefix helps


def test_salts_keep_prompts_apart(up: Up) -> None:
    prompt = [99, *PROMPT]
    assert up.complete(prompt, cache_salt="one")[1] == 0
    until(lambda: up.complete(prompt, cache_salt="one")[1] == BLOCK)
    assert up.complete(prompt, cache_salt="two")[1] == 0


def test_a_stream_goes_on_when_its_server_dies(up: Up) -> None:
    before = up.ready()
    with up.client() as client:
        chunks = list(
            client.completions.create(
                model=MODEL,
                prompt=PROMPT,
                max_tokens=150,
                temperature=0,
                stream=True,
                extra_body={"return_token_ids": True},
            )
        )
    tokens = [token for chunk in chunks for token in chunk.choices[0].token_ids]  # type: ignore[attr-defined]
    assert (up.directory / "died").exists()
    assert tokens == expected(PROMPT, 150)
    assert chunks[-1].choices[0].finish_reason == "length"
    # The instance ends with its server, and both come back.
    until(lambda: len(up.ready()) == 2 and up.ready() != before)
    until(lambda: any("ended with exit code 1; starting it again" in line for line in up.said))


def test_a_killed_instance_takes_its_server_with_it(up: Up) -> None:
    until(lambda: len(up.ready()) == 2)
    before = up.ready()
    pid = next(iter(before.values()))
    assert pid is not None
    (server,) = (c for c in psutil.Process(pid).children() if "--uds" in c.cmdline())
    processes = [server, *server.children(recursive=True)]
    assert len(processes) == 3  # the server, its guard, and an engine that takes no SIGTERM
    directory = Path(server.cmdline()[server.cmdline().index("--uds") + 1]).parent
    os.kill(pid, signal.SIGKILL)
    until(lambda: not directory.exists())
    until(lambda: not any(_runs(process.pid) for process in processes))
    until(lambda: len(up.ready()) == 2 and up.ready() != before)
    assert up.complete(PROMPT)[0] == expected(PROMPT, 6)
