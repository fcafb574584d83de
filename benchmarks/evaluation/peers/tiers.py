"""vLLM servers with KV memory behind them, beside each other: ours, and vLLM's own.

All compute with the same vLLM, the same cores and the same KV memory of vLLM's own; what differs
is what is behind it, and what chooses the server.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from evaluation.peers.affinity import pin_back
from evaluation.peers.process import PeerFailed, PeerServer
from evaluation.peers.servers import (
    LMCACHE_VARIABLES,
    ROUTER_SECONDS,
    ours,
    ready,
    start_lmcache,
    start_router,
    start_split_proxy,
    start_vllm,
)
from evaluation.peers.serving import OURS, Contest, Loads, PeerRun, rounds
from evaluation.peers.vllm import START_SECONDS
from memserve.bench.measure import BenchmarkError, served_model
from memserve.bench.openai_client import OpenAIClient
from memserve.bench.vllm_engine import (
    BLOCK_TOKENS,
    LARGE_KV,
    own_instance,
    python_of,
    vllm_arguments,
    why_missing,
)
from memserve.bench.work import Work
from memserve.clock import MonotonicClock
from memserve.config import InstanceConfig, Policy, parse_bytes
from memserve.hosts import free_port
from memserve.models.resolve import ModelDirectory, Progress
from memserve.types import Role

_clock = MonotonicClock()
# Of a step, so that a small KV memory has room for it beside the longest request.
_STEP_TOKENS = 512
_FIRST_TOKENS = 300  # of the prompts that go before all: connections between servers are made
_ASK_SECONDS = 60.0  # for an import
_LMCACHE_SECONDS = 60.0  # for its server's imports
_LMCACHE_CONNECTOR = "lmcache.integration.vllm.lmcache_mp_connector"
_NIXL = "from nixl._api import nixl_agent"

HOST_NAMES = (f"2 vLLM with {OURS}", "2 vLLM, vllm-router", "2 vLLM offloading, vllm-router")
LMCACHE_NAMES = (f"2 vLLM with {OURS}", "2 vLLM with LMCache, vllm-router")
SPLIT_NAMES = (f"vLLM P and D with {OURS}", "vLLM P and D with NixlConnector")


class TierSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How much memory there is, of each server."""

    kv: str = "40MB"  # of vLLM's own, in the contest with host memory behind it
    dram: str = "512MiB"  # behind it


@dataclass(frozen=True, slots=True)
class _Servers:
    """What the servers of a contest have in common, and which of them are not there."""

    stack: AsyncExitStack
    loads: Loads
    model: ModelDirectory
    progress: Progress
    skipped: dict[str, str] = field(default_factory=dict)

    def vllm(
        self,
        core: int,
        arguments: Sequence[str],
        variables: Mapping[str, str] | None = None,
        peer: str = "vllm",
    ) -> PeerServer:
        return start_vllm(
            *(self.stack, self.model.path, self.loads.dtype, (core,)),
            arguments=arguments,
            variables=variables,
            peer=peer,
        )

    async def own(self, instances: Sequence[InstanceConfig], policy: Policy = "prompt-tree") -> str:
        """The URL of our gateway in front of these instances. Call it before other servers are
        started: instances measure their cost models, which needs a quiet machine."""
        cluster = ours(self.model, self.loads.dtype, instances, self.progress, policy)
        return await self.stack.enter_async_context(cluster)

    async def are_ready(self, name: str, servers: Sequence[PeerServer]) -> bool:
        """Not if one of them is not."""
        peers = [(name, server) for server in servers]
        await ready(peers, self.skipped, START_SECONDS, self.progress)
        return name not in self.skipped

    async def routed(self, name: str, pair: Sequence[PeerServer]) -> dict[str, str]:
        """The URL of vllm-router in front of them, if all are ready."""
        if not await self.are_ready(name, pair):
            return {}
        return await self.behind(name, start_router(self.stack, [each.url for each in pair]))

    async def behind(self, name: str, front: PeerServer) -> dict[str, str]:
        """The URL of what is in front of servers, if it is ready."""
        return await ready([(name, front)], self.skipped, ROUTER_SECONDS, self.progress)


