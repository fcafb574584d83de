"""Measurement of an engine's prefills, decode steps and transfers for its cost model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np

from memserve.clock import Clock
from memserve.config import TransferMode
from memserve.errors import TransferError
from memserve.instance.probe import Probe
from memserve.instance.samples import Point, Samples
from memserve.pool.layout import KVLayout
from memserve.scheduler.contract import Link
from memserve.scheduler.profiles import (
    DecodePoint,
    Measurements,
    PrefillPoint,
    TransferPoint,
)
from memserve.transfer.mempool import MemPool

log = logging.getLogger(__name__)

Effort = Literal["quick", "full"]
Progress = Callable[[str], None]

# Steps timed at each decode point, after the step that admits the sequences.
_STEPS = 3
_WARM_TOKENS = 64
# Extra rounds for points that other processes disturbed, as time allows.
_AGAIN = 3
_TRANSFERS = 5  # timed transfers of each size
_FAR = "profile-far"
_TRANSFER_SECONDS = 30.0  # timeout of one transfer


@dataclass(frozen=True, slots=True)
class ProfilePlan:
    """Points to measure, the most useful first: points that do not fit the time are left out."""

    prefill: Sequence[tuple[int, int]]  # (tokens to compute, cached tokens)
    decode: Sequence[tuple[int, int]]  # (sequences, context tokens of each)
    blocks: Sequence[int]  # numbers of blocks of a transfer
    rounds: int
    seconds: float  # time limit, after which only the `needed` points start
    needed: int  # first points of each kind, measured in any case
    pool_tokens: int  # size of the measured pool


QUICK = ProfilePlan(
    prefill=((1, 0), (64, 0), (256, 0), (64, 4096), (1024, 0), (256, 2048)),
    decode=((1, 64), (8, 64), (8, 512), (16, 256)),
    blocks=(1, 16),
    rounds=1,
    seconds=3.5,  # short compared with loading a model
    needed=2,
    pool_tokens=6 * 1024,
)
FULL = ProfilePlan(
    prefill=(
        *((n, 0) for n in (1, 16, 64, 128, 256, 512, 1024, 2048)),
        *((n, 2048) for n in (1, 64, 256, 512, 1024, 2048)),
        *((n, 6144) for n in (1, 16, 64, 128, 256, 1024)),
        (4096, 0),
    ),
    decode=(
        *((s, 64) for s in (1, 2, 4, 8, 16, 32)),
        *((s, 512) for s in (1, 4, 8, 16)),
        *((s, 3072) for s in (1, 2, 4)),
    ),
    blocks=(1, 4, 16, 64, 128),
    rounds=3,
    seconds=90.0,
    needed=100,
    pool_tokens=17 * 1024,
)
PLANS: dict[Effort, ProfilePlan] = {"quick": QUICK, "full": FULL}


def _prefill_points(samples: Samples) -> tuple[PrefillPoint, ...]:
    """Return the prefills of samples whose points are (tokens to compute, cached tokens)."""
    return tuple(
        PrefillPoint(tokens + cached, cached, sample.seconds)
        for (tokens, cached), sample in samples.believed.items()
    )


class Profiler:
    """Measures one engine, which has no other user and is not started."""

    def __init__(self, probe: Probe, clock: Clock, progress: Progress) -> None:
        self._probe = probe
        self._clock = clock
        self._progress = progress
        self._block = probe.block_tokens
        self._room = probe.room_tokens
        self._rng = np.random.default_rng(0)

    def measure(
        self, plan: ProfilePlan, most_sequences: int, held_out: Sequence[tuple[int, int]] = ()
    ) -> tuple[Measurements, tuple[PrefillPoint, ...]]:
        """Run a plan within the engine's limits. Returns its measurements, and the `held_out`
        prefills.

        `most_sequences`: maximum of sequences in a step. `held_out`: further prefills, (prompt
        tokens, cached tokens), measured in the same rounds so that a drift of the machine's speed
        affects all points equally.
        """
        block = self._block
        prefill = Samples(self._fitting_prefills(plan.prefill))
        decode = Samples(self._fitting_decodes(plan.decode, most_sequences))
        others = Samples((x - c // block * block, c // block * block) for x, c in held_out)
        end = self._clock.now() + plan.seconds
        with self._probe as probe:
            # Warm-up: the first prefill chooses kernels and touches pages.
            probe.prefill(min(_WARM_TOKENS, probe.longest_prompt), 0)

            def time_prefill(tokens: int, cached: int) -> float:
                return probe.prefill(tokens + cached, cached)

            def time_decode(sequences: int, context: int) -> float:
                return probe.decode(sequences, context, _STEPS)

            for turn in range(plan.rounds):
                self._progress(f"prefill and decode steps, round {turn + 1} of {plan.rounds}")
                needed = plan.needed if turn == 0 else 0
                self._turn(prefill, prefill.points, time_prefill, needed, end)
                self._turn(decode, decode.points, time_decode, needed, end)
                if others.points:
                    self._progress(f"held-out points, round {turn + 1} of {plan.rounds}")
                    self._turn(others, others.points, time_prefill, len(others.points), end)
                if self._clock.now() > end:
                    break
            for _ in range(_AGAIN):
                disturbed = prefill.disturbed + decode.disturbed + others.disturbed
                if not disturbed or self._clock.now() > end:
                    break
                self._progress("points that other processes disturbed, again")
                self._turn(prefill, prefill.disturbed, time_prefill, 0, end)
                self._turn(decode, decode.disturbed, time_decode, 0, end)
                self._turn(others, others.disturbed, time_prefill, 0, end)
        believed = [*prefill.believed.values(), *decode.believed.values()]
        measured = Measurements(
            prefill=_prefill_points(prefill),
            decode=tuple(
                # The context grows by a token per timed step: take the middle one's.
                DecodePoint(s, s * (context + 1 + _STEPS // 2), sample.seconds)
                for (s, context), sample in decode.believed.items()
            ),
            waited=fmean(sample.waited for sample in believed) if believed else 0.0,
        )
        return measured, _prefill_points(others)

    def _turn(
        self,
        samples: Samples,
        points: Sequence[Point],
        run: Callable[[int, int], float],
        needed: int,
        end: float,
    ) -> None:
        """Measure each point once; after `end` only the first `needed` ones."""
        for at, point in enumerate(points):
            if at < needed or self._clock.now() < end:
                samples.take(point, run)
        # Shuffled for the next round, so that a periodic disturbance affects other points.
        self._rng.shuffle(samples.points)

    @property
    def longest_prompt(self) -> int:
        """Maximum of tokens of a measured prompt."""
        return min(self._probe.longest_prompt + 1, self._room - 2 * self._block) - 1

    def _fitting_prefills(self, wanted: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Yield the wanted points, shortened to the context and the pool."""
        longest = self.longest_prompt
        for tokens, cached in wanted:
            computed = max(1, min(tokens, longest // 2))
            before = min(cached, longest - computed) // self._block * self._block
            yield computed, before

    def _fitting_decodes(
        self, wanted: Sequence[tuple[int, int]], most: int
    ) -> Iterator[tuple[int, int]]:
        for sequences, context in wanted:
            there = min(sequences, most, self._room // (4 * self._block))
            longest = min(
                self._probe.longest_prompt - _STEPS - 1,
                self._room // max(1, there) - 2 * self._block - _STEPS,
            )
            if there >= 1 and longest >= 1:
                yield there, min(context, longest)


def measure_transfers(
    layout: KVLayout,
    device: str,
    paths: Sequence[Link],
    blocks: Sequence[int],
    progress: Progress,
) -> tuple[TransferPoint, ...]:
    """Time transfers between two small pools of this process, by each of `paths` that works."""
    points: list[TransferPoint] = []
    for path in paths:
        progress(f"transfers, {path}")
        try:
            points += _time_path(layout, device, path, blocks)
        except TransferError as error:
            log.info("transfers by %s are not measured: %s", path, error)
    return tuple(points)


def _time_path(
    layout: KVLayout, device: str, path: Link, blocks: Sequence[int]
) -> list[TransferPoint]:
    most = max(blocks)
    rng = np.random.default_rng(0)
    points = []
    modes: tuple[tuple[TransferMode, int], ...] = (
        ("by-request-agg", 1 if layout.aggregated else 2 * layout.layers),
        ("by-request", layout.layers if layout.aggregated else 2 * layout.layers),
    )
    with ExitStack() as stack:
        near, far = (
            stack.enter_context(MemPool(layout, 2 * most, 0, name, device, path=path))
            for name in ("profile-near", _FAR)
        )
        near.connect(_FAR, far.serve("tcp://127.0.0.1:0"))
        source = rng.permutation(near.alloc_mem(2 * most))
        target = rng.permutation(far.alloc_mem(2 * most))
        for count in blocks:
            # Transfers of the same blocks in few pieces and in many.
            for mode, pieces in modes:
                times = []
                for _ in range(_TRANSFERS):
                    started = time.perf_counter()
                    copy = near.transfer(_FAR, source[:count], target[:count], mode=mode)
                    copy.result(_TRANSFER_SECONDS)
                    times.append(time.perf_counter() - started)
                points.append(
                    TransferPoint(path, count * layout.block_bytes, count * pieces, _middle(times))
                )
    return points


def _middle(times: Sequence[float]) -> float:
    """Return the median, of an even number the lower one: disturbances only slow down."""
    return sorted(times)[(len(times) - 1) // 2]
