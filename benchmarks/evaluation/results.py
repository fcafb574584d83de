"""Result files, read back: what made them, and the tables that their commands print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from rich.console import RenderableType

from evaluation.gpu.copies import CopiesReport, copies_table
from evaluation.gpu.steps import StepsReport, steps_table
from evaluation.handover import HandoverReport, handover_table
from evaluation.paper.tables import PaperResult, paper_tables
from evaluation.peers.report import PeersResult, peers_tables
from evaluation.planner.live import LiveResult, live_table
from evaluation.planner.page import planner_tables
from evaluation.planner.run import PlannerEvalResult
from evaluation.prefill import PrefillBenchReport, prefill_bench_table
from evaluation.scale.page import scale_tables
from evaluation.scale.run import ScaleResult
from evaluation.soak.page import soak_tables
from evaluation.soak.run import SoakResult
from memserve.bench.caching import CachingBenchResult, caching_table
from memserve.bench.engine import EngineBenchReport, engine_bench_table
from memserve.bench.environment import Environment
from memserve.bench.gateway import GatewayBenchReport, gateway_bench_table
from memserve.bench.policies import PoliciesBenchResult, policies_table
from memserve.bench.pool import PoolBenchReport, pool_bench_table
from memserve.bench.profile import ProfileReport, profile_table
from memserve.bench.report import serving_table
from memserve.bench.scheduler import SchedulerBenchReport, scheduler_bench_table
from memserve.bench.serve import ServeBenchResult
from memserve.bench.serving_page import repeats_table
from memserve.bench.transfer import TransferBenchReport, transfer_bench_table
from memserve.errors import ConfigError

_Result = TypeVar("_Result", bound=msgspec.Struct)


class _File(msgspec.Struct, frozen=True):
    """What every result file has."""

    command: tuple[str, ...]
    environment: Environment
    result: msgspec.Raw


@dataclass(frozen=True, slots=True)
class SavedResult:
    """One file."""

    path: Path
    command: str
    environment: Environment
    table: RenderableType


def read_result(path: Path) -> SavedResult:
    """Raises ConfigError for a file that no command here wrote, or another version of it."""
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: no result of a measurement: {error}") from error
    command = " ".join(file.command)
    # Behind the program: `memserve bench pool`, `memserve profile`, `python -m evaluation peers`.
    read = next((_READERS[word] for word in file.command[1:4] if word in _READERS), None)
    if read is None:
        raise ConfigError(f"{path}: '{command}' prints no table that is known here")
    try:
        table = read(file.result)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}; another version wrote it: run {command}") from error
    return SavedResult(path, command, file.environment, table)


def _reader(
    kind: type[_Result], table: Callable[[_Result], RenderableType]
) -> Callable[[msgspec.Raw], RenderableType]:
    decoder = msgspec.json.Decoder(kind)
    return lambda raw: table(decoder.decode(raw))


def _serve_table(result: ServeBenchResult) -> RenderableType:
    if any(run.repeat for run in result.runs):
        return repeats_table(result.runs)
    return serving_table([(run.name, run.summary) for run in result.runs])


_READERS: dict[str, Callable[[msgspec.Raw], RenderableType]] = {
    "pool": _reader(PoolBenchReport, pool_bench_table),
    "engine": _reader(EngineBenchReport, engine_bench_table),
    "gpu-steps": _reader(StepsReport, steps_table),
    "gpu-copies": _reader(CopiesReport, copies_table),
    "handover": _reader(HandoverReport, handover_table),
    "prefill": _reader(PrefillBenchReport, prefill_bench_table),
    "transfer": _reader(TransferBenchReport, transfer_bench_table),
    "gateway": _reader(GatewayBenchReport, gateway_bench_table),
    "scheduler": _reader(SchedulerBenchReport, scheduler_bench_table),
    "serve": _reader(ServeBenchResult, _serve_table),
    "caching": _reader(CachingBenchResult, caching_table),
    "policies": _reader(PoliciesBenchResult, policies_table),
    "planner-live": _reader(LiveResult, live_table),
    "planner": _reader(PlannerEvalResult, planner_tables),
    "paper": _reader(PaperResult, paper_tables),
    "peers": _reader(PeersResult, peers_tables),
    "scale": _reader(ScaleResult, scale_tables),
    "soak": _reader(SoakResult, soak_tables),
    "profile": _reader(ProfileReport, profile_table),
}
