"""How much `python -m evaluation peers` measures."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec

from memserve.config import Dtype, NonNegative, Positive, PositiveSeconds, doc
from memserve.errors import ConfigError
from memserve.workloads.text import TextWorkload

Part = Literal["serving", "pair", "tiers", "index", "gateway"]
PARTS: tuple[Part, ...] = ("serving", "pair", "tiers", "index", "gateway")
TierContest = Literal["all", "host-memory", "lmcache", "prefill-decode"]
QUICK_PARTS: tuple[Part, ...] = ("serving", "index", "gateway")


class PeersConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    repeats: Annotated[Positive, doc("rounds, each in the opposite order of the last")] = 3
    seed: Annotated[NonNegative, doc("of the choice of sessions and of their arrival")] = 0
    dtype: Annotated[Dtype, doc("weights and KV, of all servers")] = "bfloat16"
    threads: Annotated[Positive | None, doc("and cores of one instance; default: all")] = None
    rate: Annotated[float, msgspec.Meta(gt=0), doc("sessions per second, open loop")] = 0.5
    concurrency: Annotated[Positive, doc("sessions at a time, closed loop")] = 3
    sessions: Annotated[Positive, doc("of the workload, in each load")] = 3
    max_turns: Annotated[Positive, doc("of a session")] = 3
    max_output_tokens: Annotated[Positive, doc("of a turn")] = 16
    contest_minutes: Annotated[
        PositiveSeconds, doc("of a contest of servers: no round is begun that would exceed it")
    ] = 4.0
    workload: Annotated[TextWorkload, doc("what servers are asked")] = "sharegpt"
    data: Annotated[str | None, doc("its file or folder; default: the installed ShareGPT")] = None
    tier_contest: Annotated[TierContest, doc("of the part tiers, which")] = "all"
    tier_sessions: Annotated[Positive, doc("of the part tiers, for --sessions")] = 12
    tier_concurrency: Annotated[Positive, doc("of the part tiers, for --concurrency")] = 6
    tier_kv: Annotated[str, doc("of each vLLM's own, where host memory is behind it")] = "40MB"
    tier_dram: Annotated[str, doc("host memory behind each vLLM")] = "512MiB"


def chosen_parts(only: list[str] | None, default: tuple[Part, ...]) -> tuple[Part, ...]:
    """Those that are named. Raises ConfigError for one that there is not."""
    for name in only or ():
        if name not in get_args(Part):
            raise ConfigError(f"--only {name}: there are {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in (only or default))
