"""Memory of instances: what each gets for KV, and a check of all that they ask for against this
machine's, before a model is loaded.

KV comes from the model's configuration, weights from the headers of its files. What a process needs
besides is estimated, so a plan that fits barely may still fail; one that cannot fit is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from memserve.config import ClusterConfig, Dtype, InstanceConfig, memory_bytes, parse_share
from memserve.errors import ConfigError
from memserve.host_memory import HostMemory, shown_bytes
from memserve.models.weights import count_parameters
from memserve.pool.segment import SHM_DIRECTORY
from memserve.scheduler.architecture import Architecture, read_architecture

# Of an engine's process besides weights and KV: torch, compiled kernels, activations.
PROCESS_BYTES = 256 * 1024**2
# HBM blocks of a built-in instance on a CPU whose settings give no HBM size.
CPU_BLOCKS = 2048
GPU_SHARE = 0.9  # of what weights, and instances with an HBM size, leave free on a device
_DTYPE_BYTES: dict[Dtype, int] = {"auto": 2, "float32": 4, "bfloat16": 2, "float16": 2}
_SPARE = 0.95  # of what is free, that a suggestion uses


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Bytes of a model's weights, and of a token's KV in all layers."""

    weights: int
    token: int


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory that is free for instances. None: not known, and not checked."""

    host: HostMemory | None
    shared: int | None  # bytes in /dev/shm, where pools have their host memory
    device: int | None = None  # bytes of the CUDA device in use; None: a CPU computes


def shared_memory(directory: Path = SHM_DIRECTORY) -> int | None:
    """Return the bytes that are free in /dev/shm; None if there is no such directory."""
    try:
        room = os.statvfs(directory)
    except OSError:
        return None
    return room.f_bavail * room.f_frsize


def model_memory(directory: Path, dtype: Dtype) -> ModelMemory:
    """Return the memory of a model in a dtype; for `auto` in one of two bytes, the least that is
    chosen. Raises ModelError for a configuration that is no decoder's."""
    size = _DTYPE_BYTES[dtype]
    architecture = read_architecture(directory, str(directory), "float32")
    token = architecture.kv_bytes_per_token // architecture.kv_bytes * size
    return ModelMemory(count_parameters(directory) * size, token)


def planned(
    config: ClusterConfig, model: ModelMemory, machine: Machine, process: int = PROCESS_BYTES
) -> ClusterConfig:
    """Return the configuration with shares of memory, as 50%, in bytes: of what is free here
    besides weights. Shares of a GPU's memory stay shares, which each instance computes; instances
    without an HBM size in their settings get equal ones.

    Raises ConfigError if the instances need more memory than is free, with both numbers, and with
    a value that would fit. `process`: bytes of each process besides weights and KV.
    """
    on_gpu = machine.device is not None
    built_in = sum(table.count for table in config.instance if table.engine == "builtin")
    rest = built_in * (process + (0 if on_gpu else model.weights))
    left = None
    if machine.host is not None:
        what = f"weights and processes of {built_in} instances"
        left = _left(machine.host.free, rest, what, str(machine.host))
    tables = tuple(_in_bytes(table, left, on_gpu) for table in config.instance)
    block = config.cache.block_tokens * model.token
    if machine.device is not None:
        there = f"the device has {shown_bytes(machine.device)} free"
        weights = built_in * model.weights
        free = _left(machine.device, weights, f"weights of {built_in} instances", there)
        tables = _with_shares(tables, free, block, config.planner.max_members or 0)
    asked = [
        one
        for table, given in zip(tables, config.instance, strict=True)
        for one in _asked(table, given, block, on_gpu)
    ]
    host = [one for one in asked if not one.on_gpu]
    if machine.host is not None:
        _check(host, rest, machine.host.free, str(machine.host))
    if machine.shared is not None:
        there = f"{SHM_DIRECTORY}, where host memory is, has {shown_bytes(machine.shared)} free"
        _check(host, 0, machine.shared, there)
    if machine.device is not None:
        on_device = [one for one in asked if one.on_gpu]
        _check(on_device, weights, machine.device, there)
        _check_shares(tables)
    return msgspec.structs.replace(config, instance=tables)


