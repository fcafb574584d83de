"""Configuration: frozen, typed, read from TOML whose names are the flags' names.

Unknown keys are refused with the nearest known one; wrong types and values with their path.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from memserve.errors import ConfigError
from memserve.types import Role

Caching = Literal["off", "p", "pd", "full"]
TransferMode = Literal["by-layer", "by-request", "by-request-agg"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Eviction = Literal["lru", "cost"]
Policy = Literal["prompt-tree", "session", "least-load", "round-robin"]

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
PositiveSeconds = Annotated[float, Meta(gt=0)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file."""


class ModelConfig(_Section, frozen=True):
    """Which model, and how its weights are held."""

    path: str = "demo"  # "demo", a local directory, or a hub id
    dtype: Dtype = "auto"
    revision: str | None = None  # of a hub id
    served_name: str | None = None  # in the API; default: the path
    max_model_len: Positive | None = None  # default: the model's own limit
    device: str = "auto"  # "cpu", "cuda", "cuda:1"; auto: cuda if there is one


class CacheConfig(_Section, frozen=True):
    """What is cached and how it moves."""

    caching: Caching = "full"
    mode: TransferMode = "by-request-agg"
    block_tokens: Positive = 16
    eviction: Eviction = "lru"
    aggregated: bool = True


class InstanceConfig(_Section, frozen=True):
    """`count` equal instances."""

    role: Role = Role.COLOCATED
    count: Positive = 1
    hbm_blocks: Positive = 2048
    dram_blocks: NonNegative = 4096
    threads: Positive | None = None  # default: the cores this process may use
    cpus: tuple[NonNegative, ...] | None = None  # pin to these cores
    max_batch_tokens: Positive = 2048  # computed per step when nothing is decoding
    mixed_batch_tokens: Positive = 256  # computed per step while others decode
    max_running: Positive = 64  # sequences per step
    max_waiting: Positive = 256  # sequences queued; more are answered 429
    host: str = "127.0.0.1"
    port: Port = 0  # 0: any


class GatewayConfig(_Section, frozen=True):
    """The process that clients talk to."""

    host: str = "127.0.0.1"
    port: Port = 8000
    policy: Policy = "prompt-tree"
    max_body_bytes: Positive = 16 * 1024 * 1024
    drain_seconds: PositiveSeconds = 30.0  # how long SIGTERM waits for running requests
    chat_template: str | None = None  # a Jinja file that replaces the model's own


class ClusterConfig(_Section, frozen=True):
    """A whole cluster on one machine."""

    model: ModelConfig = ModelConfig()
    gateway: GatewayConfig = GatewayConfig()
    cache: CacheConfig = CacheConfig()
    instance: tuple[InstanceConfig, ...] = (InstanceConfig(),)


def load_config(path: Path) -> ClusterConfig:
    """Read a TOML file. Raises ConfigError with the file, the key and what would be right."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    try:
        return parse_config(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_config(text: str) -> ClusterConfig:
    """Parse TOML text. Raises ConfigError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(error)) from error
    _refuse_unknown_keys(data)
    try:
        return msgspec.convert(data, ClusterConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from error


def _refuse_unknown_keys(data: dict[str, object]) -> None:
    sections: dict[str, type[msgspec.Struct]] = {
        "model": ModelConfig,
        "gateway": GatewayConfig,
        "cache": CacheConfig,
        "instance": InstanceConfig,
    }
    _check_keys("", data, tuple(sections))
    for name, value in data.items():
        for table in value if isinstance(value, list) else [value]:
            if isinstance(table, dict):
                _check_keys(f"{name}.", table, sections[name].__struct_fields__)


def _check_keys(prefix: str, table: dict[str, object], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown key '{prefix}{key}'; {hint}")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
