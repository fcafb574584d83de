"""Seconds of a step without attention: matrix products and constant parts.

Two kinds: `Waves`, derived from a device's figures, and `Measured` at some step sizes. Both make
tables once, so that a prediction is a look-up.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from memserve.scheduler.architecture import Architecture, MatMul

Table = NDArray[np.float64]

_Seconds = Annotated[float, Meta(ge=0)]

# Rows of the smallest tile, used by kernels for few tokens.
_SMALLEST_TILE_ROWS = 16
# Halvings of a tile's width that are tried, and the factor by which each raises the time per
# flop, since operands are read for less work.
_NARROWER_TILES = 2
_NARROWING = 1.15


class Waves(msgspec.Struct, frozen=True, kw_only=True, tag="waves"):
    """Seconds from a device's figures. A product is cut into tiles, which the units compute in
    waves; a partial last wave takes as long as a full one. Reading the weights is the lower bound.
    """

    units: Annotated[int, Meta(ge=1)]  # streaming multiprocessors of a GPU, cores of a CPU
    tile: tuple[int, int]  # rows and columns
    flops: Annotated[float, Meta(gt=0)]  # effective, all units, per second
    bandwidth: Annotated[float, Meta(gt=0)]  # effective, bytes per second
    step_seconds: _Seconds  # once per step
    token_seconds: _Seconds  # per token: small operators, all-reduces

    def prefill_table(self, model: Architecture, tokens: int) -> Table:
        """Seconds [tokens + 1] of steps with 0 to `tokens` prompt tokens, without output matrix."""
        return self._steps(model.layer_matmuls, model, np.arange(tokens + 1))

    def prompt_seconds(self, model: Architecture) -> float:
        """Seconds once per prompt: logits of the last token."""
        return float(self._product(model.output_matmul, model, np.ones(1))[0])

    def decode_table(self, model: Architecture, sequences: int) -> Table:
        """Seconds [sequences + 1] of steps that decode 0 to `sequences` sequences."""
        rows = np.arange(sequences + 1)
        return self._steps((*model.layer_matmuls, model.output_matmul), model, rows)

    def _steps(
        self, matmuls: Iterable[MatMul], model: Architecture, rows: NDArray[np.int64]
    ) -> Table:
        table: Table = self.step_seconds + self.token_seconds * rows.astype(np.float64)
        for matmul in matmuls:
            table = table + self._product(matmul, model, rows)
        table[0] = 0.0
        return table

    def _product(self, matmul: MatMul, model: Architecture, rows: NDArray[np.generic]) -> Table:
        most, widest = self.tile
        # Kernels for few rows have lower tiles, and narrower ones where units would be idle.
        power = 2.0 ** np.ceil(np.log2(np.maximum(rows, 1)))
        height = np.clip(power, min(_SMALLEST_TILE_ROWS, most), most)
        computing = np.full(len(rows), np.inf)
        for halvings in range(_NARROWER_TILES + 1):
            width = max(1, widest >> halvings)
            tiles = np.ceil(rows / height) * -(-matmul.outputs // width)
            tile_flops = 2 * height * width * matmul.inputs * _NARROWING**halvings
            seconds = np.ceil(tiles / self.units) * tile_flops / (self.flops / self.units)
            computing = np.minimum(computing, seconds)
        reading = matmul.outputs * matmul.inputs * model.weight_bytes / self.bandwidth
        product: Table = matmul.count * np.maximum(computing, reading)
        return product


class Measured(msgspec.Struct, frozen=True, kw_only=True, tag="measured"):
    """Seconds measured at some step sizes, ascending; linear between and beyond them."""

    prefill: tuple[tuple[int, _Seconds], ...]  # (tokens, seconds), at least two
    decode: tuple[tuple[int, _Seconds], ...]  # (sequences, seconds), at least two
    prompt: _Seconds  # once per prompt

    def __post_init__(self) -> None:
        for knots in (self.prefill, self.decode):
            sizes = [size for size, _ in knots]
            if len(sizes) < 2 or sizes != sorted(set(sizes)) or sizes[0] < 1:
                raise ValueError(f"step sizes {sizes}: at least two, ascending, from 1")

    def prefill_table(self, model: Architecture, tokens: int) -> Table:
        """Seconds [tokens + 1] of steps with 0 to `tokens` prompt tokens, without output matrix."""
        return _interpolate(self.prefill, tokens)

    def prompt_seconds(self, model: Architecture) -> float:
        """Seconds once per prompt: logits of the last token."""
        return self.prompt

    def decode_table(self, model: Architecture, sequences: int) -> Table:
        """Seconds [sequences + 1] of steps that decode 0 to `sequences` sequences."""
        return _interpolate(self.decode, sequences)


def _interpolate(knots: tuple[tuple[int, float], ...], size: int) -> Table:
    at, seconds = (np.array(column, dtype=np.float64) for column in zip(*knots, strict=True))
    sizes = np.arange(size + 1, dtype=np.float64)
    table: Table = np.interp(sizes, at, seconds)
    slope = max(0.0, (seconds[-1] - seconds[-2]) / (at[-1] - at[-2]))
    table += slope * np.maximum(0.0, sizes - at[-1])
    table[0] = 0.0
    return table
