"""The paper's matrix on the paper's hardware, simulated: 8 x H800, Llama2-13B, TP=2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from evaluation.paper.claims import CHANGES, Figure, Finding, findings
from memserve.config import Caching, Policy
from memserve.models.resolve import Progress
from memserve.scheduler.hardware import cost_model
from memserve.sim.inputs import Encode
from memserve.sim.run import SimConfig, SimResult, simulate

_SESSIONS, _QUICK_SESSIONS = 200, 60


class SimShape(msgspec.Struct, frozen=True):
    """Four instances of two devices each."""

    name: str
    colocated: int
    prefill: int
    decode: int
    caching: Caching
    policy: Policy


SHAPES: tuple[SimShape, ...] = (
    SimShape("PD", 4, 0, 0, "off", "round-robin"),
    SimShape("PD-CC", 4, 0, 0, "full", "prompt-tree"),
    SimShape("1P1D", 0, 2, 2, "off", "round-robin"),
    SimShape("1P1D-CC", 0, 2, 2, "full", "prompt-tree"),
)

# Sessions per second: little, much, and about what two prefill instances can do without a cache.
RATES: dict[str, tuple[float, float, float]] = {
    "sharegpt": (4.0, 12.0, 24.0),
    "loogle": (1.0, 2.0, 4.0),
    "react": (8.0, 24.0, 40.0),
}


# Of vLLM 0.5.3, serving Llama-3-8B on one H100: shares of the time that go to the API server and
# scheduling, and to the GPU (blog.vllm.ai, "vLLM v0.6.0", 5 September 2024). 0.4.0, the paper's
# engine, was not faster; of other models and batches the host's part is the same.
_HOST_SHARE, _DEVICE_SHARE = 0.62, 0.38
_HOST_BATCH, _HOST_CONTEXT = 32, 512  # a usual batch, tokens of each of its sequences


def host_seconds() -> float:
    """What a step of the paper's engine waits for its host."""
    step = cost_model("h100", "llama-3-8b").decode_step_seconds(
        _HOST_BATCH, _HOST_BATCH * _HOST_CONTEXT
    )
    return _HOST_SHARE / _DEVICE_SHARE * float(step)


class SimCell(msgspec.Struct, frozen=True):
    """One simulation."""

    shape: SimShape
    workload: str
    rate: float
    seed: int
    config: SimConfig
    result: SimResult


class SimMatrix(msgspec.Struct, frozen=True):
    """All of them; the same settings give the same."""

    cells: tuple[SimCell, ...]


def simulate_matrix(
    data: Path, quick: bool, encode: Encode, progress: Progress, seeds: Sequence[int] = (0, 1, 2)
) -> SimMatrix:
    """Raises ConfigError."""
    known: dict[str, Sequence[int]] = {}

    def encode_once(text: str) -> Sequence[int]:
        if text not in known:
            known[text] = encode(text)
        return known[text]

    cells = []
    for workload, rates in RATES.items():
        progress(f"simulating {workload}")
        for shape in SHAPES:
            for rate in rates[1:2] if quick else rates:
                for seed in seeds[:1] if quick else seeds:
                    config = _config(shape, workload, data, rate, seed, quick)
                    result = simulate(config, _quiet, encode_once)
                    cells.append(SimCell(shape, workload, rate, seed, config, result))
    return SimMatrix(tuple(cells))


def sim_findings(matrix: SimMatrix) -> tuple[Finding, ...]:
    """The paper's figures beside the simulated ones."""

    def values(workload: str, shape: str, figure: Figure) -> Sequence[float]:
        own = [c for c in matrix.cells if c.workload == workload and c.shape.name == shape]
        return [_value(cell.result, figure) for cell in own]

    return findings(values)


def sim_notes(matrix: SimMatrix) -> tuple[str, ...]:
    """For each finding that is not the paper's, what the simulated instances did."""
    notes = []
    for found in sim_findings(matrix):
        claim, ours = found.claim, found.ours
        if found.verdict in (None, "agrees") or ours is None or claim.paper is None:
            continue
        before, _ = CHANGES[claim.change]
        told = "; ".join(
            f"{name}: TTFT {_mean(matrix, claim.workload, name, 'ttft_mean'):.3f} s, "
            f"TPOT {_mean(matrix, claim.workload, name, 'tpot_mean') * 1e3:.1f} ms, "
            f"cached {_mean(matrix, claim.workload, name, 'cached_ratio'):.0%}"
            for name in CHANGES[claim.change]
        )
        ttft, jct = (_mean(matrix, claim.workload, before, f) for f in ("ttft_mean", "jct_mean"))
        notes.append(
            f"{claim.workload}, {' to '.join(CHANGES[claim.change])}, {claim.figure}: the paper "
            f"has {claim.paper:+.0%}, simulated {ours.mean:+.0%}. Of a request's time in {before}, "
            f"{ttft / jct:.0%} is before its first token ({told})."
        )
    return tuple(notes)


def _mean(matrix: SimMatrix, workload: str, shape: str, figure: str) -> float:
    own = [c for c in matrix.cells if c.workload == workload and c.shape.name == shape]
    values = [msgspec.structs.asdict(cell.result)[figure] for cell in own]
    return float(sum(values) / len(values))


def _value(result: SimResult, figure: Figure) -> float:
    return {
        "TTFT mean": result.ttft_mean,
        "TTFT P99": result.ttft_p99,
        "JCT mean": result.jct_mean,
        "JCT P99": result.jct_p99,
    }[figure]


def _config(
    shape: SimShape, workload: str, data: Path, rate: float, seed: int, quick: bool
) -> SimConfig:
    texts = {"sharegpt": None, "loogle": str(data / "loogle"), "react": str(data / "react")}
    config = SimConfig(
        data=texts[workload],
        sessions=_QUICK_SESSIONS if quick else _SESSIONS,
        rate=rate,
        seed=seed,
        colocated=shape.colocated,
        prefill=shape.prefill,
        decode=shape.decode,
        caching=shape.caching,
        policy=shape.policy,
        path="shm",  # one host
        # As the engines of the paper: prompts whole, in order of arrival, before any decoding.
        chunk_tokens=8192,
        short_share=0.0,
        mixed_steps=False,
        step_overhead=host_seconds(),
    )
    return msgspec.structs.replace(config, workload=workload)


def _quiet(_: str) -> None:
    pass