async def host_memory(
    loads: Loads,
    tiers: TierSettings,
    model: ModelDirectory,
    cores: Sequence[int],
    work: Work,
    progress: Progress,
) -> Contest:
    """Two vLLM of one core each, whose own KV memory is small: with ours behind it and our gateway,
    with nothing behind it, and with vLLM's own offloading, each of these behind vllm-router."""
    name = "Two vLLM of one core, host memory behind them"
    async with AsyncExitStack() as stack:
        servers = _Servers(stack, loads, model, progress)
        return await _contest(name, HOST_NAMES, servers, tiers, cores, work, _with_host_memory)


async def _contest(
    name: str,
    names: Sequence[str],
    servers: _Servers,
    tiers: TierSettings,
    cores: Sequence[int],
    work: Work,
    start: Callable[[_Servers, TierSettings, tuple[int, int]], Awaitable[dict[str, str]]],
) -> Contest:
    """Of the servers that `start` starts on two cores; `names`: of all that may take part."""
    started = _clock.now()
    urls: dict[str, str] = {}
    if (why := why_missing("vllm")) is not None:
        servers.skipped.update(dict.fromkeys(names, why))
    else:
        urls = await start(servers, tiers, (cores[0], cores[-1]))
    runs = await _rounds(servers, started, urls, work)
    return Contest(name, (1, 1), runs, servers.skipped, tiers=True)


async def _with_host_memory(
    servers: _Servers, tiers: TierSettings, cores: Sequence[int]
) -> dict[str, str]:
    arguments = vllm_arguments(parse_bytes(tiers.kv), _STEP_TOKENS)
    offloads = (*arguments, *offloading_flag(tiers.dram))
    own, plain, offloading = HOST_NAMES
    instances = [own_instance(core, tiers.dram, arguments) for core in cores]
    urls = {own: await servers.own(instances)}
    pairs: dict[str, list[PeerServer]] = {}
    if (why := why_missing("routers")) is not None:
        servers.skipped.update(dict.fromkeys((plain, offloading), why))
    else:
        pairs[plain] = [servers.vllm(core, arguments) for core in cores]
        # One at first: a second would only repeat what the first says against it.
        pairs[offloading] = [servers.vllm(cores[0], offloads)]
    for name, pair in pairs.items():
        if await servers.are_ready(name, pair):
            pair += [servers.vllm(core, offloads) for core in cores[len(pair) :]]
            urls |= await servers.routed(name, pair)
    return urls


async def beside_lmcache(
    loads: Loads,
    tiers: TierSettings,
    model: ModelDirectory,
    cores: Sequence[int],
    work: Work,
    progress: Progress,
) -> Contest:
    """The same two vLLM with ours and with LMCache behind them: a contest of their own, because
    six vLLM servers need 24 GB."""
    name = "Two vLLM of one core, LMCache behind them"
    async with AsyncExitStack() as stack:
        servers = _Servers(stack, loads, model, progress)
        return await _contest(name, LMCACHE_NAMES, servers, tiers, cores, work, _with_lmcache)


async def _with_lmcache(
    servers: _Servers, tiers: TierSettings, cores: Sequence[int]
) -> dict[str, str]:
    arguments = vllm_arguments(parse_bytes(tiers.kv), _STEP_TOKENS)
    own, lmcache = LMCACHE_NAMES
    instances = [own_instance(core, tiers.dram, arguments) for core in cores]
    urls = {own: await servers.own(instances)}
    pair: list[PeerServer] = []
    if (why := why_missing("lmcache") or why_missing("routers")) is not None:
        servers.skipped[lmcache] = why
    elif port := await _lmcache_port(servers, lmcache, len(cores) * parse_bytes(tiers.dram)):
        asked = (*arguments, *lmcache_flag(port))
        pair = [servers.vllm(core, asked, LMCACHE_VARIABLES, "lmcache") for core in cores]
    return urls | (await servers.routed(lmcache, pair) if pair else {})


async def _lmcache_port(servers: _Servers, name: str, size: int) -> int | None:
    """Of one LMCache server for both, as LMCache has it for a machine, with the memory that two of
    ours have; None if it is not there."""
    port = free_port()
    cache = start_lmcache(servers.stack, port, size, BLOCK_TOKENS)
    try:
        await asyncio.to_thread(cache.wait_listening, _LMCACHE_SECONDS)
    except PeerFailed as error:
        servers.skipped[name] = str(error)
        return None
    return port


