"""The tables of `benchmarks/README.md` come from files, each with what made it."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from evaluation.cli import app
from evaluation.paper.matrix import PaperConfig
from evaluation.paper.tables import reduce_runs
from evaluation.readme import render_readme
from memserve.bench.environment import capture_environment
from memserve.bench.measure import ServeRun
from memserve.bench.serve import ServeBenchResult
from memserve.bench.work import ServeBenchConfig
from memserve.errors import ConfigError
from tests.paper_runs import cells, made_up_run, made_up_runs


def save(path: Path, command: str, config: msgspec.Struct, result: msgspec.Struct) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = {
        "command": command.split(),
        "environment": capture_environment(),
        "config": config,
        "result": result,
    }
    path.write_bytes(msgspec.json.encode(file))


def serve_result(repeats: int) -> ServeBenchResult:
    run: ServeRun = made_up_run(cells()[0], 1.0).run
    return ServeBenchResult(
        tuple(msgspec.structs.replace(run, repeat=repeat) for repeat in range(repeats))
    )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    command = "memserve bench serve --json results/a-server.json"
    save(folder / "a-server.json", command, ServeBenchConfig(), serve_result(1))
    runs = made_up_runs(lambda _: 1.0)
    paper = reduce_runs(runs, (), (), ("x: time was up",))
    save(folder / "paper.json", "python -m evaluation paper out", PaperConfig(data="d"), paper)
    return folder


def test_each_table_says_what_made_it(results: Path) -> None:
    (results / "a-server.md").write_text("What follows from it.\n")
    text = render_readme(results)
    environment = capture_environment()
    assert "## A server\n`memserve bench serve --json results/a-server.json`" in text
    assert environment.time[:10] in text
    assert environment.cpu in text
    assert f"commit {environment.commit or 'unknown'}" in text
    assert "| TTFT s mean | 1 |" in text
    assert "What follows from it." in text
    assert text.index("## A server") < text.index("## Paper")
    assert "not measured: x: time was up" in text


def test_words_without_a_table_are_a_section(results: Path) -> None:
    (results / "b-side.md").write_text("See elsewhere.\n")
    assert "\n## B side\nSee elsewhere.\n\n## Paper\n" in render_readme(results)


def test_repeats_are_one_line_with_their_spread(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    save(folder / "r.json", "memserve bench serve", ServeBenchConfig(), serve_result(3))
    assert "| PD | 3 | 1 ±0 |" in render_readme(folder)


def test_every_row_of_a_table_has_as_many_cells(results: Path) -> None:
    lines = [line for line in render_readme(results).splitlines() if line.startswith("|")]
    widths = [line.replace("\\|", "").count("|") for line in lines]
    starts = [n for n, line in enumerate(lines) if set(line) <= set("|-: ")]
    for start in starts:
        assert widths[start - 1] == widths[start] == widths[start + 1]


def test_what_cannot_be_read_is_named_with_the_command_that_makes_it_anew(results: Path) -> None:
    changed = json.loads((results / "paper.json").read_text())
    del changed["result"]["rows"]
    (results / "paper.json").write_text(json.dumps(changed))
    (results / "x.json").write_text("{}")
    with pytest.raises(ConfigError) as refused:
        render_readme(results)
    assert "run python -m evaluation paper out" in str(refused.value)
    assert "x.json: no result of a measurement" in str(refused.value)


def test_the_command_writes_and_checks(results: Path) -> None:
    runner = CliRunner()
    arguments = ["readme", "--results", str(results)]
    assert runner.invoke(app, [*arguments, "--check"]).exit_code == 1
    assert runner.invoke(app, arguments).exit_code == 0
    assert (results.parent / "README.md").read_text() == render_readme(results)
    assert runner.invoke(app, [*arguments, "--check"]).exit_code == 0
