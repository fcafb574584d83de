"""What users of agents' and clients' libraries get, each library in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memserve.bench.vllm_engine import python_of, why_missing
from memserve.models.tokenizer import Tokenizer
from tests.clients.install import ROOT
from tests.fakes import MODEL, FakeCluster, tiny_tokenizer
from tests.scripted_model import FOUND, NUMBER, PLAIN, TEXT, scripted_engine

WANTED = os.environ.get("MEMSERVE_TEST_CLIENTS")  # set by `make clients-test`
RAIN = f"{FOUND}rain"
CALLED = [["weather", {"city": TEXT}]]
STRUCTURED = {"city": TEXT, "degrees": NUMBER}
Use = Callable[[str], Any]

pytestmark = pytest.mark.skipif(not WANTED, reason="`make clients-test` runs these")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer: Tokenizer = tiny_tokenizer(directory)
    with FakeCluster(tokenizer, [scripted_engine(tokenizer)]) as cluster:
        yield cluster


@pytest.fixture
def use(cluster: FakeCluster) -> Use:
    """Runs a client's script on the cluster; returns what it prints."""

    def use(client: str) -> Any:
        missing = why_missing(client, ROOT)
        assert missing is None, missing
        script = Path(__file__).with_name(f"use_{client}.py")
        done = subprocess.run(
            [str(python_of(client, ROOT)), "-P", str(script), cluster.url, MODEL],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
            env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": ""},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return use


def test_openai_agents(use: Use) -> None:
    assert use("openai_agents") == {
        "plain": PLAIN,
        "stream": PLAIN,
        "tools": RAIN,
        "stream of tools": {"output": RAIN, "raw": True},
        "required": RAIN,
        "named": RAIN,
        "asked": [TEXT] * 4,
        "structured": STRUCTURED,
        "structured and tools": STRUCTURED,
    }


def test_pydantic_ai(use: Use) -> None:
    assert use("pydantic_ai") == {
        "plain": PLAIN,
        "stream": PLAIN,
        "tools": RAIN,
        "stream of tools": [RAIN, True],
        "asked": [TEXT] * 3,
        "structured by a tool": STRUCTURED,
        "structured by a tool, and tools": STRUCTURED,
        "structured": STRUCTURED,
    }


def test_langchain(use: Use) -> None:
    assert use("langchain") == {
        "plain": PLAIN,
        "stream": PLAIN,
        "tools": f"{RAIN} in {TEXT}",
        "stream of tools": CALLED,
        "required": CALLED,
        "named": CALLED,
        "structured by a tool": STRUCTURED,
        "structured": STRUCTURED,
    }


def test_instructor(use: Use) -> None:
    assert use("instructor") == {
        "structured by a tool": STRUCTURED,
        "structured by a tool, streamed": STRUCTURED,
        "structured by a tool, parts": True,
        "structured": STRUCTURED,
        "structured, streamed": STRUCTURED,
        "structured, parts": True,
    }


def test_litellm(use: Use) -> None:
    told = {
        "plain": PLAIN,
        "stream": PLAIN,
        "tools": RAIN,
        "stream of tools": CALLED,
        "required": CALLED,
        "named": CALLED,
        "structured": STRUCTURED,
    }
    assert use("litellm") == {"openai": told, "hosted_vllm": told}
