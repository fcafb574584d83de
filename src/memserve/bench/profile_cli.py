"""The command `memserve profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from memserve.bench.report import write_json
from memserve.cli_flags import takes_flags
from memserve.config import ModelConfig, NonNegative, Positive, available_cores, doc
from memserve.flags import Given, flags_of, with_flags
from memserve.models.resolve import resolve_model
from memserve.terminal import progress_lines

_MIXED_TOKENS = 256  # nothing is prefilled beside decoding sequences here
_MAX_RUNNING = 64


class ProfileConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How thoroughly an instance is measured."""

    threads: Annotated[Positive | None, doc("default: one for each core")] = None
    max_batch_tokens: Annotated[Positive, doc("as the instances' setting")] = 2048
    rounds: Annotated[Positive, doc("of all points; more are steadier")] = 3
    held_out: Annotated[NonNegative, doc("points to check the model on; 0: none")] = 24


@takes_flags(flags_of(ModelConfig, ("served_name", "max_model_len")), flags_of(ProfileConfig))
def profile(
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="write JSON; - is standard output")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="write predicted against measured times as SVG")
    ] = None,
    *,
    given: Given,
) -> None:
    """Measure how long this machine takes for a model; instances predict with it from then on."""
    import torch

    from memserve.bench.profile import check_plot, profile_table, run_profile, write_plot
    from memserve.engine.batch import BatchLimits
    from memserve.engine.dtype import choose_dtype
    from memserve.engine.engine import EngineSettings
    from memserve.engine.model import count_weights, load_model
    from memserve.instance.build import choose_device
    from memserve.instance.profiling import ProfiledEngine
    from memserve.scheduler.profiles import ProfileStore

    wanted = with_flags(ModelConfig(), given)
    config = with_flags(ProfileConfig(), given)
    if plot is not None:
        check_plot(plot, config)
    progress = progress_lines()
    device = choose_device(wanted.device)
    model = resolve_model(wanted, progress)
    threads = config.threads or available_cores()
    torch.set_num_threads(threads)
    if wanted.dtype == "auto":
        dtype = choose_dtype(count_weights(model.path), device).dtype
    else:
        dtype = vars(torch)[wanted.dtype]
    progress(f"loading {model.name} as {dtype} on {device}, {threads} threads")
    loaded = load_model(model.path, dtype, device)
    limits = BatchLimits(config.max_batch_tokens, _MIXED_TOKENS, _MAX_RUNNING)
    settings = EngineSettings(model.name, threads, limits, max_waiting=_MAX_RUNNING)
    layout = loaded.layout(model.name, 16, True, model.revision or "")
    engine = ProfiledEngine(loaded, layout, settings, model.path)
    report = run_profile(engine, config, ProfileStore(), progress)
    if plot is not None:
        write_plot(report, plot)
    if json is None:
        Console().print(profile_table(report))
    else:
        write_json(json, msgspec.structs.replace(config, threads=threads), report)
