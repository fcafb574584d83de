"""`memserve bench serve` against real clusters: what it reports is what caching does."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from tests.fakes import TEXT, save_tiny_tokenizer
from tests.tiny_models import save_tiny_model

DEADLINE = 240.0
BLOCK_TOKENS = 16


def conversation(name: str, turns: int) -> dict[str, object]:
    said = [
        {"from": who, "value": f"{name} {turn}: {TEXT}"}
        for turn in range(turns)
        for who in ("human", "gpt")
    ]
    return {"id": name, "conversations": said}


def test_caching_saves_the_history_of_a_conversation_and_only_that(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path)
    save_tiny_tokenizer(model)
    data = tmp_path / "sharegpt.json"
    data.write_text(json.dumps([conversation(name, 3) for name in "abcd"]), encoding="utf-8")
    cluster = tmp_path / "cluster.toml"
    cluster.write_text("[[instance]]\nhbm_blocks = 256\ndram_blocks = 8\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "memserve", "bench", "serve", "--compare-caching"),
            *("--cluster", str(cluster), "--model", str(model), "--data", str(data)),
            *("--sessions", "3", "--rate", "20", "--max-output-tokens", "8", "--json", "-"),
            *("--dtype", "float32"),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    cached, uncached = report["result"]["runs"]
    for run in (cached, uncached):
        assert run["summary"]["requests"] == 9
        assert run["summary"]["failed"] == 0
        assert {request["output_tokens"] for request in run["requests"]} == {8}
    for before, request in pairwise(cached["requests"]):
        if request["turn"] > 0:
            # All of the prompt before it but its last, partial block and a token or two that
            # the answer's text has changed.
            assert request["cached_tokens"] > before["prompt_tokens"] - 2 * BLOCK_TOKENS
            assert request["cached_tokens"] < request["prompt_tokens"]
    assert uncached["summary"]["cached_tokens"] == 0
    assert report["config"]["rate"] == 20
