"""A vLLM with the pool's host memory behind its KV cache: the same tokens as the model's, and what
its own cache has lost comes back from there."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from memserve.hosts import free_port
from memserve.vllm.server import tier_settings
from tests.fakes import metric, save_tiny_tokenizer, until
from tests.tiny_models import Reference, save_tiny_model
from tests.vllm_cluster import (
    BLOCK,
    FORKING,
    MISSING,
    SOURCE,
    START_SECONDS,
    Instances,
    prompt_of,
    segments,
    until_gone,
    up,
)

SHORT = "--max-model-len", "768"
pytestmark = [
    pytest.mark.real_vllm,
    pytest.mark.skipif(MISSING is not None, reason=f"vLLM is {MISSING}, or `make vllm`"),
    pytest.mark.timeout(START_SECONDS + 120),
]


class Server:
    """A vLLM server, and what it says."""

    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self.process = process

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method="POST")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read() or b"null")

    def complete(self, prompt: list[int], tokens: int, salt: str = "") -> tuple[list[int], int]:
        """Tokens, and how many of the prompt were cached, here or in the pool."""
        body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        done = self.post("/v1/completions", body | ({"cache_salt": salt} if salt else {}))
        details = done["usage"]["prompt_tokens_details"] or {}
        return done["choices"][0]["token_ids"], details.get("cached_tokens") or 0

    def hang_up(self, prompt: list[int], after: float) -> None:
        """Ask, and be gone."""
        body = json.dumps({"model": "m", "prompt": prompt, "max_tokens": 60, "ignore_eos": True})
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        head += "content-type: application/json\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2]))) as client:
            client.sendall((head + body).encode())
            time.sleep(after)

    def counted(self, metric: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(metric + "{"))

    def forget(self) -> None:
        """Have vLLM's own cache emptied."""
        self.post("/reset_prefix_cache")


@contextmanager
def serving(model: Path, dram: str, *arguments: str, cores: str = "0") -> Iterator[Server]:
    port = free_port()
    tier = json.dumps(tier_settings(dram))
    command = [*FORKING, "--model", str(model), "--served-model-name", "m"]
    command += ["--dtype", "float32", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--block-size", str(BLOCK)]
    command += ["--enable-prompt-tokens-details", "--kv-transfer-config", tier, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "VLLM_SERVER_DEV_MODE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL
    )
    try:
        server = Server(f"http://127.0.0.1:{port}", process)

        def healthy() -> bool:
            assert process.poll() is None, "it ended while it started"
            try:
                with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                    return True
            except OSError:
                return False

        until(healthy)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module", params=["qwen3", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model(request.param, tmp_path_factory.mktemp("model"))
    save_tiny_tokenizer(directory)
    return directory


def talk(server: Server, reference: Reference, seed: int) -> list[int]:
    """Three turns of a chat, each from the pool; what was cached of each."""
    history, cached = prompt_of(seed, 150), []
    for turn in range(3):
        wanted = reference.generate(history, 40)
        server.forget()
        tokens, found = server.complete(history, 40)
        assert tokens == wanted
        cached.append(found)
        history = history + wanted + prompt_of(seed + turn + 1, 20)
    return cached


def test_a_chat_goes_on_from_the_pool_when_vllm_has_forgotten_it(model: Path) -> None:
    """With full attention, and with sliding windows beside it."""
    reference = Reference(model)
    with serving(model, "16MiB", "--kv-cache-memory-bytes", "67108864") as server:
        assert talk(server, reference, 1) == [0, 160, 224]
        server.forget()
        assert server.complete(prompt_of(1, 150), 1, "tenant")[1] == 0
        assert server.complete(prompt_of(1, 150), 1)[1] == 128


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("qwen3", tmp_path_factory.mktemp("model"))
    save_tiny_tokenizer(directory)
    return directory


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
def test_two_tensor_parallel_ranks_copy_their_halves(qwen3: Path) -> None:
    arguments = "--tensor-parallel-size", "2", "--kv-cache-memory-bytes", "67108864"
    cores = "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    with serving(qwen3, "16MiB", *arguments, cores=cores) as server:
        assert talk(server, Reference(qwen3), 1) == [0, 160, 224]


def test_tokens_are_right_when_neither_memory_is_large_enough(qwen3: Path) -> None:
    """Preemptions, evictions from both, and clients that hang up."""
    rng, reference = random.Random(3), Reference(qwen3)
    stems = [prompt_of(50 + n, rng.randrange(60, 300)) for n in range(6)]
    work = [
        (rng.choice(stems) + prompt_of(200 + n, rng.randrange(1, 120)), rng.randrange(1, 60))
        for n in range(40)
    ]
    wanted = [reference.generate(*one) for one in work]
    small = "--kv-cache-memory-bytes", "1500000", *SHORT
    with serving(qwen3, "3MiB", *small, "--max-num-batched-tokens", "128") as server:
        for turn in range(2):
            leaving = [
                threading.Thread(target=server.hang_up, args=(prompt, 0.01 * n))
                for n, (prompt, _) in enumerate(random.Random(turn).sample(work, 15))
            ]
            for thread in leaving:
                thread.start()
            with ThreadPoolExecutor(8) as clients:
                got = list(clients.map(lambda one: server.complete(*one)[0], work))
            for thread in leaving:
                thread.join()
            assert got == wanted
            server.forget()
        assert server.counted("vllm:external_prefix_cache_hits_total") > 0
        assert server.counted("vllm:num_preemptions_total") > 0


def test_an_instance_with_dram_has_it_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    """A prompt comes back after others have pushed it out of vLLM's own cache."""
    least = "3000000" if model.name == "gemma3" else "1500000"  # that vLLM starts with
    small = Instances("dram = '16MiB'", ("--kv-cache-memory-bytes", least, *SHORT))
    with up(model, tmp_path, small) as cluster:
        reference = Reference(model)
        cached = 0
        for seed in (1, 2, 3, 1):
            answer = cluster.complete(prompt_of(seed, 500), 8)
            assert answer.tokens == reference.generate(prompt_of(seed, 500), 8)
            cached = answer.cached
        assert cached == 480

        def known() -> float:
            """Prompt tokens that the plan of a request counted as cached, when vLLM's own cache
            had lost them."""
            for seed in (2, 3):
                cluster.complete(prompt_of(seed, 500), 1)
            before = metric(cluster.url, "memserve_scheduler_cached_tokens_total")
            cluster.complete(prompt_of(1, 500), 1)
            return metric(cluster.url, "memserve_scheduler_cached_tokens_total") - before

        # The gateway gets to know, since the pool's events are among vLLM's.
        until(lambda: known() >= 480)
        held = segments()
        assert held
    until_gone(held)
