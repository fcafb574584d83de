"""`simulate`: runs one simulation, from a `SimConfig` to a `SimResult`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from memserve.config import (
    KEEPING_ROLES,
    Caching,
    NonNegative,
    PlannerConfig,
    Policy,
    Positive,
    TransferMode,
    doc,
)
from memserve.errors import ConfigError, ProfileError
from memserve.planner.contract import Action, Decision
from memserve.scheduler.architecture import ARCHITECTURES, Architecture
from memserve.scheduler.cost_model import CostModel
from memserve.scheduler.hardware import HARDWARE, cost_model
from memserve.scheduler.profiles import decode_profile
from memserve.sim.cluster import Network, SimCluster
from memserve.sim.elastic import START_SECONDS, Delays, SimPlanner
from memserve.sim.inputs import Encode, text_sessions, trace_sessions
from memserve.sim.instance import InstanceShape
from memserve.sim.prompt import BlockKeys, SimRequest, SimSession
from memserve.types import InstanceId, Role
from memserve.workloads.session import Session, SessionLimits
from memserve.workloads.text import TextWorkload
from memserve.workloads.text import text_sessions as chosen_sessions
from memserve.workloads.trace import TraceFormat, TraceFormatName, read_trace, trace_format

_GB = 10**9
_PROGRESS_LINES = 10
# Bytes per second between a device and its host's memory, one direction, from data sheets: PCIe 5
# and PCIe 4 with 16 lanes. On a CPU both tiers are in the same memory.
_HOST_BANDWIDTH: dict[str, float] = {"h800": 64e9, "h100": 64e9, "a100": 32e9, "cpu": 12e9}

Progress = Callable[[str], None]
Amount = Annotated[float, Meta(gt=0)]
MAX_INSTANCES = 4096  # per cluster; a decision looks at every pair
MAX_AMOUNT = 1e9  # of any number in `SimConfig`, in its own unit, except the seed
MIN_AMOUNT = 1e-9  # of any such number that is not 0


class SimConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a simulation: requests, cluster, model and hardware."""

    trace: Annotated[str | None, doc("requests in Mooncake's or Bailian's format")] = None
    trace_format: Annotated[TraceFormatName, doc("auto: by the fields of its first line")] = "auto"
    workload: Annotated[TextWorkload | None, doc("sessions of text, for a trace")] = None
    data: Annotated[str | None, doc("of the workload: its file or folder")] = None
    tokenizer: Annotated[str, doc("of the workload: a model's")] = "demo"
    sessions: Annotated[Positive, doc("of the workload")] = 200
    rate: Annotated[Amount, doc("sessions of the workload that begin per second")] = 1.0
    max_turns: Annotated[Positive, doc("of a session of the workload")] = 8
    max_output_tokens: Annotated[Positive, doc("of a turn of the workload")] = 512
    max_context_tokens: Annotated[Positive, doc("of a session of the workload")] = 8192
    seed: Annotated[NonNegative, doc("of sessions and arrivals")] = 0
    limit: Annotated[Positive | None, doc("requests of the trace; default: all")] = None
    speed: Annotated[Amount, doc("2: the trace comes twice as fast")] = 1.0
    colocated: Annotated[NonNegative, doc("instances")] = 0
    prefill: Annotated[NonNegative, doc("instances")] = 0
    decode: Annotated[NonNegative, doc("instances")] = 0
    policy: Annotated[Policy, doc("how an instance is chosen")] = "prompt-tree"
    caching: Annotated[Caching, doc("who keeps KV for later requests")] = "full"
    mode: Annotated[TransferMode, doc("how a transfer is cut into pieces")] = "by-request-agg"
    path: Annotated[Literal["shm", "nixl"], doc("between instances: one host, or many")] = "nixl"
    model: Annotated[str, doc("an architecture, as llama2-13b")] = "llama2-13b"
    hardware: Annotated[str, doc("of each instance, as h800")] = "h800"
    profile: Annotated[
        str | None, doc("measured costs of an instance, as GET /profile tells: for model, hardware")
    ] = None
    tp: Annotated[Positive, doc("devices of an instance")] = 2
    device_gb: Annotated[Amount, doc("memory of a device")] = 80.0
    hbm_blocks: Annotated[
        Positive | None, doc("of each instance; default: what its devices have room for")
    ] = None
    dram_gb: Annotated[float, Meta(ge=0), doc("host memory for KV of an instance")] = 256.0
    max_running: Annotated[Positive, doc("sequences per step")] = 256
    chunk_tokens: Annotated[Positive, doc("prefilled per step")] = 2048
    short_share: Annotated[
        float, Meta(ge=0, lt=1), doc("of it for the shortest prompt; 0: all in order, as vLLM")
    ] = 0.5
    mixed_steps: Annotated[
        bool, doc("prompts and answers in one step; without: answers wait for prompts")
    ] = True
    step_overhead: Annotated[
        float, Meta(ge=0), doc("seconds of the engine's host in each step, its devices idle")
    ] = 0.0
    start_seconds: Annotated[
        float, Meta(ge=0), doc("until a member that the planner adds is ready")
    ] = START_SECONDS


