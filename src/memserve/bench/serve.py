"""`memserve bench serve`: conversations against a server, or against clusters of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import aiohttp
import msgspec
from msgspec import Meta

from memserve.api.serving import Shutdown
from memserve.bench.loadgen import (
    LoadSettings,
    RequestRecord,
    generate_load,
    request_count,
    warm_up,
)
from memserve.bench.openai_client import OpenAIClient
from memserve.bench.report import ServingSummary, summarise
from memserve.clock import MonotonicClock
from memserve.cluster.local import LocalCluster
from memserve.config import ClusterConfig, NonNegative, Positive, doc
from memserve.errors import ConfigError, MemserveError
from memserve.models.resolve import ModelDirectory, Progress
from memserve.models.tokenizer import Tokenizer
from memserve.workloads.loogle import loogle_sessions, read_loogle
from memserve.workloads.react import react_sessions, read_react
from memserve.workloads.session import Session, SessionLimits, TokenRequest
from memserve.workloads.sharegpt import choose_sessions, read_sharegpt
from memserve.workloads.synthetic import SharedPrefixes, shared_prefix_requests
from memserve.workloads.trace import TraceScale, read_trace, token_requests

ASK_TIMEOUT = aiohttp.ClientTimeout(total=10.0)  # of the server's model list
# Progress is told about this many times in a run.
_PROGRESS_LINES = 10


Workload = Literal["sharegpt", "loogle", "react", "trace", "synthetic"]
Work = Sequence[Session | TokenRequest]


class BenchmarkError(MemserveError):
    """A server that cannot be measured."""


class ServeBenchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent, how fast, and where to."""

    workload: Annotated[Workload, doc("what is asked")] = "sharegpt"
    data: Annotated[str | None, doc("its file or folder; default: the installed ShareGPT")] = None
    url: Annotated[str, doc("the server's root, without /v1")] = "http://127.0.0.1:8000"
    rate: Annotated[float, Meta(gt=0), doc("sessions that begin per second, mean")] = 0.1
    trace_block_tokens: Annotated[
        int, Meta(ge=2), doc("of a trace: tokens for each of its blocks of 512")
    ] = 512
    sessions: Annotated[Positive, doc("how many")] = 10
    seed: Annotated[NonNegative, doc("of the choice of sessions and of their arrival")] = 0
    min_turns: Annotated[Positive, doc("of a session")] = 2
    max_turns: Annotated[Positive, doc("of a session; more are cut off")] = 6
    max_output_tokens: Annotated[Positive, doc("of a turn; more are cut off")] = 64
    max_context_tokens: Annotated[Positive, doc("of a session; turns beyond are cut off")] = 2048
    replay_answers: Annotated[bool, doc("history from the data, not from the server")] = False
    warm_up: Annotated[NonNegative, doc("requests before the measured ones")] = 2

    def limits(self) -> SessionLimits:
        return SessionLimits(
            min_turns=self.min_turns,
            max_turns=self.max_turns,
            max_output_tokens=self.max_output_tokens,
            max_context_tokens=self.max_context_tokens,
        )


class ServeRun(msgspec.Struct, frozen=True):
    """One measured run."""

    name: str
    model: str  # as the server calls it
    cluster: ClusterConfig | None  # None: a server that somebody else has started
    summary: ServingSummary
    requests: tuple[RequestRecord, ...]


class ServeBenchResult(msgspec.Struct, frozen=True):
    """Runs of the same workload."""

    runs: tuple[ServeRun, ...]


def load_sessions(config: ServeBenchConfig, model: ModelDirectory, progress: Progress) -> Work:
    """The workload. The model's tokenizer says how long texts are. Raises ConfigError."""
    progress(f"choosing {config.sessions} sessions")
    if config.workload == "synthetic":
        shape = SharedPrefixes(
            requests=config.sessions, rate=config.rate, output_tokens=config.max_output_tokens
        )
        return tuple(shared_prefix_requests(shape, config.seed))
    if config.workload == "trace":
        return _trace(config)
    tokenizer = Tokenizer.load(model.path)
    path = Path(config.data) if config.data else None

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    if config.workload == "sharegpt":
        conversations = read_sharegpt(path)
        return choose_sessions(
            conversations, config.sessions, config.seed, config.limits(), count_tokens
        )
    folder = _required_data(config)
    choose = (config.sessions, config.seed, config.limits(), count_tokens)
    if config.workload == "loogle":
        return loogle_sessions(read_loogle(folder), *choose)
    return react_sessions(read_react(folder), *choose)


