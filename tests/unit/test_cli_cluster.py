"""What `memserve cluster` prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from memserve.models.tokenizer import Tokenizer
from memserve.secrets import cluster_secret
from memserve.types import InstanceId
from tests.fakes import MODEL, FakeCluster, FakeEngine, tiny_tokenizer
from tests.insider import ask
from tests.security.test_control_plane import stranger


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return tiny_tokenizer(directory)


@pytest.fixture(scope="module")
def cluster(tokenizer: Tokenizer) -> Iterator[FakeCluster]:
    with FakeCluster(tokenizer, [FakeEngine(), FakeEngine()]) as cluster:
        yield cluster


def decisions(cluster: FakeCluster, *arguments: str) -> str:
    return told(cluster, "decisions", *arguments)


def told(cluster: FakeCluster, command: str, *arguments: str) -> str:
    start = [sys.executable, "-m", "memserve", "cluster", command, "--url", cluster.url]
    # Said to it: a cluster that was killed may have left another secret for the same port.
    environment = {**os.environ, "MEMSERVE_SECRET": str(cluster_secret())}
    done = subprocess.run(
        [*start, *arguments], capture_output=True, text=True, check=False, env=environment
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


def test_prefixes_show_who_holds_what_and_their_text_only_if_it_is_asked_for(
    cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    tree = cluster.gateway._router.tree
    for name in ("i0", "i1"):  # whose engines publish no KV events
        cluster.call(partial(tree.join, InstanceId(name), 16))
    for _ in range(3):
        body = json.dumps({"model": MODEL, "prompt": [7] * 64, "max_tokens": 2})
        assert ask(cluster.url, "/v1/completions", body, "POST").status == 200
    first = json.loads(told(cluster, "prefixes", "--json"))["prefixes"][0]
    assert (first["tokens"], first["tenant"], first["hits"]) == (64, "shared", 2)
    assert {holder["instance"] for holder in first["holders"]} <= {"i0", "i1"}
    assert "text" not in first
    assert first["id"] in told(cluster, "prefixes")
    assert "texts of" not in caplog.text
    (hot, *_) = json.loads(told(cluster, "prefixes", "--json", "--text", "-n", "1"))["prefixes"]
    assert hot["id"] == first["id"]
    assert hot["text"]
    assert "asked for the texts of 1 prefixes" in caplog.text
    assert ask(cluster.url, "/cluster/prefixes?n=0").status == 400
    answer = stranger(cluster.url, "GET", "/cluster/prefixes")
    assert answer.status == 401
