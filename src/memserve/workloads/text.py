"""One function that chooses the sessions of any workload whose requests are text."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from memserve.errors import ConfigError
from memserve.workloads.loogle import loogle_sessions, read_loogle
from memserve.workloads.react import react_sessions, read_react
from memserve.workloads.session import CountTokens, Session, SessionLimits
from memserve.workloads.sharegpt import choose_sessions, read_sharegpt

TextWorkload = Literal["sharegpt", "loogle", "react"]


def text_sessions(
    workload: TextWorkload,
    data: str | None,
    count: int,
    seed: int,
    limits: SessionLimits,
    count_tokens: CountTokens,
) -> tuple[Session, ...]:
    """Return `count` sessions of the data at path `data`; the seed decides which.

    LooGLE may return fewer. Without `data`, ShareGPT is the installed package's. Raises
    ConfigError.
    """
    choose = (count, seed, limits, count_tokens)
    if workload == "sharegpt":
        return choose_sessions(read_sharegpt(Path(data) if data else None), *choose)
    folder = required_data(workload, data)
    if workload == "loogle":
        return loogle_sessions(read_loogle(folder), *choose)
    return react_sessions(read_react(folder), *choose)


def required_data(workload: str, data: str | None) -> Path:
    """Return `data` as a path. Raises ConfigError without it, since the workload has no package."""
    if data is None:
        raise ConfigError(f"the workload {workload} needs --data: its file or folder")
    return Path(data)
