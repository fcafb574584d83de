"""`memserve bench caching` against real clusters: each step saves what it says, and only that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.e2e.test_bench_serve import DEADLINE, conversation
from tests.fakes import save_tiny_tokenizer
from tests.tiny_models import save_tiny_model


def test_every_step_reports_what_it_cached_and_sent(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path)
    save_tiny_tokenizer(model)
    data = tmp_path / "sharegpt.json"
    data.write_text(json.dumps([conversation(name, 3) for name in "abcd"]), encoding="utf-8")
    cluster = tmp_path / "cluster.toml"
    instance = '[[instance]]\nrole = "{}"\nhbm_blocks = 256\ndram_blocks = 8\n'
    gateway = '[gateway]\npolicy = "round-robin"\n'
    cluster.write_text(gateway + instance.format("prefill") + instance.format("decode"))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "memserve", "bench", "caching"),
            *("--cluster", str(cluster), "--model", str(model), "--data", str(data)),
            *("--sessions", "2", "--rate", "20", "--max-output-tokens", "40", "--json", "-"),
            *("--dtype", "float32"),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    runs = {run["caching"]: run for run in json.loads(done.stdout)["result"]["runs"]}
    assert list(runs) == ["off", "p", "pd", "full"]
    for caching, run in runs.items():
        handoff = run["handoff"]
        assert [turn["requests"] for turn in run["turns"]] == [2, 2, 2]
        assert (handoff["asked"], handoff["failed"]) == (8, 0)  # two of them warm up
        assert handoff["blocks_received"] > 0
        assert (handoff["blocks_already_present"] > 0) == (caching in ("pd", "full"))
        assert (handoff["blocks_returned"] > 0) == (caching == "full")
    last = {caching: run["turns"][-1]["cached_ratio"] for caching, run in runs.items()}
    # Random answers are other tokens once they have been text, so that giving them back may not
    # help: only real models show the last step.
    assert last["off"] == 0 < last["p"] == last["pd"] <= last["full"]
