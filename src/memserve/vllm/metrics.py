"""Parsing load and KV memory size from the text of a vLLM server's `/metrics`. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from memserve.errors import MemserveError

_SAMPLE = re.compile(
    r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc"
    r"|iteration_tokens_total_count|prompt_tokens_total|generation_tokens_total)"
    r"(?:\{[^}\n]*\})? ([0-9.eE+-]+)$",
    re.MULTILINE,
)
_CACHE = re.compile(r"^vllm:cache_config_info\{([^}\n]*)\}", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class UnknownMetrics(MemserveError):
    """The metrics are not those of a supported vLLM version."""


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """The load of a server: sums over its engines."""

    running: int = 0  # sequences
    waiting: int = 0  # sequences
    steps: int = 0  # since the server's start
    kv_used: float = 0.0  # share of its KV memory that running sequences hold, 0 to 1
    prompt_tokens: int | None = None  # of prompts computed since the start; None: it does not say
    generated_tokens: int = 0  # since the start
    engines: int = 1


@dataclass(frozen=True, slots=True)
class ServerMemory:
    """The KV memory of one engine."""

    block_tokens: int
    blocks: int


def read_load(text: str) -> ServerLoad:
    """Return the load from the text of `/metrics`. Raises UnknownMetrics."""
    sums: dict[str, float] = {}
    engines = 0
    for name, value in _SAMPLE.findall(text):
        engines += name == "num_requests_running"
        try:
            sums[name] = sums.get(name, 0.0) + float(value)
        except ValueError as error:
            raise UnknownMetrics(f"vllm:{name} is {value[:32]!r}") from error
        if not math.isfinite(sums[name]):
            raise UnknownMetrics(f"vllm:{name} is {value[:32]!r}")
    try:
        return ServerLoad(
            max(0, int(sums["num_requests_running"])),
            max(0, int(sums["num_requests_waiting"])),
            max(0, int(sums.get("iteration_tokens_total_count", 0))),
            min(1.0, max(0.0, sums.get("kv_cache_usage_perc", 0.0))),
            int(sums["prompt_tokens_total"]) if "prompt_tokens_total" in sums else None,
            max(0, int(sums.get("generation_tokens_total", 0))),
            engines,
        )
    except KeyError as error:
        raise UnknownMetrics(f"its metrics have no vllm:{error.args[0]}") from error


def read_memory(text: str) -> ServerMemory:
    """Return the size of KV memory from the text of `/metrics`. Raises UnknownMetrics."""
    found = _CACHE.search(text)
    labels = {} if found is None else dict(_LABEL.findall(found[1]))
    try:
        memory = ServerMemory(int(labels["block_size"]), int(labels["num_gpu_blocks"]))
        if memory.block_tokens < 1 or memory.blocks < 1:
            raise ValueError(f"{memory.blocks} blocks of {memory.block_tokens} tokens")
        return memory
    except (KeyError, ValueError) as error:
        raise UnknownMetrics(f"vllm:cache_config_info does not say its memory: {error}") from error
