"""A tiny model, processes that end with their test, and the table of what was found."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.fakes import save_tiny_tokenizer
from tests.fault.processes import Processes
from tests.fault.table import FaultTable
from tests.tiny_models import Reference, save_tiny_model

OPTION = "--fault-table"
_table = pytest.StashKey[FaultTable]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, metavar="FILE", help="write what the tests of faults found there")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_table] = FaultTable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    # No such option where pytest came to this directory by itself.
    file = session.config.getoption(OPTION, None)
    if file is not None:
        session.config.stash[_table].write(Path(file))


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> FaultTable:
    return request.config.stash.setdefault(_table, FaultTable())


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