def block_counts(
    settings: InstanceConfig, block_bytes: int, machine: Machine, step: int = 0
) -> tuple[int, int]:
    """Return the numbers of HBM and DRAM blocks. The settings give them as blocks, as bytes, or as
    a percentage of the memory that is free: of the device less `step` bytes for HBM, of the host
    for DRAM and on a CPU. Raises ConfigError."""
    host = None if machine.host is None else machine.host.free
    hbm, dram = settings.hbm_blocks or CPU_BLOCKS, settings.dram_blocks
    if settings.hbm is not None:
        free = host if machine.device is None else machine.device - step
        hbm = memory_bytes(settings.hbm, "instance.hbm", free) // block_bytes
        if hbm < 1:
            raise ConfigError(
                f"instance.hbm = '{settings.hbm}': a block has {block_bytes} bytes; "
                f"'{shown_bytes(1024 * block_bytes).replace(' ', '')}' has room for 1024"
            )
    if settings.dram is not None:
        dram = memory_bytes(settings.dram, "instance.dram", host) // block_bytes
    return hbm, dram


def step_bytes(model: Architecture, settings: InstanceConfig, longest: int, free: int) -> int:
    """Return an estimate of a GPU's memory for the largest step besides weights and KV.

    `longest`: tokens of the longest sequence; as many as have room in `free` bytes with their KV.
    """
    size = model.weight_bytes
    query, keys = model.heads * model.head_dim, 2 * model.kv_heads * model.head_dim
    # A layer's inputs and outputs, with norms in float32.
    token = (8 * model.hidden + 3 * query + 2 * keys + 4 * model.intermediate) * size
    # Logits, and in float32.
    row = model.vocab * (size + 4)
    # Of one sequence: gathered keys and values in a buffer of up to twice their size, their copies
    # for all query heads, and the mask.
    context = (2 * keys + 2 * query + settings.max_batch_tokens) * size
    longest = min(longest, free // (context + model.kv_bytes_per_token))
    return settings.max_batch_tokens * token + settings.max_running * row + longest * context


@dataclass(frozen=True, slots=True)
class _Asked:
    """KV memory of one setting of one table."""

    setting: str  # as the file names it
    value: str  # as it was given
    count: int  # instances
    each: int  # bytes
    unit: int  # bytes of one block, if the setting is in blocks; else 0
    on_gpu: bool

    @property
    def total(self) -> int:
        return self.count * self.each

    def __str__(self) -> str:
        times = f"{self.count} x " if self.count > 1 else ""
        return f"{times}{self.setting} = {self.quoted(self.value)} ({shown_bytes(self.each)})"

    def quoted(self, value: str) -> str:
        return value if self.unit else f"'{value}'"

    def at_most(self, size: float) -> str | None:
        """Return the setting with at most `size` bytes, in the unit in which it was given; None
        if that is nothing."""
        if self.unit:
            value, suffix = size // self.unit, ""
        elif self.value.endswith("%"):
            value, suffix = float(self.value.removesuffix("%")) * size // self.each, "%"
        else:
            value, suffix = size // 1024**2, "MiB"
        return f"{self.setting} = {self.quoted(f'{value:.0f}{suffix}')}" if value >= 1 else None


def _in_bytes(table: InstanceConfig, left: int | None, on_gpu: bool) -> InstanceConfig:
    changes = {}
    for name in ("dram",) if on_gpu else ("hbm", "dram"):
        text: str | None = getattr(table, name)
        if text is not None and text.endswith("%"):
            changes[name] = str(max(1, memory_bytes(text, f"instance.{name}", left)))
    return msgspec.structs.replace(table, **changes)


def _left(free: int, rest: int, what: str, there: str) -> int:
    """Return `free` less `rest` bytes, which `what` takes. Raises ConfigError if none is left."""
    if free <= rest:
        raise ConfigError(
            f"not enough memory: {what} need {shown_bytes(rest)} before any KV; {there}; "
            "fewer instances, or a smaller model, would fit"
        )
    return free - rest


def _with_shares(
    tables: Sequence[InstanceConfig], free: int, block: int, most: int
) -> tuple[InstanceConfig, ...]:
    """Return the tables with an HBM size for each built-in instance: those without one get equal
    shares of the memory that the others leave on the GPU.

    `free`: bytes once all weights are there. `most`: members that the planner may start.
    """
    builtin = [table for table in tables if table.engine == "builtin"]
    silent = [table for table in builtin if table.hbm is None and table.hbm_blocks is None]
    if not silent:
        return tuple(tables)
    left = 1.0
    for table in builtin:
        if table not in silent:
            left -= table.count * (parse_share(table.hbm or "") or 0)
            left -= sum(one.total for one in _asked(table, table, block, True) if one.on_gpu) / free
    percent = 100 * GPU_SHARE * left / max(most, sum(table.count for table in silent))
    share = f"{max(1.0, round(percent, 2)):g}%"  # some, also of nothing, which `planned` refuses
    return tuple(
        msgspec.structs.replace(table, hbm=share) if table in silent else table for table in tables
    )


def _asked(
    table: InstanceConfig, given: InstanceConfig, block: int, on_gpu: bool
) -> Iterator[_Asked]:
    """Yield what a table asks for, in bytes, as `given` says it. A GPU's share is left out."""
    builtin = table.engine == "builtin"
    if table.hbm is not None and not table.hbm.endswith("%"):
        size = memory_bytes(table.hbm, "instance.hbm", None)
        yield _Asked("hbm", given.hbm or "", table.count, size, 0, on_gpu)
    elif builtin and table.hbm is None:
        blocks = table.hbm_blocks or CPU_BLOCKS
        yield _Asked("hbm_blocks", str(blocks), table.count, blocks * block, block, on_gpu)
    if table.dram is not None:
        size = memory_bytes(table.dram, "instance.dram", None)
        yield _Asked("dram", given.dram or "", table.count, size, 0, False)
    elif builtin and table.dram_blocks:
        blocks = table.dram_blocks
        yield _Asked("dram_blocks", str(blocks), table.count, blocks * block, block, False)


def _check(asked: Sequence[_Asked], rest: int, free: int, there: str) -> None:
    """Raise ConfigError if KV and `rest` bytes are more than `free`."""
    kv = sum(one.total for one in asked)
    if kv + rest <= free or not kv:
        return
    besides = f", and {shown_bytes(rest)} besides for weights and processes" if rest else ""
    raise ConfigError(
        f"not enough memory: {shown_bytes(kv + rest)} are asked for, by "
        f"{', '.join(map(str, asked))}{besides}; {there}; {_advice(asked, free * _SPARE - rest)}"
    )


def _advice(asked: Sequence[_Asked], room: float) -> str:
    """Return what would fit into `room` bytes: a smaller value of the largest setting, or of all
    settings if it alone is not enough."""
    largest = max(asked, key=lambda one: one.total)
    others = sum(one.total for one in asked if one is not largest)
    fits = largest.at_most((room - others) / largest.count) if room > others else None
    if fits is not None:
        return f"{fits} would fit"
    share = room / sum(one.total for one in asked)
    values = [one.at_most(one.each * share) for one in asked]
    known = dict.fromkeys(value for value in values if value is not None)
    return f"{', '.join(known)} would fit" if known else "fewer instances would fit"


def _check_shares(tables: Sequence[InstanceConfig]) -> None:
    """Raise ConfigError if shares of a device's memory add up to all of it."""
    shares = [
        float(table.hbm.removesuffix("%"))
        for table in tables
        if table.engine == "builtin" and table.hbm is not None and table.hbm.endswith("%")
        for _ in range(table.count)
    ]
    if sum(shares) >= 100:
        raise ConfigError(
            f"the instances ask for {sum(shares):g}% of a device's memory with instance.hbm; "
            f"hbm = '{int(90 / len(shares))}%' in each would fit"
        )
