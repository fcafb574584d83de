"""A tiny model, processes that end with their test, and the table of what was found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.fakes import save_tiny_tokenizer
from tests.fault.campaign import Report
from tests.fault.processes import Processes
from tests.fault.table import FaultTable
from tests.tiny_models import Reference, save_tiny_model

OPTION = "--fault-table"
_table = pytest.StashKey[FaultTable]()
_report = pytest.StashKey[Report]()
# What continuous integration runs: some of each world, in half a minute.
DEFAULT_FAULTS = 6


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, metavar="FILE", help="write what the tests of faults found there")
    group = parser.getgroup("campaign of faults")
    group.addoption(
        "--faults", type=int, default=DEFAULT_FAULTS, help=f"how many; default: {DEFAULT_FAULTS}"
    )
    group.addoption("--fault-seed", type=int, default=0, help="that they are drawn from")
    group.addoption("--fault-first", type=int, default=0, help="number of the first one")
    group.addoption("--fault-minutes", type=float, help="no fault is begun after so long")
    group.addoption(
        "--fault-report", metavar="FILE", help="what was found: Markdown, or JSON if called so"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_table] = FaultTable()
    config.stash[_report] = Report()


def pytest_sessionfinish(session: pytest.Session) -> None:
    # No such option where pytest came to this directory by itself.
    file = session.config.getoption(OPTION, None)
    if file is not None:
        session.config.stash[_table].write(Path(file))
    file = session.config.getoption("--fault-report", None)
    if file is not None:
        session.config.stash[_report].write(Path(file))


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> FaultTable:
    return request.config.stash.setdefault(_table, FaultTable())


@dataclass(frozen=True)
class CampaignOptions:
    """What a campaign of faults does."""

    faults: int
    seed: int
    first: int
    seconds: float


@pytest.fixture(scope="session")
def campaign_options(request: pytest.FixtureRequest) -> CampaignOptions:
    option = request.config.getoption
    minutes = option("--fault-minutes", None)
    return CampaignOptions(
        faults=option("--faults", DEFAULT_FAULTS),
        seed=option("--fault-seed", 0),
        first=option("--fault-first", 0),
        seconds=math.inf if minutes is None else 60 * minutes,
    )


@pytest.fixture(scope="session")
def campaign_report(request: pytest.FixtureRequest) -> Report:
    return request.config.stash.setdefault(_report, Report())


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


class Expected:
    """What Transformers generates, computed once."""

    def __init__(self, model: Path) -> None:
        torch.set_num_threads(1)  # for matrices this small more are slower, and have to be free
        reference = Reference(model)
        self._generate = cache(lambda prompt, tokens: reference.generate(list(prompt), tokens))

    def __call__(self, prompt: list[int], tokens: int) -> list[int]:
        found: list[int] = self._generate(tuple(prompt), tokens)
        return found


@pytest.fixture(scope="session")
def expected(model: Path) -> Expected:
    return Expected(model)


@pytest.fixture
def processes(model: Path, tmp_path: Path) -> Iterator[Processes]:
    started = Processes(model, tmp_path)
    yield started
    started.end()
