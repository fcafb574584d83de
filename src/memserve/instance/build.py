"""Construction of an instance with the built-in engine from a configuration."""

from __future__ import annotations

import gc
import logging
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal

import msgspec
import torch

from memserve.api.handoff import PoolPeer
from memserve.config import (
    KEEPING_ROLES,
    ClusterConfig,
    Dtype,
    InstanceConfig,
    ModelConfig,
    available_cores,
)
from memserve.engine.batch import BatchLimits
from memserve.engine.dtype import choose_dtype
from memserve.engine.engine import Engine, EngineSettings
from memserve.engine.model import load_model
from memserve.engine.team import use_one_thread, with_team
from memserve.errors import ConfigError, ModelError
from memserve.grammars.compiler import GrammarCompiler
from memserve.host_memory import host_memory
from memserve.hosts import bracketed, reachable_endpoint
from memserve.instance.grammars import Grammars
from memserve.instance.kv_events import KVEventPublisher
from memserve.instance.memory_plan import (
    Machine,
    block_counts,
    model_memory,
    planned,
    shared_memory,
    step_bytes,
)
from memserve.instance.parts import Identity, Parts
from memserve.instance.profiling import ProfiledEngine, instance_profile, quick_measurements
from memserve.models.resolve import resolve_model
from memserve.models.tokenizer import Tokenizer
from memserve.pool.eviction import CostAware, Eviction
from memserve.pool.layout import KVLayout
from memserve.scheduler.architecture import Architecture
from memserve.scheduler.cost_model import recompute_cost
from memserve.scheduler.profiles import Profile, ProfileStore
from memserve.transfer.kv_link import PoolLink, totals_of
from memserve.transfer.mempool import MemPool
from memserve.transfer.secret import cluster_keys

log = logging.getLogger(__name__)


def build_parts(config: ClusterConfig, settings: InstanceConfig, identity: Identity) -> Parts:
    """Load the model, profile it if needed, and set up engine, pool, link and KV events.

    Raises ConfigError, ModelError, SharedMemoryFull.
    """
    if settings.cpus is not None:
        _pin(settings.cpus)
    threads = settings.threads or available_cores()
    use_one_thread()
    device = choose_device(config.model.device)
    directory = resolve_model(config.model, log.info)
    dtype = wanted_dtype(config.model, device)
    settings = _with_room(config, settings, directory.path, dtype, device)
    log.info("loading %s as %s on %s", directory.name, dtype, device)
    model = with_team(threads, lambda: load_model(directory.path, dtype, device))
    tokenizer = Tokenizer.load(directory.path)
    layout = model.layout(
        directory.name,
        config.cache.block_tokens,
        config.cache.aggregated,
        directory.identity,
    )
    engine_settings = EngineSettings(
        name=identity.model,
        threads=threads,
        limits=BatchLimits(
            settings.max_batch_tokens, settings.mixed_batch_tokens, settings.max_running
        ),
        max_waiting=settings.max_waiting,
        max_model_len=config.model.max_model_len,
        cuda_graphs=settings.cuda_graphs,
    )
    measured = ProfiledEngine(model, layout, engine_settings, directory.path)
    subject = measured.subject
    profile = instance_profile(
        subject, settings.profile, ProfileStore(), lambda: quick_measurements(measured)
    )
    grammars = Grammars(GrammarCompiler(tokenizer, model.shape.vocab_size))
    with ExitStack() as stack:
        stack.callback(grammars.close)
        longest = min(model.shape.max_position, config.model.max_model_len or 1 << 62)
        blocks = _block_counts(settings, layout, device, subject.architecture, longest)
        pool = stack.enter_context(_make_pool(config, blocks, identity, layout, device, profile))
        engine = Engine(model, pool, engine_settings)
        endpoint = pool.serve(f"tcp://{bracketed(settings.host)}:0")
        address = PoolPeer(identity.id, reachable_endpoint(endpoint))
        link = PoolLink(pool, address, config.cache.caching, config.cache.mode)
        events = KVEventPublisher(pool, settings.host, cluster_keys(None))
        stack.callback(events.close)
        close = stack.pop_all().close

    sharing = KEEPING_ROLES[config.cache.caching]
    return Parts(
        engine,
        tokenizer,
        lambda: totals_of(pool),
        close,
        sharing,
        link,
        profile,
        events,
        lambda: (*engine.threads, *pool.threads(), events.thread),
        grammars=grammars,
    )


