"""Result files, read back: what made them, and the tables that their commands print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from rich.console import RenderableType

from memserve.bench.environment import Environment
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
    name = _name(file.command)
    command = " ".join(file.command)
    if name not in _READERS:
        raise ConfigError(f"{path}: '{command}' prints no table that is known here")
    try:
        table = _READERS[name](file.result)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}; another version wrote it: run {command}") from error
    return SavedResult(path, command, file.environment, table)


def _name(command: tuple[str, ...]) -> str:
    """`memserve bench pool --json x` is `bench pool`."""
    words = command[1:3] if command[1:2] == ("bench",) else command[1:2]
    return " ".join(words)


def _reader(
    kind: type[_Result], table: Callable[[_Result], RenderableType], raw: msgspec.Raw
) -> RenderableType:
    return table(msgspec.json.decode(raw, type=kind))


# Each imports what it needs when it is asked: some of it is heavy.


def _pool(raw: msgspec.Raw) -> RenderableType:
    from memserve.bench.pool import PoolBenchReport, pool_bench_table

    return _reader(PoolBenchReport, pool_bench_table, raw)


def _engine(raw: msgspec.Raw) -> RenderableType:
    from memserve.bench.engine import EngineBenchReport, engine_bench_table

    return _reader(EngineBenchReport, engine_bench_table, raw)


def _prefill(raw: msgspec.Raw) -> RenderableType:
    from memserve.bench.prefill import PrefillBenchReport, prefill_bench_table

    return _reader(PrefillBenchReport, prefill_bench_table, raw)


def _transfer(raw: msgspec.Raw) -> RenderableType:
    from memserve.bench.transfer import TransferBenchReport, transfer_bench_table

    return _reader(TransferBenchReport, transfer_bench_table, raw)


def _gateway(raw: msgspec.Raw) -> RenderableType:
    from memserve.bench.gateway import GatewayBenchReport, gateway_bench_table

    return _reader(GatewayBenchReport, gateway_bench_table, raw)


def _scheduler(raw: msgspec.Raw) -> RenderableType:
    from memserve.bench.scheduler import SchedulerBenchReport, scheduler_bench_table

    return _reader(SchedulerBenchReport, scheduler_bench_table, raw)


def _serve(raw: msgspec.Raw) -> RenderableType:
    from memserve.bench.report import serving_table
    from memserve.bench.serve import ServeBenchResult
    from memserve.bench.serving_page import repeats_table

    result = msgspec.json.decode(raw, type=ServeBenchResult)
    if any(run.repeat for run in result.runs):
        return repeats_table(result.runs)
    return serving_table([(run.name, run.summary) for run in result.runs])


def _caching(raw: msgspec.Raw) -> RenderableType:
    from memserve.bench.caching import CachingBenchResult, caching_table

    return _reader(CachingBenchResult, caching_table, raw)


def _policies(raw: msgspec.Raw) -> RenderableType:
    from memserve.bench.policies import PoliciesBenchResult, policies_table

    return _reader(PoliciesBenchResult, policies_table, raw)


def _soak(raw: msgspec.Raw) -> RenderableType:
    from memserve.bench.soak import SoakResult
    from memserve.bench.soak_page import soak_tables

    return _reader(SoakResult, soak_tables, raw)


def _profile(raw: msgspec.Raw) -> RenderableType:
    from memserve.bench.profile import ProfileReport, profile_table

    return _reader(ProfileReport, profile_table, raw)


def _paper(raw: msgspec.Raw) -> RenderableType:
    from memserve.bench.paper_tables import PaperResult, paper_tables

    return _reader(PaperResult, paper_tables, raw)


def _peers(raw: msgspec.Raw) -> RenderableType:
    from memserve.bench.peers.report import PeersResult, peers_tables

    return _reader(PeersResult, peers_tables, raw)


_READERS: dict[str, Callable[[msgspec.Raw], RenderableType]] = {
    "bench pool": _pool,
    "bench engine": _engine,
    "bench prefill": _prefill,
    "bench transfer": _transfer,
    "bench gateway": _gateway,
    "bench scheduler": _scheduler,
    "bench serve": _serve,
    "bench caching": _caching,
    "bench policies": _policies,
    "bench paper": _paper,
    "bench peers": _peers,
    "bench soak": _soak,
    "profile": _profile,
}
