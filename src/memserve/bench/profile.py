"""`memserve profile`: measure an instance, fit its cost model, check it on points held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table

from memserve.bench.plots import Series, check_matplotlib, draw_scatter
from memserve.bench.profile_cli import ProfileConfig
from memserve.errors import ConfigError
from memserve.instance.fit import ArchitectureLevel, fit_costs, relative_errors
from memserve.instance.profiling import MOST_WAITED, ProfiledEngine, take_measurements
from memserve.scheduler.cost_model import CostModel
from memserve.scheduler.profiles import (
    Measurements,
    PrefillPoint,
    Profile,
    ProfileStore,
    make_profile,
)

# Prompt tokens of held-out points: from shorter than one step to much longer.
SHORTEST, LONGEST = 64, 8192
CACHED_RATIOS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95)


class Errors(msgspec.Struct, frozen=True):
    """Distribution of absolute relative errors."""

    points: int
    median: float
    p95: float
    worst: float

    @classmethod
    def of(cls, errors: NDArray[np.float64]) -> Errors | None:
        """Return the distribution; None without errors."""
        if not len(errors):
            return None
        median, p95 = np.percentile(errors, [50, 95])
        return cls(len(errors), float(median), float(p95), float(errors.max()))


class CheckedPoint(msgspec.Struct, frozen=True):
    """A held-out prefill, measured and predicted."""

    prompt_tokens: int
    cached_tokens: int
    measured: float
    predicted: float  # by the fit of operators
    by_architecture: float  # by the architecture-level fit


class ProfileReport(msgspec.Struct, frozen=True):
    """The fitted cost model's errors, on fitted and on held-out points."""

    profile: Profile
    measured: Measurements
    prefill: Errors | None  # of the fitted points
    decode: Errors | None
    transfer: Errors | None
    held_out: Errors | None
    held_out_by_architecture: Errors | None
    checked: tuple[CheckedPoint, ...]
    stored: str  # path of the stored profile


def run_profile(
    engine: ProfiledEngine,
    config: ProfileConfig,
    store: ProfileStore,
    progress: Callable[[str], None],
) -> ProfileReport:
    """Measure an instance, fit, store and check its cost model. Raises ProfileError, ProbeFailed,
    OutOfBlocks, OSError."""
    subject = engine.subject
    measured, points = take_measurements(
        engine, "full", progress, partial(held_out_points, config.held_out), config.rounds
    )
    costs = fit_costs(measured, subject.architecture, subject.max_batch_tokens)
    profile = make_profile("full", subject, costs)
    path = store.save(profile)
    progress(f"stored in {path}")
    if measured.waited > MOST_WAITED:
        progress(
            f"the machine was busy: threads waited for cores for {measured.waited:.0%} of the "
            "time; measure again when it is not"
        )
    checked: tuple[CheckedPoint, ...] = ()
    if points:
        checked = _check(costs, ArchitectureLevel(measured.prefill, subject.architecture), points)
    truth = np.array([point.measured for point in checked])
    ours = np.array([point.predicted for point in checked])
    theirs = np.array([point.by_architecture for point in checked])
    return ProfileReport(
        profile=profile,
        measured=measured,
        prefill=_prefill_errors(costs, measured),
        decode=_decode_errors(costs, measured),
        transfer=_transfer_errors(costs, measured),
        held_out=Errors.of(relative_errors(ours, truth)),
        held_out_by_architecture=Errors.of(relative_errors(theirs, truth)),
        checked=checked,
        stored=str(path),
    )


def held_out_points(count: int, longest: int) -> list[tuple[int, int]]:
    """Return (prompt tokens, cached tokens) of held-out points: lengths evenly spaced on a
    logarithmic scale, every cached ratio with short and long ones. Equal in every run, and none of
    the fitted points."""
    longest = min(longest, LONGEST)
    rng = np.random.default_rng(1)
    at = (np.arange(count) + rng.random(count)) / count
    prompts = np.minimum(longest, SHORTEST * (longest / SHORTEST) ** at).astype(int)
    ratios = np.resize(CACHED_RATIOS, count)
    return [(int(x), int(x * y)) for x, y in zip(prompts, ratios, strict=True)]


