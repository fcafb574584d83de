"""What `memserve cluster` prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memserve.models.tokenizer import Tokenizer
from memserve.secrets import cluster_secret
from tests.fakes import MODEL, FakeCluster, FakeEngine, tiny_tokenizer
from tests.insider import ask


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return tiny_tokenizer(directory)


@pytest.fixture(scope="module")
def cluster(tokenizer: Tokenizer) -> Iterator[FakeCluster]:
    with FakeCluster(tokenizer, [FakeEngine(), FakeEngine()]) as cluster:
        yield cluster


def decisions(cluster: FakeCluster, *arguments: str) -> str:
    command = [sys.executable, "-m", "memserve", "cluster", "decisions", "--url", cluster.url]
    # Said to it: a cluster that was killed may have left another secret for the same port.
    environment = {**os.environ, "MEMSERVE_SECRET": str(cluster_secret())}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_decisions_show_every_candidate_and_mark_the_chosen_one(cluster: FakeCluster) -> None:
    assert decisions(cluster) == "no request has been scheduled yet\n"
    for prompt in ([5, 6, 7], [8] * 40):
        body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 2})
        assert ask(cluster.url, "/v1/completions", body, "POST").status == 200
    last, before = json.loads(decisions(cluster, "-n", "5", "--json"))
    assert (last["chosen"]["prompt_tokens"], before["chosen"]["prompt_tokens"]) == (40, 3)
    title, *lines = decisions(cluster).splitlines()
    assert title.startswith(f"{last['request']}: 40 prompt tokens, prompt-tree, best of 2")
    rows = [line for line in lines if line.startswith("│")]
    named = [row.split()[1] == "*" for row in rows]
    chosen: Any = [candidate == last["chosen"] for candidate in last["candidates"]]
    assert named == chosen
    assert sum(named) == 1