async def prefill_and_decode(
    loads: Loads,
    tiers: TierSettings,
    model: ModelDirectory,
    cores: Sequence[int],
    work: Work,
    progress: Progress,
) -> Contest:
    """A vLLM that computes prompts and one that decodes, on a core each: KV handed over by ours,
    and by vLLM's NixlConnector."""
    name = "Prefill and decode on a core each"
    async with AsyncExitStack() as stack:
        servers = _Servers(stack, loads, model, progress)
        return await _contest(name, SPLIT_NAMES, servers, tiers, cores, work, _split)


async def _split(servers: _Servers, tiers: TierSettings, cores: tuple[int, int]) -> dict[str, str]:
    arguments = vllm_arguments(LARGE_KV)
    own, nixl = SPLIT_NAMES
    roles = zip((Role.PREFILL, Role.DECODE), cores, strict=True)
    instances = [own_instance(core, tiers.dram, arguments, role) for role, core in roles]
    # Whatever is cached where, prompts are then computed on the one and decoded on the other.
    urls = {own: await servers.own(instances, "least-load")}
    pair: list[PeerServer] = []
    if (why := await asyncio.to_thread(why_no_nixl)) is not None:
        servers.skipped[nixl] = why
    else:
        more = (*arguments, *nixl_flag())
        pair = [servers.vllm(core, more, nixl_variables(free_port())) for core in cores]
    if pair and await servers.are_ready(nixl, pair):
        for core, server in zip(cores, pair, strict=True):
            # The connector takes the thread that computes to the machine's last core.
            pin_back(server.group, core)
        proxy = start_split_proxy(servers.stack, pair[0].url, pair[1].url)
        urls |= await servers.behind(nixl, proxy)
    return urls


async def _rounds(
    servers: _Servers, started: float, urls: dict[str, str], work: Work
) -> tuple[PeerRun, ...]:
    """As all contests have them, behind a first prompt for each server."""
    for name, url in urls.items():
        if (error := await first_prompt(url)) is None:
            continue
        if OURS in name:
            raise BenchmarkError(f"{name}: {error}")
        servers.skipped[name] = error
    return await rounds(*(servers.loads, started, urls, work, servers.skipped, servers.progress))


async def first_prompt(url: str) -> str | None:
    """Ask what is long enough to be handed over, twice: a pair of servers then knows each other.
    What went wrong."""
    try:
        model = (await served_model(url)).id
    except BenchmarkError as error:
        return str(error)
    async with OpenAIClient(url, model, _clock) as client:
        for seed in range(2):
            prompt = [100 + (seed * _FIRST_TOKENS + at) % 1000 for at in range(_FIRST_TOKENS)]
            answer = await client.complete(prompt, 4)
            if answer.error is not None:
                return answer.error
    return None


# --- how vLLM is asked ---------------------------------------------------------------------


def offloading_flag(dram: str) -> tuple[str, str]:
    """vLLM's own memory behind its KV memory."""
    return _connector(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": parse_bytes(dram)},
    )


def lmcache_flag(port: int) -> tuple[str, str]:
    """For LMCache's server at this port. LMCache's own connector: vLLM's copy of it takes no model
    with sliding windows unless their KV is kept whole."""
    return _connector(
        kv_connector="LMCacheMPConnector",
        kv_role="kv_both",
        kv_connector_module_path=_LMCACHE_CONNECTOR,
        kv_connector_extra_config={
            "lmcache.mp.host": "tcp://127.0.0.1",
            "lmcache.mp.port": port,
            # Its default on a CPU is engine_driven, which takes one KV group alone.
            "lmcache.mp.mp_transfer_mode": "lmcache_driven",
        },
    )


def nixl_flag() -> tuple[str, str]:
    return _connector(kv_connector="NixlConnector", kv_role="kv_both", kv_buffer_device="cpu")


def nixl_variables(port: int) -> dict[str, str]:
    """Where servers ask each other for their memory's addresses: of each, its own."""
    return {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}


def _connector(**settings: object) -> tuple[str, str]:
    return "--kv-transfer-config", json.dumps(settings)


def why_no_nixl(python: Path | None = None) -> str | None:
    """None where vLLM's environment has a NIXL that can be loaded."""
    command = (str(python or python_of("vllm")), "-W", "ignore", "-c", _NIXL)
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            check=False,
            timeout=_ASK_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"vLLM's environment has no NIXL: {error}"
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
    return f"vLLM's environment has no NIXL: {said[0]}"
