"""The command `memserve bench peers`."""

from __future__ import annotations

from typing import Annotated, get_args

import typer
from rich.console import Console

from memserve.bench.peers.config import PARTS, QUICK_PARTS, Part, PeersConfig
from memserve.bench.report import write_json
from memserve.cli_flags import takes_flags
from memserve.config import ModelConfig
from memserve.errors import ConfigError
from memserve.flags import Given, flags_of, with_flags
from memserve.models.resolve import resolve_model
from memserve.terminal import progress_lines

_NOT_OF_THE_MODEL = ("dtype", "served_name", "max_model_len", "device")


@takes_flags(flags_of(PeersConfig), flags_of(ModelConfig, _NOT_OF_THE_MODEL))
def peers(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="one round of each, and no pairs of instances or servers"),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help=f"{', '.join(PARTS)}; may be repeated; default: all"),
    ] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="write JSON; - is standard output")
    ] = None,
    *,
    given: Given,
) -> None:
    """Measure ours beside vLLM, Transformers, SGLang's and Dynamo's indexes, and routers.

    In the same run, on the same cores, with the same requests. `make peers` installs them; what
    is not installed is skipped, and the report says so.
    """
    from memserve.bench.peers.report import peers_tables, run_peers

    parts = chosen_parts(only, QUICK_PARTS if quick else PARTS)
    config = with_flags(PeersConfig(), given)
    progress = progress_lines()
    model = resolve_model(with_flags(ModelConfig(), given), progress)
    result = run_peers(config, parts, model, quick, progress)
    if json is None:
        Console().print(peers_tables(result))
    else:
        write_json(json, config, result)


def chosen_parts(only: list[str] | None, default: tuple[Part, ...]) -> tuple[Part, ...]:
    """Those that are named. Raises ConfigError for one that there is not."""
    for name in only or ():
        if name not in get_args(Part):
            raise ConfigError(f"--only {name}: there are {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in (only or default))
