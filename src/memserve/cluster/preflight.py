"""Checks of a cluster's settings against this machine, before anything is loaded or started.

Each error names the setting, its value, and one that works here.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from memserve.cluster.port import ReservedPort
from memserve.config import ClusterConfig, GatewayConfig
from memserve.errors import ClusterError, ConfigError, ModelError
from memserve.host_memory import host_memory
from memserve.instance.memory_plan import (
    Machine,
    ModelMemory,
    model_memory,
    planned,
    shared_memory,
)
from memserve.models.chat_template import ChatTemplate
from memserve.models.tokenizer import read_template
from memserve.pool.segment import sweep

_DEVICE = re.compile(r"cuda(?::([0-9]{1,3}))?")
# Files of GPUs' drivers: without any, torch is not asked, which takes seconds.
_GPU_FILES = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))
_ASK_SECONDS = 120.0  # importing torch from a cold disk takes tens of seconds

# Another port of the same host works: in use, or for administrators only.
_TAKEN = (errno.EADDRINUSE, errno.EACCES)

Progress = Callable[[str], None]


def check_machine(config: ClusterConfig) -> None:
    """Check cores, the chat template and ports. Raises ConfigError; ClusterError for a port that
    cannot be listened on."""
    _check_cpus(config)
    _check_device_name(config.model.device)
    _check_template(config.gateway)
    _check_ports(config)


def with_room(config: ClusterConfig, directory: Path, progress: Progress) -> ClusterConfig:
    """Return the configuration with its memory in bytes and blocks, see `memory_plan.planned`.

    `directory`: the model's. Raises ConfigError for a device that is not here, and for more memory
    than there is. A model whose configuration does not tell its size is not checked.
    """
    builtin = any(table.engine == "builtin" for table in config.instance)
    free = _device_memory(config.model.device) if builtin else None
    try:
        model = model_memory(directory, config.model.dtype)
    except ModelError as error:
        if builtin:
            progress(f"whether memory suffices is not known: {error}")
            return config
        model = ModelMemory(0, 0)  # weights and KV are the vLLM servers' own to place
    sweep()  # memory that a killed cluster has left is free
    return planned(config, model, Machine(host_memory(), shared_memory(), free))


def _check_cpus(config: ClusterConfig) -> None:
    usable = sorted(os.sched_getaffinity(0))
    for table in config.instance:
        if table.cpus is None:
            continue
        if not table.cpus:
            raise ConfigError(f"instance.cpus = []: name at least one core, as [{usable[0]}]")
        missing = sorted(set(table.cpus) - set(usable))
        if missing:
            raise ConfigError(
                f"instance.cpus = {list(table.cpus)}: this process may not use "
                f"{', '.join(map(str, missing))}, only {_ranges(usable)}; "
                f"cpus = {usable[: len(table.cpus)]} works"
            )


def _ranges(cores: list[int]) -> str:
    """Return core numbers as the kernel writes them: `0-3,8`."""
    parts: list[list[int]] = []
    for core in cores:
        if parts and parts[-1][-1] == core - 1:
            parts[-1].append(core)
        else:
            parts.append([core])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _check_device_name(name: str) -> None:
    if name not in ("auto", "cpu") and _DEVICE.fullmatch(name) is None:
        raise ConfigError(f"model.device = '{name}': 'auto', 'cpu', 'cuda' or 'cuda:1' are devices")


def _device_memory(name: str) -> int | None:
    """Return the free bytes of the CUDA device that instances will use; None for the CPU. Raises
    ConfigError if the device is not here."""
    asked = _DEVICE.fullmatch(name)
    if asked is None and (name == "cpu" or not any(file.exists() for file in _GPU_FILES)):
        return None
    free = cuda_memory()
    if asked is None:  # auto
        return free[0] if free else None
    index = int(asked[1] or 0)
    if index < len(free):
        return free[index]
    if not free:
        raise ConfigError(f"model.device = '{name}': PyTorch finds no CUDA device; 'cpu' works")
    raise ConfigError(
        f"model.device = '{name}': PyTorch finds {len(free)} CUDA devices; "
        f"'cuda:{len(free) - 1}' works"
    )


def cuda_memory() -> list[int]:
    """Return the free bytes of each CUDA device that PyTorch finds. Raises ConfigError if that
    cannot be asked."""
    command = [sys.executable, "-P", "-m", "memserve.engine.devices"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_ASK_SECONDS
        )
        return msgspec.json.decode(done.stdout, type=list[int])
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-1:]
        raise ConfigError(f"PyTorch fails to look for devices: {' '.join(last)}") from error
    except (OSError, subprocess.TimeoutExpired, msgspec.DecodeError) as error:
        raise ConfigError(f"PyTorch cannot be asked for devices: {error}") from error


def _check_template(gateway: GatewayConfig) -> None:
    if gateway.chat_template is not None:
        source = read_template(gateway.chat_template)
        try:
            ChatTemplate(source, {})
        except ModelError as error:
            raise ConfigError(
                f"gateway.chat_template = '{gateway.chat_template}': {error}"
            ) from error


def _check_ports(config: ClusterConfig) -> None:
    gateway = config.gateway
    wanted = [("gateway.port", gateway.host, gateway.port)]
    wanted += [("instance.port", one.host, one.port) for one in config.instance if one.port]
    for at, (name, host, port) in enumerate(wanted):
        for other, its_host, its_port in wanted[:at]:
            if port and (its_host, its_port) == (host, port):
                raise ConfigError(f"{name} = {port} is {other} of another one; 0 takes any")
    for name, host, port in wanted:
        try:
            ReservedPort(host, port).close()
        except ClusterError as error:
            taken = isinstance(error.__cause__, OSError) and error.__cause__.errno in _TAKEN
            advice = f"{name} = 0 takes any" if taken else "host = '127.0.0.1' works"
            raise ClusterError(f"{name} = {port}: {error}; {advice}") from error
