"""The KV feed of a large cluster: sockets for all members, and a few snapshots at a time."""

from __future__ import annotations

import asyncio
import resource
from typing import Any, cast

import msgspec
import pytest

from memserve.api.kv_events import KVEventsInfo
from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.serving import allow_files
from memserve.cluster.kv_feed import MAX_RESTORING, KvFeed, source_of
from memserve.cluster.kv_subscription import EventSource
from memserve.scheduler.prompt_tree import PromptTree
from memserve.types import Epoch, InstanceId, Role
from memserve.vital import Vitals
from tests.waiting import until

NOBODY = "tcp://127.0.0.1:9"
LIBZMQ_SOCKETS = 1023  # of a context, unless it is told otherwise
FILES = 4 * LIBZMQ_SOCKETS


class Peers:
    """Holds every question for a snapshot until it is released, and then fails it."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.under_way = self.most = 0
        self.asked: set[str] = set()

    async def call(self, method: str, url: str, decode: object, **limits: object) -> Any:
        self.asked.add(url)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await self.released.wait()
        self.under_way -= 1
        raise PeerError("no snapshot")


def source(number: int) -> EventSource:
    return EventSource(
        InstanceId(f"i{number}"), NOBODY, 16, snapshot_url=f"http://{number}/kv/snapshot"
    )


async def test_snapshots_are_restored_a_few_at_a_time() -> None:
    """Each is whole in memory: those of a thousand members at once would be gigabytes."""
    peers, count = Peers(), 3 * MAX_RESTORING
    feed = KvFeed(PromptTree(), cast(PeerClient, peers))
    for number in range(count):
        feed.follow_source(source(number))
    await until(lambda: peers.under_way == MAX_RESTORING, "the first snapshots")
    peers.released.set()
    await until(lambda: len(peers.asked) == count, "the others' turn")
    assert peers.most == MAX_RESTORING
    await feed.close()


async def test_more_members_are_followed_than_libzmq_has_sockets_for() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] != resource.RLIM_INFINITY and limits[1] < FILES:
        pytest.skip(f"needs {FILES} open files: raise the hard limit (ulimit -Hn)")
    allow_files(FILES)
    peers, vitals = Peers(), Vitals()
    feed = KvFeed(PromptTree(), cast(PeerClient, peers), vitals=vitals)
    for number in range(LIBZMQ_SOCKETS + 77):
        feed.follow_source(source(number))
    await until(lambda: peers.under_way == MAX_RESTORING, "the first snapshots")
    assert not vitals.survived  # each has its socket
    await feed.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, (True, True)),
        ({"snapshot": False}, (False, False)),  # a vLLM's instance of a version without one
        ({"snapshot": False, "server_snapshot": True}, (True, False)),
    ],
)
def test_what_an_instance_tells_of_its_events(
    told: dict[str, bool], expected: tuple[bool, bool]
) -> None:
    """Whether there is a snapshot, and whether blocks are named by references."""
    given = {"endpoint": NOBODY, "replay_endpoint": NOBODY, "topic": "t", "block_tokens": 16}
    events = msgspec.convert(given | told, KVEventsInfo)
    found = source_of(InstanceId("i"), Epoch(1), events, "http://10.0.0.1:1", Role.COLOCATED)
    assert (found.snapshot_url is not None, found.references) == expected
