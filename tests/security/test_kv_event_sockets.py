"""The sockets of KV events take no more than what they are for, also from who has the secret."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from memserve.models.tokenizer import Tokenizer
from tests.fakes import tiny_tokenizer
from tests.kv_events_harness import following, publishing
from tests.pool_harness import prompt

LARGE = 30 << 20  # bytes of one subscription
SECRET = "of the cluster"
ROOM = 100 << 20  # bytes: less than a few of them


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return tiny_tokenizer(directory)


def resident() -> int:
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGESIZE")


async def flood(kind: str, endpoint: str) -> str:
    """What a process says that sends too much."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.security.flood", kind, endpoint, str(LARGE)),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    said, _ = await process.communicate()
    return said.decode().strip()


async def test_a_large_subscription_or_request_costs_a_publisher_nothing(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMSERVE_SECRET", SECRET)
    async with publishing(tokenizer, secret=SECRET) as one, following() as gateway:
        info = one.events.info
        before = resident()
        for kind, endpoint in (
            ("subscription", info.endpoint),
            ("request", info.replay_endpoint),
        ):
            assert await flood(kind, endpoint) == "hung up"
        assert resident() - before < ROOM
        one.store(*prompt(1, 2))
        gateway.follow(one)
        await gateway.until_equal(one)
        assert one.events.thread.is_alive()