class SimResult(msgspec.Struct, frozen=True, kw_only=True):
    """Results of a simulation: times in seconds, ratios as shares of 1. Deterministic."""

    policy: str
    instances: int
    requests: int  # answered
    refused: int  # longer than an instance's KV memory, which a server answers with 400
    prompt_tokens: int
    cached_ratio: float  # of prompt tokens: cached on, or fetched to, the computing instance
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    tpot_mean: float
    tpot_p99: float
    jct_mean: float
    jct_p50: float
    jct_p99: float
    duration: float  # to the end of the last answer
    load_imbalance: float  # busiest instance's busy time over its role's mean; maximum over roles
    computed_tokens: int
    fetched_tokens: int  # pulled from third instances
    moved_tokens: int  # from prefill to decode instances
    served_ratio: float  # of requests: with TTFT and TPOT inside the planner's objectives
    role_changes: int = 0  # by the planner
    members_added: int = 0
    members_removed: int = 0


class RequestTimes(NamedTuple):
    """Seconds of one simulated request; `tpot`: None for an answer of one token."""

    ttft: float
    tpot: float | None
    jct: float


def simulate(
    config: SimConfig,
    progress: Progress,
    encode: Encode | None = None,
    planner: PlannerConfig | None = None,
    each: Callable[[RequestTimes], None] = lambda _: None,
) -> SimResult:
    """Run a simulation. `progress` gets a line per tenth, and one for each change of the planner;
    `encode`, needed for workloads of text, tokenizes. `planner`: its objectives count also where
    it is not enabled. `each` gets the times of every request, in the order of their ends. Raises
    ConfigError."""
    planner = planner or PlannerConfig()
    _check_numbers(config)
    form = None if config.trace is None else trace_format(Path(config.trace), config.trace_format)
    shapes, network = simulated(config, 16 if form is None else form.block_tokens)
    keys = BlockKeys(shapes[0].block_tokens)
    everything = list(_sessions(config, keys, encode, progress, form))
    sessions = _fitting(shapes[0], everything)
    cluster = SimCluster(shapes, config.policy, config.caching, network)
    decisions: list[Decision] = []
    total = _count(sessions)
    refused = _count(everything) - total
    if refused:
        room = shapes[0].hbm_blocks * shapes[0].block_tokens
        progress(f"{refused} requests are refused: longer than KV memory of {room} tokens")
    done: list[SimRequest] = []

    def ended(request: SimRequest) -> None:
        done.append(request)
        each(_times(request))
        count = len(done)
        if count * _PROGRESS_LINES // total > (count - 1) * _PROGRESS_LINES // total:
            at = cluster.timeline.now()
            progress(f"{config.policy}: {count} of {total} requests, {at:.0f} s simulated")

    def decided(decision: Decision) -> None:
        if decision.action is not Action.NOTHING:
            decisions.append(decision)
            progress(f"{decision.at:.0f} s: {decision.summary()}")

    if planner.enabled:
        delays = Delays(start=config.start_seconds)
        SimPlanner(cluster, planner, shapes[0], delays, decided).start()
    cluster.run(sessions, ended)
    return _summarise(config, cluster, done, refused, planner, decisions)


def simulated(config: SimConfig, block_tokens: int) -> tuple[list[InstanceShape], Network]:
    """Return a simulation's instances, and what moves KV between them. Raises ConfigError."""
    architecture, costs = _costs(config)
    network = Network(config.path, config.mode == "by-request-agg", architecture.layers)
    return _shapes(config, architecture, costs, block_tokens), network


