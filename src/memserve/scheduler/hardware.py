"""Cost models derived from published figures of hardware, without measurements.

Sources and checks against published measurements: docs/cost-model.md.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from memserve.errors import ConfigError
from memserve.scheduler.architecture import ARCHITECTURES, Architecture
from memserve.scheduler.compute import Waves
from memserve.scheduler.cost_model import AttentionCost, CostModel, LinkCost

_Rate = Annotated[float, Meta(gt=0)]
_Share = Annotated[float, Meta(gt=0, le=1)]


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """One device's data sheet, and the share of each peak that serving software reaches."""

    name: str
    units: Annotated[int, Meta(ge=1)]  # streaming multiprocessors, or cores
    flops: _Rate  # dense, 16 bits, all units, per second
    memory_bandwidth: _Rate  # bytes per second
    device_bandwidth: _Rate  # bytes per second to another device of the host, one direction
    network_bandwidth: _Rate  # bytes per second to another host, one direction
    host_bandwidth: _Rate  # bytes per second from the host's memory
    tile: tuple[int, int]  # rows and columns of a product that a unit computes at once
    matmul_efficiency: _Share
    memory_efficiency: _Share
    attention_efficiency: _Share
    link_efficiency: _Share
    layer_seconds: float  # per layer and step: launches and small operators
    step_seconds: float  # per step: scheduling, sampling
    collective_seconds: float  # latency of one all-reduce
    transfer_seconds: float  # per transfer to another instance, before the first byte
    piece_seconds: float  # per contiguous piece of a transfer


_H100 = Hardware(
    name="h100",
    units=132,
    flops=989.4e12,
    memory_bandwidth=3.35e12,
    device_bandwidth=450e9,
    network_bandwidth=50e9,
    host_bandwidth=63e9,  # PCIe 5.0 x16
    tile=(128, 256),
    matmul_efficiency=0.60,
    memory_efficiency=0.80,
    attention_efficiency=0.40,
    link_efficiency=0.75,
    layer_seconds=40e-6,
    step_seconds=0.5e-3,
    collective_seconds=15e-6,
    transfer_seconds=0.2e-3,
    piece_seconds=5e-6,
)
HARDWARE: dict[str, Hardware] = {
    "h100": _H100,
    # An H100 die with NVLink cut to 400 GB/s, sum of both directions.
    "h800": msgspec.structs.replace(_H100, name="h800", device_bandwidth=200e9),
    "a100": Hardware(
        name="a100",
        units=108,
        flops=312e12,
        memory_bandwidth=2.039e12,
        device_bandwidth=300e9,
        network_bandwidth=25e9,
        host_bandwidth=31.5e9,  # PCIe 4.0 x16
        tile=(128, 128),
        matmul_efficiency=0.72,
        memory_efficiency=0.85,
        attention_efficiency=0.55,
        link_efficiency=0.75,
        layer_seconds=50e-6,
        step_seconds=1e-3,
        collective_seconds=25e-6,
        transfer_seconds=0.2e-3,
        piece_seconds=5e-6,
    ),
    # Figures per server core, between 512-bit vector and matrix units, with PyTorch's overheads.
    "cpu": Hardware(
        name="cpu",
        units=1,
        flops=600e9,
        memory_bandwidth=12e9,
        device_bandwidth=6e9,
        network_bandwidth=1.25e9,
        host_bandwidth=6e9,
        tile=(1, 16),
        matmul_efficiency=0.50,
        memory_efficiency=0.80,
        attention_efficiency=0.50,
        link_efficiency=0.80,
        layer_seconds=1e-3,
        step_seconds=2e-3,
        collective_seconds=50e-6,
        transfer_seconds=2e-3,
        piece_seconds=2e-6,
    ),
}


def cost_model(
    hardware: str, architecture: str | Architecture, tp: int = 1, max_batch_tokens: int = 2048
) -> CostModel:
    """Return the cost model of an architecture on `tp` devices.

    `max_batch_tokens`: most prefill tokens of a step. Raises ConfigError for unknown names.
    """
    device = HARDWARE.get(hardware)
    if device is None:
        raise ConfigError(f"no hardware '{hardware}'; known: {', '.join(sorted(HARDWARE))}")
    if isinstance(architecture, str):
        known = ARCHITECTURES.get(architecture)
        if known is None:
            names = ", ".join(sorted(ARCHITECTURES))
            raise ConfigError(f"no architecture '{architecture}'; known: {names}")
        architecture = known
    return derive(
        device, msgspec.structs.replace(architecture, tensor_parallel=tp), max_batch_tokens
    )


def cores(hardware: Hardware, count: int) -> Hardware:
    """Return the `Hardware` of `count` cores, from the figures of one core."""
    return msgspec.structs.replace(
        hardware,
        units=hardware.units * count,
        flops=hardware.flops * count,
        memory_bandwidth=hardware.memory_bandwidth * count**0.5,  # cores share the memory bus
    )


def derive(hardware: Hardware, model: Architecture, max_batch_tokens: int = 2048) -> CostModel:
    """Return the cost model of a model on a device, from the device's figures."""
    pair = model.pair_flops / (hardware.flops * hardware.attention_efficiency)
    bandwidth = hardware.memory_bandwidth * hardware.memory_efficiency
    per_layer = hardware.layer_seconds + _collectives(hardware, model)
    # With more devices than KV heads, each device still holds one KV head.
    held = max(1, -(-model.kv_heads // model.tensor_parallel))
    read = 2 * held * model.head_dim * model.kv_bytes / bandwidth
    return CostModel(
        architecture=model,
        max_batch_tokens=max_batch_tokens,
        compute=Waves(
            units=hardware.units,
            tile=hardware.tile,
            flops=hardware.flops * hardware.matmul_efficiency,
            bandwidth=bandwidth,
            step_seconds=hardware.step_seconds + model.layers * per_layer,
            token_seconds=_reduced(hardware, model),
        ),
        attention=AttentionCost(
            pair=pair,
            masked_pair=pair,
            context_pair=pair,
            window_pair=pair,
            gather=read,
            decode=read,
            decode_window=read,
        ),
        shm=_link(hardware, hardware.device_bandwidth * model.tensor_parallel),
        nixl=_link(hardware, hardware.network_bandwidth * model.tensor_parallel),
        host=LinkCost(
            0.0,
            1 / (hardware.host_bandwidth * model.tensor_parallel * hardware.link_efficiency),
            hardware.piece_seconds,
        ),
    )


def _collectives(hardware: Hardware, model: Architecture) -> float:
    """Return the seconds of latency of a layer's two all-reduces."""
    return 2 * hardware.collective_seconds if model.tensor_parallel > 1 else 0.0


def _reduced(hardware: Hardware, model: Architecture) -> float:
    """Return the seconds of a token's all-reduces without latency: a ring moves 2 (tp - 1) / tp of
    the data."""
    tp = model.tensor_parallel
    moved = 2 * (tp - 1) / tp * model.hidden * model.weight_bytes * 2 * model.layers
    return moved / (hardware.device_bandwidth * hardware.link_efficiency)


def _link(hardware: Hardware, bandwidth: float) -> LinkCost:
    return LinkCost(
        hardware.transfer_seconds,
        1 / (bandwidth * hardware.link_efficiency),
        hardware.piece_seconds,
    )
