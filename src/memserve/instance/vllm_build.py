"""Construction of an instance whose engine is a vLLM server from a configuration."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import msgspec

from memserve.api.audience import check_url
from memserve.api.status import PoolTotals
from memserve.config import KEEPING_ROLES, ClusterConfig, InstanceConfig, memory_bytes
from memserve.engine.request import EngineInfo
from memserve.errors import EngineStopped, GivenUp, ModelError
from memserve.host_memory import host_memory
from memserve.instance.event_relay import EventRelay
from memserve.instance.parts import Identity, Parts
from memserve.instance.vllm_profile import vllm_profile
from memserve.models.resolve import ModelDirectory, resolve_model
from memserve.models.tokenizer import Tokenizer
from memserve.pool.segment import sweep
from memserve.scheduler.profiles import ProfileStore
from memserve.secrets import cluster_secret
from memserve.transfer.secret import cluster_keys
from memserve.vllm.engine import VllmEngine
from memserve.vllm.forwarder import Forwarder
from memserve.vllm.metrics import UnknownMetrics, read_memory
from memserve.vllm.place import ServerPlace
from memserve.vllm.remote_link import RemoteLink
from memserve.vllm.server import (
    LOOK_SECONDS,
    VllmServer,
    require_command,
    server_command,
    server_environment,
    tier_settings,
)

log = logging.getLogger(__name__)

KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own variable; the key of a server at `vllm_url`
SAY_SECONDS = 10.0  # seconds between log messages while waiting for the server


class _Model(msgspec.Struct, frozen=True):
    id: str
    max_model_len: int


class _Models(msgspec.Struct, frozen=True):
    data: list[_Model]


_models = msgspec.json.Decoder(_Models)


def build_vllm(
    ending: threading.Event, config: ClusterConfig, settings: InstanceConfig, identity: Identity
) -> Parts:
    """Start a vLLM server, or attach to the one at `vllm_url`, and wait until it serves.

    Raises ConfigError, ModelError; EngineStopped if the server ends first or its version is
    unknown; GivenUp as soon as `ending` is set.
    """
    found = resolve_model(config.model, log.info)
    tokenizer = Tokenizer.load(found.path)
    with ExitStack() as stack:
        server = (
            _started(ending, config, settings, identity, found, stack)
            if settings.vllm_url is None
            else _attached(ending, settings, settings.vllm_url)
        )
        if server.pool is not None:
            stack.callback(sweep)  # a killed server leaves its shared memory behind
        info = _describe(server.place, settings, found.path)
        profile = vllm_profile(
            config, settings, found.path, tokenizer, server.place, info, ProfileStore()
        )
        engine = VllmEngine(server.place, info)
        events: EventRelay | None = None
        if server.events is not None:
            owner = identity.id, identity.epoch
            keys = cluster_keys(None)
            events = EventRelay(server.events, *owner, info.block_tokens, settings.host, keys)
            stack.callback(events.close)
            server.watched.append(events.thread)
        link: RemoteLink | None = None
        if server.pool is not None:
            caching, mode = config.cache.caching, config.cache.mode
            secret = cluster_secret()
            link = RemoteLink(server.pool, identity.id, settings.host, secret, caching, mode)
        close = stack.pop_all().close
    log.info(
        "KV memory of vLLM: %d blocks of %d tokens",
        info.pool_tokens // info.block_tokens,
        info.block_tokens,
    )

    def pool_totals() -> PoolTotals:
        own = engine.pool_totals()
        return own if link is None else msgspec.structs.replace(link.totals, hbm=own.hbm)

    return Parts(
        engine,
        tokenizer,
        pool_totals,
        close,
        KEEPING_ROLES[config.cache.caching],
        link,
        profile,
        events,
        threads=lambda: (engine.thread, *server.watched),
        forwarder=Forwarder(server.place, info),
    )


@dataclass(frozen=True, slots=True)
class _Server:
    place: ServerPlace
    events: str | None = None  # endpoint of its KV events
    pool: Path | None = None  # socket of the pool in its process
    watched: list[threading.Thread] = field(default_factory=list)  # the server needs them alive


def _started(
    ending: threading.Event,
    config: ClusterConfig,
    settings: InstanceConfig,
    identity: Identity,
    found: ModelDirectory,
    stack: ExitStack,
) -> _Server:
    """Start a vLLM server and wait until it is ready. `stack` stops it."""
    require_command(settings.vllm_command)
    server = VllmServer()
    stack.callback(server.stop)
    served = msgspec.structs.replace(config.model, served_name=identity.model)
    events = server.events if config.cache.caching != "off" else None
    tier = None
    if settings.dram is not None:
        memory = host_memory()
        free = None if memory is None else memory.free
        tier = tier_settings(
            str(memory_bytes(settings.dram, "instance.dram", free)),
            instance=identity.id,
            socket=str(server.pool),
            model=found.name,
            revision=found.identity,
        )
    command = server_command(served, settings, found.path, server.place, events, tier)
    log.info("starting %s", " ".join(command))
    server.start(command, server_environment(settings))
    server.until_ready(ending)
    return _Server(server.place, events, None if tier is None else server.pool, [server.thread])


def _attached(ending: threading.Event, settings: InstanceConfig, url: str) -> _Server:
    """Wait until the server at `url`, which the operator starts, is healthy. Raises GivenUp as
    soon as `ending` is set."""
    check_url(url)
    place = ServerPlace(url.rstrip("/"), key=os.environ.get(KEY_VARIABLE))
    said = 0.0
    while not place.is_healthy():
        if time.monotonic() >= said + SAY_SECONDS:
            said = time.monotonic()
            log.info("waiting for the vLLM server at %s", url)
        if ending.wait(LOOK_SECONDS):
            raise GivenUp("the instance ends before the vLLM server was ready")
    pool = None if settings.vllm_pool is None else Path(settings.vllm_pool)
    return _Server(place, settings.vllm_events, pool)


def _describe(place: ServerPlace, settings: InstanceConfig, directory: Path) -> EngineInfo:
    try:
        model = _models.decode(place.ask("/v1/models")).data[0]
        memory = read_memory(place.ask("/metrics").decode())
    except (OSError, HTTPException, msgspec.MsgspecError, ValueError, IndexError) as error:
        raise EngineStopped(f"the vLLM server gave no model or metrics: {error}") from error
    except UnknownMetrics as error:
        raise EngineStopped(f"the vLLM server has an unknown version: {error}") from error
    vocabulary, ends = _vocabulary(directory)
    return EngineInfo(
        model=model.id,
        vocab_size=vocabulary,
        max_model_len=model.max_model_len,
        pool_tokens=memory.block_tokens * memory.blocks,
        block_tokens=memory.block_tokens,
        dtype="vllm",
        device="vllm",
        threads=settings.threads or 1,
        eos_token_ids=ends,
        max_running=settings.max_running,
        mixed_batch_tokens=settings.mixed_batch_tokens,
        max_waiting=settings.max_waiting,
    )


def _vocabulary(directory: Path) -> tuple[int, tuple[int, ...]]:
    """Return the vocabulary's size and the end tokens of the model in `directory`. End tokens of
    `generation_config.json` win over those of `config.json`. Raises ModelError."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        settings = directory / "generation_config.json"
        generation = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
        text = config.get("text_config", config)
        ends = generation.get("eos_token_id", text.get("eos_token_id", config.get("eos_token_id")))
        if ends is None:
            ends = []
        return int(text["vocab_size"]), tuple(ends if isinstance(ends, list) else [int(ends)])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{directory}: its config.json cannot be read: {error!r}") from error
