"""A cluster of vLLM servers, with a tiny model: `memserve up` as a user has it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memserve
from memserve.bench.peers.places import ROOT, python_of, why_missing
from tests.fakes import url_told

PYTHON, MISSING = python_of("vllm", ROOT), why_missing("vllm", ROOT)
# A server takes half a minute to start, and minutes where the machine has other work.
START_SECONDS = 280
SOURCE = Path(memserve.__file__).parents[1]  # vLLM's environment has no package of ours
BLOCK = 32
LARGE = "67108864"  # bytes of vLLM's own KV cache, for all that a test asks
CONFIG = """
model.path = {model}
model.dtype = "float32"
gateway.port = 0
gateway.prove_handover = false  # hand-overs are counted
gateway.policy = "{policy}"
cache.caching = "{caching}"
"""
INSTANCE = """
[[instance]]
engine = "vllm"
threads = 1
{settings}
vllm_command = ["env", {path}, {python}, "-m", "vllm.entrypoints.openai.api_server"]
vllm_args = ["--enforce-eager", "--block-size", "{block}", {arguments}]
"""


@dataclass(frozen=True)
class Instances:
    """A table of the cluster's file. `settings`: lines of TOML."""

    settings: str = ""
    arguments: tuple[str, ...] = ("--kv-cache-memory-bytes", LARGE)
    block: int = BLOCK


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    cached: int  # of the prompt
    figures: dict[str, Any]  # `usage.memserve`


class Cluster:
    """One that runs."""

    def __init__(self, url: str, model: str, process: subprocess.Popen[str], log: Path) -> None:
        self.url = url
        self.model = model
        self.process = process
        self.log = log

    def complete(self, prompt: list[int], tokens: int, **more: Any) -> Answer:
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True, **more}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), method="POST"
        )
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answer:
            done = json.load(answer)
        usage = done["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return Answer(done["choices"][0]["token_ids"], cached, usage["memserve"])


@contextmanager
def up(
    model: Path,
    directory: Path,
    *tables: Instances,
    caching: str = "full",
    policy: str = "prompt-tree",
) -> Iterator[Cluster]:
    """A cluster with these instances, whose file and log are in `directory`."""
    config, log = directory / "cluster.toml", directory / "log"
    text = CONFIG.format(model=json.dumps(str(model)), caching=caching, policy=policy)
    for table in tables:
        text += INSTANCE.format(
            settings=table.settings,
            path=json.dumps(f"PYTHONPATH={SOURCE}"),
            python=json.dumps(str(PYTHON)),
            block=table.block,
            arguments=json.dumps(table.arguments)[1:-1],
        )
    config.write_text(text)
    with log.open("wb") as output:
        process = subprocess.Popen(
            (sys.executable, "-m", "memserve", "up", str(config)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
    assert process.stdout is not None
    try:
        url = url_told(process.stdout)
        assert url is not None, log.read_text()[-4000:]
        yield Cluster(url, str(model), process, log)
    finally:
        process.terminate()
        process.wait(60)


def prompt_of(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(5, 500), k=tokens)
