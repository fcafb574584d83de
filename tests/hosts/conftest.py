"""Three hosts with a link of 1 Gbit/s each, and a tiny model whose KV is large."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from memserve.models.tokenizer import Tokenizer
from memserve.secrets import SECRET_VARIABLE
from tests.fakes import save_tiny_tokenizer
from tests.fault.conftest import Expected
from tests.hosts.conversations import Turn, react, sharegpt
from tests.hosts_harness import Hosts, started_hosts
from tests.tiny_models import WIDE_KV, save_tiny_model


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with started_hosts("ABC", tmp_path / "hosts") as hosts:
        yield hosts


@pytest.fixture(scope="module")
def module_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with started_hosts("ABC", tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("wide", tmp_path_factory.mktemp("models"), config=WIDE_KV)
    save_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.load(model)


@pytest.fixture(params=[react, sharegpt])
def conversations(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> list[list[Turn]]:
    """The turns of three conversations: of agents, and of people."""
    turns: list[list[Turn]] = request.param(tokenizer, 3)
    return turns


@pytest.fixture(scope="session")
def expected(model: Path) -> Expected:
    return Expected(model)


@pytest.fixture(scope="module")
def secret() -> Iterator[str]:
    """The cluster's, which is this process's too: it asks as an operator does."""
    made = secrets.token_hex(32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SECRET_VARIABLE, made)
        yield made
