"""The command `memserve profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from memserve.bench.report import print_or_write
from memserve.cli_flags import JsonFile, takes_flags
from memserve.config import ModelConfig, NonNegative, Positive, doc
from memserve.flags import Given, flags_of, with_flags
from memserve.terminal import progress_lines


class ProfileConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of `memserve profile`."""

    threads: Annotated[Positive | None, doc("default: one for each core")] = None
    max_batch_tokens: Annotated[Positive, doc("as the instances' setting")] = 2048
    rounds: Annotated[Positive, doc("of all points; more are steadier")] = 3
    held_out: Annotated[NonNegative, doc("points to check the model on; 0: none")] = 24


@takes_flags(flags_of(ModelConfig, ("served_name", "max_model_len")), flags_of(ProfileConfig))
def profile(
    json: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option(help="write predicted against measured times as SVG")
    ] = None,
    *,
    given: Given,
) -> None:
    """Measure how long this machine takes for a model; instances predict with it from then on."""
    from memserve.bench.own_engine import load_own_engine
    from memserve.bench.profile import check_plot, profile_table, run_profile, write_plot
    from memserve.scheduler.profiles import ProfileStore

    wanted = with_flags(ModelConfig(), given)
    config = with_flags(ProfileConfig(), given)
    if plot is not None:
        check_plot(plot, config)
    progress = progress_lines()
    engine = load_own_engine(wanted, config.threads, config.max_batch_tokens, progress)
    report = run_profile(engine, config, ProfileStore(), progress)
    if plot is not None:
        write_plot(report, plot)
    used = msgspec.structs.replace(config, threads=engine.settings.threads)
    print_or_write(json, used, report, profile_table(report))
