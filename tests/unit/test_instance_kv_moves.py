"""KV moved by the other instance: bounded, and a copy for each reader."""

from __future__ import annotations

import msgspec

from memserve.api.status import MAX_MOVE_PEERS, InstanceStats, PeerMoves
from memserve.instance.fetch import KVMoves
from memserve.types import InstanceId
from tests.watch_harness import stats_of

A = InstanceId("a")


def test_bytes_are_counted_by_peer_and_direction() -> None:
    moves = KVMoves()
    for size in (10, 0, 5):
        moves.received(A, size)
    moves.returned(A, 3)
    before = moves.totals()
    moves.received(A, 1)
    assert before == {A: PeerMoves(15, 3)}
    assert moves.totals() == {A: PeerMoves(16, 3)}


def test_nothing_moved_is_no_peer() -> None:
    moves = KVMoves()
    moves.received(A, 0)
    moves.returned(A, 0)
    assert moves.totals() == {}


def test_as_many_peers_as_a_gateway_takes_and_no_more() -> None:
    moves = KVMoves()
    for number in range(MAX_MOVE_PEERS + 5):
        moves.received(InstanceId(f"i{number}"), 1)
    assert len(moves.totals()) == MAX_MOVE_PEERS
    moves.received(InstanceId("i0"), 1)
    assert moves.totals()[InstanceId("i0")].received == 2
    body = msgspec.json.encode(stats_of(moves=moves.totals()))
    assert msgspec.json.decode(body, type=InstanceStats).moves == moves.totals()