def _check_numbers(config: SimConfig) -> None:
    """Raises ConfigError for numbers that are not finite, out of bounds, or too small."""
    try:
        msgspec.convert(msgspec.structs.asdict(config), SimConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from error
    for name, value in msgspec.structs.asdict(config).items():
        if not isinstance(value, int | float) or isinstance(value, bool) or name == "seed":
            continue
        if value and not MIN_AMOUNT <= value <= MAX_AMOUNT:
            raise ConfigError(f"{name}: {value} is not from {MIN_AMOUNT:g} to {MAX_AMOUNT:g}")
    instances = config.colocated + config.prefill + config.decode
    if instances > MAX_INSTANCES:
        raise ConfigError(f"{instances} instances, and at most {MAX_INSTANCES} can be simulated")


def _costs(config: SimConfig) -> tuple[Architecture, CostModel]:
    if config.profile is not None:
        try:
            costs = decode_profile(Path(config.profile).read_bytes()).costs
        except (OSError, ValueError, ProfileError) as error:  # ValueError: a NUL in its name
            raise ConfigError(f"{config.profile}: {error}") from error
        return costs.architecture, costs
    try:
        architecture = ARCHITECTURES[config.model]
    except KeyError:
        names = ", ".join(sorted(ARCHITECTURES))
        raise ConfigError(f"no architecture '{config.model}'; known: {names}") from None
    return architecture, cost_model(config.hardware, config.model, config.tp, config.chunk_tokens)


def _shapes(
    config: SimConfig, architecture: Architecture, costs: CostModel, block_tokens: int
) -> list[InstanceShape]:
    counts = {
        Role.COLOCATED: config.colocated,
        Role.PREFILL: config.prefill,
        Role.DECODE: config.decode,
    }
    if not any(counts.values()):
        raise ConfigError("no instances: give --colocated N, or --prefill N and --decode M")
    if config.decode and not (config.prefill or config.colocated):
        raise ConfigError("decode instances alone: give --prefill N too")
    # A tenth of device memory is for activations and the runtime.
    device = config.device_gb * _GB * config.tp * 0.9
    weights = architecture.parameters * architecture.weight_bytes
    block_bytes = block_tokens * architecture.kv_bytes_per_token
    hbm_blocks = config.hbm_blocks or int((device - weights) // block_bytes)
    if hbm_blocks < 1:
        raise ConfigError(
            f"the weights of {architecture.name} ({weights / _GB:.0f} GB) leave no room for KV "
            f"in {device / _GB:.0f} GB"
        )
    return [
        InstanceShape(
            id=InstanceId(f"{role}-{index}"),
            role=role,
            costs=costs,
            block_tokens=block_tokens,
            hbm_blocks=hbm_blocks,
            dram_blocks=int(config.dram_gb * _GB // block_bytes),
            max_running=config.max_running,
            chunk_tokens=config.chunk_tokens,
            short_share=config.short_share,
            swap_bytes_per_second=_swap_bandwidth(config),
            step_overhead=config.step_overhead,
            mixed_steps=config.mixed_steps,
            caches=role in KEEPING_ROLES[config.caching],
        )
        for role, count in counts.items()
        for index in range(count)
    ]


def _swap_bandwidth(config: SimConfig) -> float:
    """Bytes per second of an instance's swaps, sum over its devices, which share the KV."""
    hardware = HARDWARE.get(config.hardware)
    if hardware is None:  # needed even with a profile, which has no bandwidth of swaps
        raise ConfigError(f"no hardware '{config.hardware}'; known: {', '.join(sorted(HARDWARE))}")
    return _HOST_BANDWIDTH[config.hardware] * hardware.link_efficiency * config.tp


def _sessions(
    config: SimConfig,
    keys: BlockKeys,
    encode: Encode | None,
    progress: Progress,
    form: TraceFormat | None,
) -> Iterator[SimSession]:
    if (config.trace is None) == (config.workload is None):
        raise ConfigError("give either --trace FILE or --workload NAME")
    if config.trace is not None and form is not None:
        progress(f"reading {config.trace}")
        lines = read_trace(Path(config.trace), config.limit, form)
        yield from trace_sessions(lines, keys, config.speed, form)
        return
    assert encode is not None
    progress(f"choosing {config.sessions} sessions")
    texts = _texts(config, encode)
    yield from text_sessions(texts, keys, encode, config.rate, config.seed)


def _texts(config: SimConfig, encode: Encode) -> Sequence[Session]:
    limits = SessionLimits(
        max_turns=config.max_turns,
        max_output_tokens=config.max_output_tokens,
        max_context_tokens=config.max_context_tokens,
    )

    def count_tokens(text: str) -> int:
        return len(encode(text))

    assert config.workload is not None  # checked by `_sessions`
    choose = (config.sessions, config.seed, limits, count_tokens)
    return chosen_sessions(config.workload, config.data, *choose)


def _fitting(shape: InstanceShape, sessions: Sequence[SimSession]) -> list[SimSession]:
    """Return the sessions without the requests that a server refuses, since KV memory has no room
    for their prompts and answers. Later turns of a session are longer, and end with it. Raises
    ConfigError if nothing is left."""
    room = shape.hbm_blocks * shape.block_tokens
    shortest = min((_tokens(r) for one in sessions for r in one.requests), default=0)
    if shortest == 0:
        raise ConfigError("no requests in the data")
    if shortest > room:
        raise ConfigError(
            f"no request fits: the shortest, of {shortest} tokens, does not fit into KV memory "
            f"of {room}"
        )
    found = []
    for session in sessions:
        kept = tuple(itertools.takewhile(lambda one: _tokens(one) <= room, session.requests))
        if kept:
            found.append(replace(session, requests=kept))
    return found


def _tokens(request: SimRequest) -> int:
    return request.prompt_tokens + request.output_tokens


def _count(sessions: Sequence[SimSession]) -> int:
    return sum(len(session.requests) for session in sessions)


def _times(request: SimRequest) -> RequestTimes:
    first, each = latencies(request)
    tpot = each if request.output_tokens > 1 else None
    return RequestTimes(first, tpot, (request.end or 0.0) - request.arrival)


def latencies(request: SimRequest) -> tuple[float, float]:
    """Return TTFT and TPOT of a request that has ended; an answer of one token has a TPOT of 0."""
    assert request.first_token is not None
    assert request.end is not None
    answer = (request.end - request.first_token) / max(request.output_tokens - 1, 1)
    return request.first_token - request.arrival, answer


def _summarise(
    config: SimConfig,
    cluster: SimCluster,
    done: Sequence[SimRequest],
    refused: int,
    planner: PlannerConfig,
    decisions: Sequence[Decision],
) -> SimResult:
    ttft, tpot, jct, served = [], [], [], 0
    for request in done:
        first, each = latencies(request)
        ttft.append(first)
        jct.append((request.end or 0.0) - request.arrival)
        if request.output_tokens > 1:
            tpot.append(each)
        served += first <= planner.ttft and each <= planner.tpot
    prompt_tokens = sum(request.prompt_tokens for request in done)
    return SimResult(
        policy=config.policy,
        instances=len(cluster.instances),
        requests=len(done),
        refused=refused,
        prompt_tokens=prompt_tokens,
        cached_ratio=sum(request.cached_tokens for request in done) / prompt_tokens,
        ttft_mean=float(np.mean(ttft)),
        ttft_p50=float(np.percentile(ttft, 50)),
        ttft_p99=float(np.percentile(ttft, 99)),
        tpot_mean=float(np.mean(tpot)) if tpot else 0.0,
        tpot_p99=float(np.percentile(tpot, 99)) if tpot else 0.0,
        jct_mean=float(np.mean(jct)),
        jct_p50=float(np.percentile(jct, 50)),
        jct_p99=float(np.percentile(jct, 99)),
        duration=max(request.end or 0.0 for request in done),
        load_imbalance=_imbalance(cluster),
        computed_tokens=sum(one.computed_tokens for one in cluster.instances.values()),
        fetched_tokens=cluster.fetched_tokens,
        moved_tokens=sum(request.moved_tokens for request in done),
        served_ratio=served / len(done),
        role_changes=sum(len(one.changes) for one in decisions),
        members_added=sum(one.count for one in decisions if one.action is Action.ADD),
        members_removed=sum(one.count for one in decisions if one.action is Action.REMOVE),
    )


def _imbalance(cluster: SimCluster) -> float:
    worst = 1.0
    for role in Role:
        busy = [i.busy_seconds for i in cluster.instances.values() if i.shape.role is role]
        mean = sum(busy) / len(busy) if busy else 0.0
        if mean:
            worst = max(worst, max(busy) / mean)
    return worst
