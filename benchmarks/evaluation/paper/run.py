"""`python -m evaluation paper`: the paper's evaluation here, and simulated on its hardware."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec

from evaluation.paper.matrix import Group, PaperConfig, groups, step_groups
from evaluation.paper.measure import Budget, Kept, TimeIsUp, measure_groups, run_command
from evaluation.paper.page import paper_page
from evaluation.paper.simulate import SimMatrix, sim_findings, sim_notes, simulate_matrix
from evaluation.paper.tables import PaperResult, reduce_runs
from evaluation.results import SavedResult, read_result
from memserve.bench.environment import capture_environment
from memserve.bench.pages import write_page
from memserve.bench.report import append_lines, write_json
from memserve.clock import Clock
from memserve.config import ModelConfig
from memserve.models.resolve import ModelDirectory, Progress
from memserve.models.tokenizer import Tokenizer

_TIME_IS_UP = "time was up"

# File, module and arguments of each.
_MICRO: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("pool", ("memserve", "bench", "pool", "--prompts", "2000")),
    (
        "policies",
        (
            *("memserve", "bench", "policies", "--rate", "0.8", "--sessions", "6"),
            *("--max-turns", "3", "--max-output-tokens", "16"),
            *("--only", "prompt-tree", "--only", "session"),
        ),
    ),
    ("prefill", ("evaluation", "prefill", "--threads", "1", "--longest", "2048")),
    ("profile", ("memserve", "profile", "--threads", "1", "--rounds", "1", "--held-out", "12")),
    ("transfer", ("memserve", "bench", "transfer", "--blocks", "64", "--repeats", "3")),
)
_QUICK_MICRO: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("pool", ("memserve", "bench", "pool", "--prompts", "500")),
)


def run_paper(
    directory: Path,
    config: PaperConfig,
    wanted: ModelConfig,
    model: ModelDirectory,
    clock: Clock,
    progress: Progress,
) -> PaperResult:
    """Measure what `directory` does not have yet, and write the report there.

    Raises BenchmarkError, ClusterError, ConfigError.
    """
    budget = Budget(config.minutes * 60, clock)
    kept = Kept(directory)
    compared, steps = list(groups(config, wanted)), list(step_groups(config, wanted))
    # Alone it takes seconds, and nothing is measured beside it.
    simulated = _simulated(directory, config, model, progress)

    def measure(planned: Sequence[Group]) -> None:
        try:
            asyncio.run(measure_groups(planned, kept, model, budget, progress))
        except TimeIsUp:
            progress(_TIME_IS_UP)

    measure(compared)
    micro, missing = _micro(directory, config, budget, progress)
    measure(steps)
    cells = [cell for group in (*compared, *steps) for cell in group.cells]
    missing += [
        f"{cell.topology}, {cell.config.workload}, {cell.rate:g}/s, repeat {cell.repeat + 1}: "
        f"{_TIME_IS_UP}"
        for cell in cells
        if not kept.has(cell)
    ]
    result = reduce_runs(kept.of(cells), sim_findings(simulated), sim_notes(simulated), missing)
    write_json(str(directory / "paper.json"), config, result)
    write_page(directory / "report.html", paper_page(capture_environment(), result, micro))
    progress(f"the report is {directory / 'report.html'}")
    return result


class _SimLine(msgspec.Struct, frozen=True):
    result: SimMatrix


def _simulated(
    directory: Path, config: PaperConfig, model: ModelDirectory, progress: Progress
) -> SimMatrix:
    path = directory / ("simulated-quick.jsonl" if config.quick else "simulated.jsonl")
    if path.exists():
        try:
            return msgspec.json.decode(path.read_bytes(), type=_SimLine).result
        except msgspec.DecodeError:
            progress(f"{path} is of another version, and simulated again")
            path.unlink()
    tokenizer = Tokenizer.load(model.path)

    def encode(text: str) -> Sequence[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    matrix = simulate_matrix(Path(config.data), config.quick, encode, progress)
    append_lines(path, config, [matrix])
    return matrix


def _micro(
    directory: Path, config: PaperConfig, budget: Budget, progress: Progress
) -> tuple[list[SavedResult], list[str]]:
    """What was measured, and what was not and why."""
    found, missing = [], []
    for name, arguments in _QUICK_MICRO if config.quick else _MICRO:
        path = directory / "micro" / f"{name}.json"
        command = " ".join(arguments)
        try:
            if not path.exists():
                budget.check()
            if run_command(arguments, path, progress):
                found.append(read_result(path))
            else:
                missing.append(f"{command}: it failed")
        except TimeIsUp:
            missing.append(f"{command}: {_TIME_IS_UP}")
    if config.quick:
        missing += [
            f"{' '.join(arguments)}: --quick leaves it out"
            for name, arguments in _MICRO
            if name not in dict(_QUICK_MICRO)
        ]
    return found, missing
