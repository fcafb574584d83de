"""Three hosts with a link of 1 Gbit/s each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts_harness import Hosts, started_hosts


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with started_hosts("ABC", tmp_path / "hosts") as hosts:
        yield hosts
