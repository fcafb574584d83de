"""Clusters of prefill and decode instances, started as people start them: the tokens are those of
Transformers' generate, whatever is cached, handed over, swapped out and evicted on the way."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from memserve.secrets import secret_of
from tests.fakes import save_tiny_tokenizer
from tests.handoff_harness import prompt_of
from tests.insider import told
from tests.tiny_models import Reference, save_tiny_model

SYSTEM = prompt_of(40, seed=100)
SESSIONS, TURNS, ADDED, ANSWERED = 3, 4, 20, 12
# Less than the conversations' KV: blocks must go to DRAM, and from there for good.
CLUSTER = """
[model]
path = "{model}"
served_name = "tiny"
dtype = "float32"
device = "cpu"
[gateway]
port = 0
prove_handover = false  # hand-overs are counted
policy = "round-robin"  # by what is faster, tiny prompts would not be handed over
[cache]
caching = "{caching}"
mode = "{mode}"
[[instance]]
role = "prefill"
profile = "off"
hbm_blocks = 14
dram_blocks = 6
[[instance]]
role = "decode"
profile = "off"
hbm_blocks = 14
dram_blocks = 6
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("models")
    for name in ("llama", "gemma3"):
        save_tiny_tokenizer(save_tiny_model(name, directory))
    return directory


@contextmanager
def running(config: Path) -> Iterator[str]:
    """The URL of a cluster; nothing of it is left afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "memserve", "up", "--no-dashboard", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    family: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if " on http://" in line), None)
        assert line is not None, process.communicate()
        family = psutil.Process(process.pid).children(recursive=True)
        yield line.partition(" on ")[2].partition(";")[0]
    finally:
        process.kill()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.communicate()


def get(url: str, gateway: str) -> Any:
    parts = urlsplit(url)
    return told(f"http://{parts.netloc}", parts.path, secret=secret_of(gateway))[1]


def complete(url: str, prompt: list[int]) -> tuple[list[int], int]:
    """Tokens of the answer, and how many of the prompt's were cached."""
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": ANSWERED,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        answer = json.load(response)
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["token_ids"], cached


@pytest.mark.parametrize(
    ("name", "caching", "mode"),
    [
        ("llama", "off", "by-request-agg"),
        ("gemma3", "p", "by-request-agg"),
        ("llama", "pd", "by-request"),
        ("gemma3", "full", "by-request"),
        ("llama", "full", "by-request-agg"),
    ],
)
def test_conversations_are_those_of_generate(
    models: Path, tmp_path: Path, name: str, caching: str, mode: str
) -> None:
    config = tmp_path / "cluster.toml"
    config.write_text(CLUSTER.format(model=models / name, caching=caching, mode=mode))
    reference = Reference(models / name)
    conversations = [list(SYSTEM) for _ in range(SESSIONS)]
    cached_tokens = 0
    with running(config) as url:
        for turn in range(TURNS):
            for session, conversation in enumerate(conversations):
                conversation += prompt_of(ADDED, seed=10 * session + turn)
                tokens, cached = complete(url, conversation)
                assert tokens == reference.generate(conversation, ANSWERED)
                conversation += tokens
                cached_tokens += cached
        stats = {
            member["role"]: get(f"{member['address']}/stats", url)
            for member in get(f"{url}/cluster", url)["instances"]
        }
    handoff, pool = stats["decode"]["handoff"], stats["prefill"]["pool"]
    assert handoff["asked"] == SESSIONS * TURNS
    assert handoff["failed"] == 0
    assert handoff["blocks_received"] > 0
    assert (cached_tokens > 0) == (caching != "off")
    # What P sends for a request is no hit of D's cache.
    decode = stats["decode"]["engine"]
    assert decode["received_prompt_tokens"] > 0
    assert (decode["cached_prompt_tokens"] > 0) == (caching in ("pd", "full"))
    assert (pool["swapped_out"] > 0) == (caching != "off")
    assert (pool["evictions"] > 0) == (caching != "off")
    assert (handoff["blocks_already_present"] > 0) == (caching in ("pd", "full"))
    assert (handoff["returns"] > 0) == (caching == "full")
