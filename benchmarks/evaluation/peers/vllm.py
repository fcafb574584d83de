"""How vLLM is started on a CPU.

Its own `vllm` command does not find its version in the CPU wheel, so that the module is run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

# Blocks of its CPU attention are multiples of this many tokens.
BLOCK_STEP = 32
# Imports in three processes, and the weights: about a minute on two busy cores.
START_SECONDS = 240.0


class VllmSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One server."""

    model: str  # directory
    port: int
    dtype: str = "bfloat16"
    threads: int = 1
    cores: tuple[int, ...] = (0,)  # that the worker is pinned to, one for each thread
    block_tokens: int = 128  # its default on CPUs
    kv_bytes: int = 512 << 20
    max_model_len: int = 4096
    prefix_caching: bool = True
    extra: tuple[str, ...] = ()


def vllm_command(python: Path, settings: VllmSettings) -> list[str]:
    caching = "--enable-prefix-caching" if settings.prefix_caching else "--no-enable-prefix-caching"
    return [
        *(str(python), "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", settings.model, "--served-model-name", "peer", "--dtype", settings.dtype),
        *("--host", "127.0.0.1", "--port", str(settings.port)),
        # Compiling takes a minute more of each start, and the cores of whatever is measured then.
        *("--enforce-eager", caching, "--enable-prompt-tokens-details"),
        *("--block-size", str(settings.block_tokens)),
        *("--kv-cache-memory-bytes", str(settings.kv_bytes)),
        *("--max-model-len", str(settings.max_model_len)),
        *settings.extra,
    ]


def vllm_environment(threads: int, cores: Sequence[int]) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def kv_events_flag(endpoint: str, replay_endpoint: str, topic: str) -> tuple[str, str]:
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": endpoint,
        "replay_endpoint": replay_endpoint,
        "topic": topic,
    }
    return "--kv-events-config", json.dumps(config)
