"""Measurement of a running server, and of clusters that are started for it."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Annotated, TypeVar

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
from memserve.bench.openai_client import OpenAIClient, api_key_headers
from memserve.bench.processes import ProcessMeter, ProcessStats
from memserve.bench.report import ServingSummary, summarise
from memserve.bench.work import ServeBenchConfig, Work
from memserve.clock import MonotonicClock
from memserve.cluster.cluster import Cluster
from memserve.cluster.local import LocalBackend
from memserve.config import ClusterConfig
from memserve.errors import MemserveError
from memserve.models.resolve import Progress

ASK_TIMEOUT = aiohttp.ClientTimeout(total=10.0)  # of the server's model list
GENERATOR = "load generator"
# Progress is printed about this many times in a run.
_PROGRESS_LINES = 10

_T = TypeVar("_T")


class BenchmarkError(MemserveError):
    """The server cannot be measured."""


class ServeRun(msgspec.Struct, frozen=True):
    """One measured run."""

    name: str
    model: str  # name in the server's API
    cluster: ClusterConfig | None  # None: a server that ran already
    summary: ServingSummary
    requests: tuple[RequestRecord, ...]
    repeat: int = 0
    seed: int = 0  # of the arrivals
    processes: tuple[ProcessStats, ...] = ()  # empty for a server that ran already


class StartedCluster:
    """A running cluster that can be measured any number of times."""

    def __init__(self, cluster: Cluster, config: ClusterConfig) -> None:
        self._cluster = cluster
        self._config = config

    @property
    def url(self) -> str:
        return self._cluster.url

    async def or_failure(self, work: Awaitable[_T]) -> _T:
        """Return the result of `work`. Raises ClusterError if a process ends before."""
        return await self._cluster.or_failure(work)

    async def run(
        self, name: str, config: ServeBenchConfig, work: Work, progress: Progress, repeat: int = 0
    ) -> ServeRun:
        """Measure the cluster once. Raises BenchmarkError, ClusterError."""
        pids = {**self._cluster.pids(), GENERATOR: os.getpid()}
        measuring = measure_server(name, config, self.url, work, progress, repeat=repeat, pids=pids)
        return msgspec.structs.replace(await self.or_failure(measuring), cluster=self._config)


@asynccontextmanager
async def started_cluster(
    config: ClusterConfig, progress: Progress
) -> AsyncIterator[StartedCluster]:
    """Start a cluster on a free port, and end it. Raises ClusterError."""
    # Hand-overs of the proof would be counted with the workload's.
    gateway = msgspec.structs.replace(config.gateway, port=0, prove_handover=False)
    config = msgspec.structs.replace(config, gateway=gateway)
    cluster = Cluster(config, LocalBackend(config, progress), Shutdown(), progress)
    try:
        await cluster.start()
        yield StartedCluster(cluster, config)
    finally:
        await cluster.stop()


async def measure_cluster(
    name: str,
    config: ServeBenchConfig,
    cluster: ClusterConfig,
    work: Work,
    progress: Progress,
    then: Callable[[StartedCluster], Awaitable[_T]],
) -> tuple[tuple[ServeRun, ...], _T]:
    """Start a cluster; return the runs of all repeats, and the result of `then`, called before the
    cluster ends.

    Raises BenchmarkError, ClusterError.
    """
    async with started_cluster(cluster, progress) as started:
        runs = [
            await started.run(name, config, work, progress, repeat)
            for repeat in range(config.repeats)
        ]
        return tuple(runs), await then(started)


async def nothing_else(_: StartedCluster) -> None:
    """Do nothing: a `then` for `measure_cluster`."""


async def measure_repeats(
    name: str, config: ServeBenchConfig, work: Work, progress: Progress
) -> tuple[ServeRun, ...]:
    """Measure the server at `config.url`, `config.repeats` times."""
    return tuple(
        [
            await measure_server(name, config, config.url, work, progress, repeat=repeat)
            for repeat in range(config.repeats)
        ]
    )


async def measure_server(
    name: str,
    config: ServeBenchConfig,
    url: str,
    work: Work,
    progress: Progress,
    *,
    repeat: int = 0,
    pids: dict[str, int] | None = None,
) -> ServeRun:
    """Send the workload to the server at `url`. `pids`: processes of this machine to meter.

    If `config` has several repeats, each finds the cache empty. Raises BenchmarkError.
    """
    clock = MonotonicClock()
    total = sum(map(request_count, work))
    done, began = 0, clock.now()

    def finished(record: RequestRecord) -> None:
        nonlocal done
        done += 1
        if record.error is not None:
            progress(f"{name}: session {record.session}, turn {record.turn}: {record.error}")
        elif done * _PROGRESS_LINES // total > (done - 1) * _PROGRESS_LINES // total:
            left = time_left(done, total, clock.now() - began)
            progress(f"{name}: {done} of {total} requests{left}")

    model = (await served_model(url)).id
    salt = None if config.repeats == 1 else uuid.uuid4().hex
    async with OpenAIClient(url, model, clock, salt) as client:
        if (error := await warm_up(client, config.warm_up)) is not None:
            raise BenchmarkError(f"{url} does not answer a warm-up request: {error}")
        seed = config.seed + repeat
        settings = LoadSettings(config.rate, seed, config.replay_answers, config.concurrency)
        meter = ProcessMeter(pids or {})
        began = clock.now()
        load = await generate_load(client, work, settings, clock, finished)
        processes = meter.read()
    summary = summarise(load, config.slo())
    return ServeRun(name, model, None, summary, load.records, repeat, seed, processes)


def time_left(done: int, total: int, seconds: float) -> str:
    """Return what to say of the time that the rest takes, if it goes on as in the last `seconds`;
    nothing at the end."""
    left = seconds / done * (total - done)
    if done == total:
        return ""
    return f", about {left:.0f} s left" if left < 100 else f", about {left / 60:.0f} min left"


def require_answers(runs: Iterable[ServeRun]) -> None:
    """Raise BenchmarkError for a run in which no request was answered, with its first error."""
    for run in runs:
        errors = [record.error for record in run.requests]
        if errors and None not in errors:
            raise BenchmarkError(f"{run.name}: all {len(errors)} requests failed: {errors[0]}")


class ServedModel(msgspec.Struct, frozen=True):
    """A model as `/v1/models` lists it. `vocab_size`: None from servers that do not tell it."""

    id: str
    vocab_size: Annotated[int, Meta(ge=2)] | None = None


class _ModelList(msgspec.Struct, frozen=True):
    data: tuple[ServedModel, ...]


async def served_model(url: str) -> ServedModel:
    """Return a server's first model. Raises BenchmarkError."""
    try:
        async with (
            aiohttp.ClientSession(timeout=ASK_TIMEOUT, headers=api_key_headers()) as session,
            session.get(f"{url.rstrip('/')}/v1/models") as answer,
        ):
            return msgspec.json.decode(await answer.read(), type=_ModelList).data[0]
    except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError, IndexError) as error:
        raise BenchmarkError(f"{url} does not name its models: {error}") from error
