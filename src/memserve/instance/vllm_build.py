"""An instance whose engine is a vLLM server, made from a configuration."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path

import msgspec

from memserve.config import KEEPING_ROLES, ClusterConfig, InstanceConfig
from memserve.engine.request import EngineInfo
from memserve.errors import EngineStopped, ModelError
from memserve.instance.event_relay import EventRelay
from memserve.instance.instance import Identity, Parts
from memserve.models.resolve import resolve_model
from memserve.models.tokenizer import Tokenizer
from memserve.transfer.secret import cluster_keys
from memserve.vllm.engine import VllmEngine
from memserve.vllm.metrics import UnknownMetrics, read_memory
from memserve.vllm.server import VllmServer, require_command, server_command, server_environment

log = logging.getLogger(__name__)


class _Model(msgspec.Struct, frozen=True):
    max_model_len: int


class _Models(msgspec.Struct, frozen=True):
    data: list[_Model]


_models = msgspec.json.Decoder(_Models)


def build_vllm(config: ClusterConfig, settings: InstanceConfig, identity: Identity) -> Parts:
    """Start a vLLM server and wait until it serves.

    Raises ConfigError, ModelError; EngineStopped where it ends first, or is none that we know.
    """
    require_command(settings.vllm_command)
    found = resolve_model(config.model, log.info)
    tokenizer = Tokenizer.load(found.path)
    served = msgspec.structs.replace(config.model, served_name=identity.model)
    with ExitStack() as stack:
        server = VllmServer()
        stack.callback(server.stop)
        caching = config.cache.caching != "off"
        where = server.events if caching else None
        command = server_command(served, settings, found.path, server.socket, where)
        log.info("starting %s", " ".join(command))
        server.start(command, server_environment(settings))
        server.until_ready()
        info = _describe(server, settings, found.path, identity.model)
        engine = VllmEngine(server.socket, info)
        events: EventRelay | None = None
        if caching:
            owner = identity.id, identity.epoch
            keys = cluster_keys(None)
            events = EventRelay(server.events, *owner, info.block_tokens, settings.host, keys)
            stack.callback(events.close)
        close = stack.pop_all().close
    log.info(
        "KV memory of vLLM: %d blocks of %d tokens",
        info.pool_tokens // info.block_tokens,
        info.block_tokens,
    )
    return Parts(
        engine,
        tokenizer,
        engine.pool_totals,
        close,
        KEEPING_ROLES[config.cache.caching],
        events=events,
        threads=lambda: (
            *(engine.thread, server.thread),
            *(() if events is None else (events.thread,)),
        ),
    )


def _describe(
    server: VllmServer, settings: InstanceConfig, directory: Path, model: str
) -> EngineInfo:
    try:
        longest = _models.decode(server.ask("/v1/models")).data[0].max_model_len
        memory = read_memory(server.ask("/metrics").decode())
    except (OSError, HTTPException, msgspec.MsgspecError, ValueError, IndexError) as error:
        raise EngineStopped(f"the vLLM server does not say what it is: {error}") from error
    except UnknownMetrics as error:
        raise EngineStopped(f"a vLLM server of a version that is not known: {error}") from error
    vocabulary, ends = _vocabulary(directory)
    return EngineInfo(
        model=model,
        vocab_size=vocabulary,
        max_model_len=longest,
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
    """Its size and the end tokens: the generation settings win over the model's. Raises
    ModelError."""
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
