"""`memserve sim` as scripts call it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from memserve.cli import app
from memserve.config import Policy
from memserve.errors import ConfigError
from memserve.scheduler.hardware import cost_model
from memserve.scheduler.profiles import Hardware, Subject, encode_profile, make_profile

CONTRACT = ("cached_ratio", "ttft_mean", "ttft_p99", "jct_mean", "jct_p99")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Conversations that go on: each line adds blocks to one of the prompts before."""
    rng = random.Random(0)
    lines, prompts, block = [], [[0]], 1
    for number in range(120):
        prompt = list(rng.choice(prompts[-20:]))
        for _ in range(rng.randint(1, 8)):
            prompt.append(block)
            block += 1
        prompts.append(prompt)
        line = {
            "timestamp": number * 100,
            "input_length": len(prompt) * 512 - rng.randint(0, 400),
            "output_length": rng.randint(1, 200),
            "hash_ids": prompt,
        }
        lines.append(json.dumps(line))
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines))
    return path


def simulated(trace: Path, *flags: str) -> str:
    result = CliRunner().invoke(app, ["sim", "--trace", str(trace), *flags, "--json", "-"])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    "cluster", [("--colocated", "4"), ("--prefill", "2", "--decode", "2")], ids="-".join
)
def test_the_same_seed_gives_the_same_figures(trace: Path, cluster: tuple[str, ...]) -> None:
    first = simulated(trace, *cluster, "--policy", "prompt-tree", "--seed", "3")
    assert simulated(trace, *cluster, "--policy", "prompt-tree", "--seed", "3") == first
    figures = json.loads(first)
    assert all(isinstance(figures[name], float) for name in CONTRACT)
    assert 0.0 < figures["cached_ratio"] < 1.0
    assert 0.0 < figures["ttft_mean"] <= figures["ttft_p99"] <= figures["jct_p99"]
    assert figures["requests"] == 120


def test_each_policy_runs_and_the_prompt_tree_leads(trace: Path) -> None:
    results = json.loads(simulated(trace, "--colocated", "4", "--all-policies"))
    found = {result["policy"]: result for result in results}
    assert set(found) == set(get_args(Policy))
    best = found["prompt-tree"]
    for name in ("least-load", "round-robin"):
        assert best["cached_ratio"] > found[name]["cached_ratio"]
        assert best["ttft_mean"] < found[name]["ttft_mean"]


def test_a_measured_profile_takes_the_place_of_model_and_hardware(
    trace: Path, tmp_path: Path
) -> None:
    """The same costs by name and by file give the same figures."""
    costs = cost_model("h100", "llama-3-8b", tp=1, max_batch_tokens=2048)
    subject = Subject(
        hardware=Hardware(device="mine", threads=1, software="none"),
        architecture=costs.architecture,
        dtype="bfloat16",
        max_batch_tokens=2048,
    )
    path = tmp_path / "profile.json"
    path.write_bytes(encode_profile(make_profile("quick", subject, costs)))
    where = ("--colocated", "2", "--hardware", "h100", "--tp", "1", "--hbm-blocks", "200")
    by_name = simulated(trace, *where, "--model", "llama-3-8b")
    assert simulated(trace, *where, "--profile", str(path)) == by_name
    path.write_text("{}")
    result = CliRunner().invoke(app, ["sim", "--trace", str(trace), *where, "--profile", str(path)])
    assert isinstance(result.exception, ConfigError)
    assert "profile.json: not a profile" in str(result.exception)


def test_the_page_has_the_figures_and_a_plot_of_each_time(trace: Path, tmp_path: Path) -> None:
    page = tmp_path / "sim" / "report.html"
    said = json.loads(simulated(trace, "--colocated", "2", "--all-policies", "--html", str(page)))
    text = page.read_text()
    assert "120 requests on 2 instances" in text
    assert text.count('<img class="plot"') == 3
    for figures in said:
        assert f"<td>{figures['policy']}</td>" in text
        assert f"{figures['ttft_p99']:.4g}" in text