def choose_device(name: str) -> torch.device:
    """Return the device of the setting `model.device`. Raises ConfigError if it does not exist
    here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"model.device = '{name}': {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"model.device = '{name}': must be 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        works = f"cuda:{count - 1}" if count else "cpu"
        raise ConfigError(
            f"model.device = '{name}': PyTorch finds {count} CUDA devices; '{works}' works"
        )
    return device


def wanted_dtype(wanted: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the configured dtype; for `auto`, the one that suits this device."""
    if wanted.dtype != "auto":
        dtype: torch.dtype = vars(torch)[wanted.dtype]
        return dtype
    chosen = choose_dtype(device)
    log.info("dtype = auto: %s", str(chosen).removeprefix("torch."))
    return chosen


def _block_counts(
    settings: InstanceConfig,
    layout: KVLayout,
    device: torch.device,
    model: Architecture,
    longest: int,
) -> tuple[int, int]:
    """Return the numbers of HBM and DRAM blocks, now that the weights are in memory. Raises
    ConfigError."""
    machine = _machine(device)
    free = machine.device
    step = 0 if free is None else step_bytes(model, settings, longest, free)
    return block_counts(settings, layout.block_bytes, machine, step)


def _machine(device: torch.device) -> Machine:
    """Return the memory that is free now, on this machine and on a CUDA device."""
    free = None
    if device.type == "cuda":
        gc.collect()
        with suppress(RuntimeError):  # after a failed capture of a CUDA graph
            torch.cuda.empty_cache()  # PyTorch's allocator keeps the memory of the profile's pool
        free = torch.cuda.mem_get_info(device)[0]
    return Machine(host_memory(), shared_memory(), free)


def _make_pool(
    config: ClusterConfig,
    blocks: tuple[int, int],
    identity: Identity,
    layout: KVLayout,
    device: torch.device,
    profile: Profile,
) -> MemPool:
    eviction: Eviction | Literal["lru"] = "lru"
    if config.cache.eviction == "cost":
        eviction = CostAware(recompute_cost(profile.costs, layout.block_tokens))
    hbm, dram = blocks
    log.info(
        "KV memory: HBM %d blocks (%d tokens, %.0f MiB), DRAM %d blocks (%.0f MiB)",
        hbm,
        hbm * layout.block_tokens,
        hbm * layout.block_bytes / 2**20,
        dram,
        dram * layout.block_bytes / 2**20,
    )
    return MemPool(
        layout,
        hbm,
        dram,
        instance=identity.id,
        device=str(device),
        eviction=eviction,
        epoch=identity.epoch,
    )


def _with_room(
    config: ClusterConfig,
    settings: InstanceConfig,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> InstanceConfig:
    """Return the settings with shares of host memory converted to bytes. Raises ConfigError if
    weights and KV need more memory than is free: the kernel would kill a process later."""
    name = str(dtype).removeprefix("torch.")
    try:
        model = model_memory(directory, msgspec.convert(name, Dtype))
    except ModelError:  # the architecture is unknown here; loading the model gives a better error
        return settings
    alone = msgspec.structs.replace(config, instance=(msgspec.structs.replace(settings, count=1),))
    return planned(alone, model, _machine(device), process=0).instance[0]


def _pin(cpus: tuple[int, ...]) -> None:
    usable = os.sched_getaffinity(0)
    if not set(cpus) <= usable:
        allowed = sorted(usable)
        raise ConfigError(f"instance.cpus = {list(cpus)}: this process may only use {allowed}")
    os.sched_setaffinity(0, cpus)
