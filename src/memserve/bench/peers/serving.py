"""Servers beside each other: the same model, cores, threads and requests, in turns.

All servers of a contest run during all of it; one at a time is sent requests. Idle ones cost
nothing that shows. Every round has another order and a cache of its own.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import msgspec

from memserve.bench.measure import BenchmarkError, measure_server, started_cluster
from memserve.bench.peers.places import ROOT, python_of, why_missing
from memserve.bench.peers.process import PeerFailed, PeerServer, serving
from memserve.bench.peers.vllm import START_SECONDS, VllmSettings, vllm_command, vllm_environment
from memserve.bench.report import ServingSummary
from memserve.bench.work import ServeBenchConfig, Work
from memserve.clock import MonotonicClock
from memserve.config import ClusterConfig, Dtype, GatewayConfig, InstanceConfig, ModelConfig
from memserve.models.chat_template import DEFAULT_CHAT_TEMPLATE
from memserve.models.resolve import ModelDirectory, Progress

_clock = MonotonicClock()
OURS = "memserve"
_ROUTER_SECONDS = 60.0  # to find its instances
_TRANSFORMERS = "memserve.bench.peers.transformers_process"
_CONTEXT = 4096  # tokens

Load = Literal["open", "closed"]
LOADS: tuple[Load, ...] = ("open", "closed")


class Loads(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent in each round: sessions at a rate, then so many at a time."""

    dtype: Dtype
    repeats: int
    seed: int
    rate: float
    concurrency: int
    sessions: int
    max_turns: int
    max_output_tokens: int
    seconds: float = float("inf")  # of a contest, its start included: no round is begun behind it


class PeerRun(msgspec.Struct, frozen=True):
    """One server under one load."""

    server: str
    load: Load
    repeat: int
    summary: ServingSummary


class Contest(msgspec.Struct, frozen=True):
    """Servers on the same cores."""

    name: str
    threads: tuple[int, ...]  # of each instance
    runs: tuple[PeerRun, ...]
    skipped: dict[str, str]


async def one_instance(
    loads: Loads, model: ModelDirectory, cores: Sequence[int], work: Work, progress: Progress
) -> Contest:
    """One instance with all cores: ours, vLLM with and without its prefix cache, and generate."""
    started = _clock.now()
    name = f"One instance on {len(cores)} cores"
    async with AsyncExitStack() as stack:
        skipped: dict[str, str] = {}
        peers: list[tuple[str, PeerServer]] = []
        if (why := why_missing("vllm")) is not None:
            skipped["vLLM"] = why
        else:
            for title, caching in (("vLLM", True), ("vLLM, no prefix cache", False)):
                peers.append((title, _vllm(stack, loads, model.path, cores, caching)))
        peers.append(("Transformers generate", start_generate(stack, loads, model.path, cores)))
        ours = stack.enter_async_context(_ours(loads, model, [cores], progress))
        urls = {OURS: await ours}
        urls |= await _ready(peers, skipped, START_SECONDS, progress)
        runs = await _rounds(loads, started, urls, work, skipped, progress)
    return Contest(name, (len(cores),), runs, skipped)


async def two_instances(
    loads: Loads, model: ModelDirectory, cores: Sequence[int], work: Work, progress: Progress
) -> Contest:
    """An instance on each of two cores: ours behind our gateway, vLLM behind vllm-router."""
    started = _clock.now()
    name = "Two instances of one core"
    each = [(cores[0],), (cores[-1],)]
    async with AsyncExitStack() as stack:
        skipped: dict[str, str] = {}
        pair = "2 vLLM, vllm-router"
        missing = [why for peer in ("vllm", "routers") if (why := why_missing(peer)) is not None]
        peers: list[tuple[str, PeerServer]] = []
        if missing:
            skipped[pair] = "; ".join(missing)
        else:
            peers = [(pair, _vllm(stack, loads, model.path, one, True)) for one in each]
        ours = stack.enter_async_context(_ours(loads, model, each, progress))
        urls = {f"2 {OURS}, its gateway": await ours}
        found = await _ready(peers, skipped, START_SECONDS, progress)
        if pair in found and pair not in skipped:
            router = _router(stack, [server.url for _, server in peers])
            urls |= await _ready([(pair, router)], skipped, _ROUTER_SECONDS, progress)
        runs = await _rounds(loads, started, urls, work, skipped, progress)
    return Contest(name, (1, 1), runs, skipped)