def _check(
    costs: CostModel, architecture: ArchitectureLevel, points: Sequence[PrefillPoint]
) -> tuple[CheckedPoint, ...]:
    ours = _predict(costs, points).tolist()
    theirs = architecture.predict(points).tolist()
    checked = [
        CheckedPoint(p.prompt_tokens, p.cached_tokens, p.seconds, mine, other)
        for p, mine, other in zip(points, ours, theirs, strict=True)
    ]
    return tuple(sorted(checked, key=lambda p: (p.prompt_tokens, p.cached_tokens)))


def _predict(costs: CostModel, points: Sequence[PrefillPoint]) -> NDArray[np.float64]:
    return costs.prefill_seconds(
        [p.prompt_tokens for p in points], [p.cached_tokens for p in points]
    )


def _prefill_errors(costs: CostModel, measured: Measurements) -> Errors | None:
    truth = np.array([p.seconds for p in measured.prefill])
    return Errors.of(relative_errors(_predict(costs, measured.prefill), truth))


def _decode_errors(costs: CostModel, measured: Measurements) -> Errors | None:
    points = measured.decode
    predicted = costs.decode_step_seconds(
        [p.sequences for p in points], [p.context_tokens for p in points]
    )
    return Errors.of(relative_errors(predicted, np.array([p.seconds for p in points])))


def _transfer_errors(costs: CostModel, measured: Measurements) -> Errors | None:
    points = measured.transfer
    predicted = [float(costs.transfer_seconds(p.num_bytes, p.pieces, p.path)) for p in points]
    truth = np.array([p.seconds for p in points])
    return Errors.of(relative_errors(np.array(predicted), truth))


def profile_table(report: ProfileReport) -> Group:
    """Return the report as tables of errors and of held-out points."""
    subject = report.profile.subject
    hardware = subject.hardware
    errors = Table(
        "",
        "points",
        "median",
        "P95",
        "worst",
        title=f"{subject.architecture.name}, {subject.dtype}, {hardware.device}, "
        f"{hardware.threads} threads: relative errors",
    )
    for label, found in (
        ("prefill, fitted points", report.prefill),
        ("decode step, fitted points", report.decode),
        ("transfer, fitted points", report.transfer),
        ("prefill, held out: operators", report.held_out),
        ("prefill, held out: architecture level", report.held_out_by_architecture),
    ):
        if found is not None:
            shares = (f"{value:.1%}" for value in (found.median, found.p95, found.worst))
            errors.add_row(label, f"{found.points}", *shares)
    if not report.checked:
        return Group(errors)
    points = Table(
        "x", "cached", "measured ms", "predicted ms", "error", "architecture level ms", "error"
    )
    for point in report.checked:
        cells = [f"{point.prompt_tokens}", f"{point.cached_tokens}", f"{point.measured * 1e3:.0f}"]
        for predicted in (point.predicted, point.by_architecture):
            off = predicted / point.measured - 1
            cells += [f"{predicted * 1e3:.0f}", f"{off:+.1%}"]
        points.add_row(*cells)
    return Group(errors, points)


def check_plot(path: Path, config: ProfileConfig) -> None:
    """Raise ConfigError if the plot cannot be made. Call it before the measurement."""
    if path.suffix != ".svg":
        raise ConfigError(f"--plot {path}: an .svg file is written")
    if not config.held_out:
        raise ConfigError(f"--plot {path}: there is nothing to plot without held-out points")
    check_matplotlib()


def write_plot(report: ProfileReport, path: Path) -> None:
    """Write a plot of predicted against measured times of the held-out points, as SVG."""
    measured = [point.measured for point in report.checked]
    svg = draw_scatter(
        f"{report.profile.subject.architecture.name}: prefill, points held out",
        "measured seconds",
        "predicted seconds",
        (
            Series("operators", measured, [p.predicted for p in report.checked]),
            Series("architecture level", measured, [p.by_architecture for p in report.checked]),
        ),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg, encoding="utf-8")