def _trace(config: ServeBenchConfig) -> tuple[TokenRequest, ...]:
    """The first requests of a trace, at `rate` per second in the mean."""
    lines = list(read_trace(_required_data(config), config.sessions))
    if not lines:
        raise ConfigError(f"{config.data}: no requests in it")
    taken = max(lines[-1].timestamp, 1) / 1000  # seconds
    scale = TraceScale(
        block_tokens=config.trace_block_tokens,
        time=len(lines) / config.rate / taken,
        max_output_tokens=config.max_output_tokens,
    )
    return tuple(token_requests(iter(lines), scale))


def _required_data(config: ServeBenchConfig) -> Path:
    if config.data is None:
        raise ConfigError(f"the workload {config.workload} needs --data: its file or folder")
    return Path(config.data)


async def measure_server(
    name: str, config: ServeBenchConfig, url: str, sessions: Work, progress: Progress
) -> ServeRun:
    """Send the workload to the server at `url`. Raises BenchmarkError if it cannot be measured."""
    clock = MonotonicClock()
    total = sum(map(request_count, sessions))
    done = 0

    def finished(record: RequestRecord) -> None:
        nonlocal done
        done += 1
        if record.error is not None:
            progress(f"{name}: session {record.session}, turn {record.turn}: {record.error}")
        elif done * _PROGRESS_LINES // total > (done - 1) * _PROGRESS_LINES // total:
            progress(f"{name}: {done} of {total} requests")

    model = await _served_model(url)
    async with OpenAIClient(url, model, clock) as client:
        if (error := await warm_up(client, config.warm_up)) is not None:
            raise BenchmarkError(f"{url} does not answer a warm-up request: {error}")
        settings = LoadSettings(config.rate, config.seed, config.replay_answers)
        load = await generate_load(client, sessions, settings, clock, finished)
    return ServeRun(name, model, None, summarise(load), load.records)


async def compare_caching(
    config: ServeBenchConfig,
    cluster: ClusterConfig,
    sessions: Work,
    progress: Progress,
) -> ServeBenchResult:
    """Measure two clusters of the same configuration, one after the other: caching on, and off."""
    runs = []
    for caching in ("full", "off"):
        name = f"caching {caching}"
        cache = msgspec.structs.replace(cluster.cache, caching=caching)
        gateway = msgspec.structs.replace(cluster.gateway, port=0)
        own = msgspec.structs.replace(cluster, cache=cache, gateway=gateway)
        runs.append(await _measure_own(name, config, own, sessions, progress))
    return ServeBenchResult(tuple(runs))


async def _measure_own(
    name: str,
    config: ServeBenchConfig,
    cluster: ClusterConfig,
    sessions: Work,
    progress: Progress,
) -> ServeRun:
    started = LocalCluster(cluster, Shutdown(), progress)
    try:
        await started.start()
        measuring = asyncio.ensure_future(
            measure_server(name, config, started.url, sessions, progress)
        )
        run = await started.or_failure(measuring)
        return msgspec.structs.replace(run, cluster=cluster)
    finally:
        await started.stop()


class _Model(msgspec.Struct, frozen=True):
    id: str


class _ModelList(msgspec.Struct, frozen=True):
    data: tuple[_Model, ...]


async def _served_model(url: str) -> str:
    try:
        async with (
            aiohttp.ClientSession(timeout=ASK_TIMEOUT) as session,
            session.get(f"{url.rstrip('/')}/v1/models") as answer,
        ):
            return msgspec.json.decode(await answer.read(), type=_ModelList).data[0].id
    except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError, IndexError) as error:
        raise BenchmarkError(f"{url} does not name its models: {error}") from error