async def _rounds(
    loads: Loads,
    started: float,
    urls: dict[str, str],
    work: Work,
    skipped: dict[str, str],
    progress: Progress,
) -> tuple[PeerRun, ...]:
    """All servers under all loads, so often as is asked for; every second time backwards."""
    found: list[PeerRun] = []
    begun = _clock.now()
    for repeat in range(loads.repeats):
        now = _clock.now()
        if repeat and now + (now - begun) / repeat > started + loads.seconds:
            progress(f"no time for more than {repeat} of {loads.repeats} rounds")
            break
        for load in LOADS:
            config = load_config(loads, load)
            order = list(urls) if repeat % 2 == 0 else list(urls)[::-1]
            for server in order:
                if server in skipped:
                    continue
                progress(f"{server}, {load} loop, {repeat + 1} of {loads.repeats}")
                try:
                    run = await measure_server(
                        server, config, urls[server], work, progress, repeat=repeat
                    )
                    if run.summary.failed:
                        raise PeerFailed(f"{run.summary.failed} requests failed")
                except (BenchmarkError, PeerFailed) as error:
                    if OURS in server:
                        raise
                    skipped[server] = str(error)
                else:
                    found.append(PeerRun(server, load, repeat, run.summary))
    return tuple(found)


def load_config(loads: Loads, load: Load) -> ServeBenchConfig:
    return ServeBenchConfig(
        rate=loads.rate,
        sessions=loads.sessions,
        seed=loads.seed,
        max_turns=loads.max_turns,
        max_output_tokens=loads.max_output_tokens,
        # All are asked the same, whatever they answer.
        replay_answers=True,
        # More than one: each run then has a cache of its own.
        repeats=max(2, loads.repeats),
        concurrency=loads.concurrency if load == "closed" else None,
    )


# --- servers ------------------------------------------------------------------------------


@asynccontextmanager
async def _ours(
    loads: Loads, model: ModelDirectory, cores: Sequence[Sequence[int]], progress: Progress
) -> AsyncIterator[str]:
    """As `memserve up` starts it: a gateway, and an instance for each of these sets of cores."""
    instances = tuple(
        InstanceConfig(threads=len(one), cpus=tuple(one), profile="off") for one in cores
    )
    wanted = ModelConfig(path=str(model.path), dtype=loads.dtype, max_model_len=_CONTEXT)
    cluster = ClusterConfig(
        model=wanted, gateway=GatewayConfig(access_log=False), instance=instances
    )
    async with started_cluster(cluster, progress) as started:
        yield started.url


def _vllm(
    stack: AsyncExitStack, loads: Loads, model: Path, cores: Sequence[int], caching: bool
) -> PeerServer:
    folder = stack.enter_context(TemporaryDirectory(prefix="memserve-peer-"))
    settings = VllmSettings(
        model=str(model),
        port=_free_port(),
        dtype=loads.dtype,
        max_model_len=_CONTEXT,
        prefix_caching=caching,
        extra=_template(model, Path(folder)),
    )
    command = vllm_command(python_of("vllm"), settings)
    environment = vllm_environment(len(cores), cores)
    return stack.enter_context(serving("vLLM", command, environment, settings.port))


def _template(model: Path, folder: Path) -> tuple[str, ...]:
    """vLLM serves no chats with a model that has no template; ours has one for such models."""
    settings = (model / "tokenizer_config.json").read_text(encoding="utf-8")
    if (model / "chat_template.jinja").exists() or '"chat_template"' in settings:
        return ()
    file = folder / "template.jinja"
    file.write_text(DEFAULT_CHAT_TEMPLATE, encoding="utf-8")
    return "--chat-template", str(file)


def start_generate(
    stack: AsyncExitStack, loads: Loads, model: Path, cores: Sequence[int]
) -> PeerServer:
    port = _free_port()
    where = (str(len(cores)), ",".join(map(str, cores)), str(port))
    command = [sys.executable, "-P", "-m", _TRANSFORMERS, str(model), loads.dtype, *where]
    environment = vllm_environment(len(cores), cores)
    return stack.enter_context(serving("Transformers", command, environment, port))


def _router(stack: AsyncExitStack, urls: Sequence[str]) -> PeerServer:
    port = _free_port()
    command = [
        *(str(ROOT / "routers" / "bin" / "vllm-router"), "--host", "127.0.0.1"),
        *("--port", str(port), "--prometheus-port", str(_free_port()), "--log-level", "error"),
        *("--policy", "cache_aware", "--worker-urls", *urls),
    ]
    environment = vllm_environment(1, ())
    return stack.enter_context(serving("vllm-router", command, environment, port))


async def _ready(
    peers: Sequence[tuple[str, PeerServer]],
    skipped: dict[str, str],
    seconds: float,
    progress: Progress,
) -> dict[str, str]:
    """URLs of those that have come up; the others are skipped."""
    found = {}
    for name, server in peers:
        progress(f"waiting for {name}")
        try:
            await asyncio.to_thread(server.wait_ready, seconds)
        except PeerFailed as error:
            skipped[name] = str(error)
        else:
            found[name] = server.url
    return found


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
