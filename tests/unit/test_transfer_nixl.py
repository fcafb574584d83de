"""The NIXL transport between processes, over what UCX picks on one host and over TCP."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from memserve import KVLayout, Medium
from tests.transfer_peer import PeerProcess, Spec

pytest.importorskip("nixl", reason="NIXL is not installed")

LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=16, dtype="float32", block_tokens=4)
# A megabyte in each block, so that a copy can be met halfway.
LARGE = replace(LAYOUT, layers=32, head_dim=512)
MANY = 80  # of those: several windows
BLOCKS = 16
EVERY = list(range(BLOCKS))

Start = Callable[..., PeerProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start peer processes; they end with the test."""
    with ExitStack() as stack:

        def begin(
            instance: str, layout: KVLayout = LAYOUT, blocks: int = BLOCKS, tls: str | None = None
        ) -> PeerProcess:
            peer = PeerProcess(Spec(instance, layout, blocks, tls=tls))
            stack.callback(peer.kill)
            return peer

        yield begin


@pytest.mark.parametrize("tls", [None, "tcp"])
def test_blocks_arrive(start: Start, tls: str | None) -> None:
    ours, theirs = start("ours", tls=tls), start("theirs", tls=tls)
    ours.fill(1)
    theirs.fill(2)
    assert ours.connect(theirs) is None
    end = ours.drain(ours.post(theirs, [3, 4, 9], [3, 4, 9]))
    assert (end.outcome, end.target_drained) == ("done", True)
    assert theirs.same(1) == [3, 4, 9]
    assert theirs.same(2) == [at for at in EVERY if at not in (3, 4, 9)]


def test_a_user_may_have_tcp_send_more_ahead(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TCP_TX_SEG_SIZE", "32k")  # UCX refuses to read less ahead
    ours, theirs = start("ours", tls="tcp"), start("theirs", tls="tcp")
    ours.fill(1)
    assert ours.connect(theirs) is None
    assert ours.drain(ours.post(theirs, [3], [3])).outcome == "done"
    assert theirs.same(1) == [3]


def test_layouts_are_converted(start: Start) -> None:
    ours, theirs = start("ours"), start("theirs", replace(LAYOUT, aggregated=False))
    ours.fill(1)
    theirs.fill(2)
    assert ours.connect(theirs) is None
    ours.drain(ours.post(theirs, [0, 1, 15], [0, 1, 15]))
    assert theirs.same(1) == [0, 1, 15]


def test_more_than_a_window_arrives(start: Start) -> None:
    ours, theirs = start("ours", LARGE, MANY, tls="tcp"), start("theirs", LARGE, MANY, tls="tcp")
    ours.fill(1)
    assert ours.connect(theirs) is None
    assert ours.drain(ours.post(theirs, list(range(MANY)), list(range(MANY)))).outcome == "done"
    assert theirs.same(1) == list(range(MANY))


def test_other_models_are_refused(start: Start) -> None:
    ours, theirs = start("ours"), start("theirs", replace(LAYOUT, model="another"))
    refusal = ours.connect(theirs)
    assert refusal is not None
    assert LAYOUT.fingerprint in refusal


def test_a_dead_peer_fails_the_ticket(start: Start) -> None:
    ours, theirs = start("ours", tls="tcp"), start("theirs", tls="tcp")
    assert ours.connect(theirs) is None
    assert ours.drain(ours.post(theirs, [0], [0])).outcome == "done"
    theirs.kill()
    end = ours.drain(ours.post(theirs, EVERY, EVERY))
    assert (end.outcome, end.target_drained) == ("failed", False)
    assert end.error is not None
    assert end.error.startswith("PeerLost")


def test_a_restarted_peer_is_reached_again(start: Start) -> None:
    ours, theirs = start("ours"), start("theirs")
    ours.fill(1)
    assert ours.connect(theirs) is None
    ours.drain(ours.post(theirs, [0], [0]))
    theirs.kill()
    again = start("theirs")
    assert ours.connect(again) is None
    assert ours.drain(ours.post(again, [5], [5])).outcome == "done"
    assert again.same(1) == [5]


def test_connecting_twice_changes_nothing(start: Start) -> None:
    ours, theirs = start("ours"), start("theirs")
    ours.fill(1)
    assert ours.connect(theirs) is None
    assert ours.connect(theirs) is None
    assert ours.drain(ours.post(theirs, [5], [5])).outcome == "done"
    ours.remove(theirs)
    assert ours.connect(theirs) is None
    assert ours.drain(ours.post(theirs, [6], [6])).outcome == "done"
    assert theirs.same(1) == [5, 6]


def test_memory_that_comes_and_goes_is_reached(start: Start) -> None:
    ours, theirs = start("ours"), start("theirs")
    ours.fill(1)
    assert ours.connect(theirs) is None
    # The same size again: memory may come back at the same address, registered anew.
    for blocks in (8, 0, 8):
        theirs.resize_dram(blocks)
        assert ours.connect(theirs) is None
        if blocks:
            assert ours.drain(ours.post(theirs, [5, 2], [5, 2], Medium.DRAM)).outcome == "done"
            assert theirs.same(1, Medium.DRAM) == [2, 5]


@pytest.mark.parametrize("how", ["cancel", "remove"])
def test_a_cancelled_copy_has_stopped_when_it_ends(start: Start, how: str) -> None:
    """To a peer that answers nothing, a posted write goes on: the end must wait for it, or
    what the blocks hold next would be sent."""
    ours, theirs = start("ours", LARGE, MANY, tls="tcp"), start("theirs", LARGE, MANY, tls="tcp")
    every = list(range(MANY))
    ours.fill(1)
    theirs.fill(2)
    assert ours.connect(theirs) is None
    ours.drain(ours.post(theirs, [0], [0]))
    theirs.process.send_signal(signal.SIGSTOP)
    ticket = ours.post(theirs, every, every)
    ours.poll_for(0.1)
    if how == "cancel":
        ours.cancel(ticket)
    else:
        ours.remove(theirs)
    assert ours.poll_for(0.3) == 0
    theirs.process.send_signal(signal.SIGCONT)
    end = ours.drain(ticket)
    assert (end.outcome, end.target_drained) == ("cancelled", True)
    ours.fill(3)
    ours.poll_for(0.1)
    arrived = theirs.same(1)
    assert 0 < len(arrived) < len(every)  # what was in flight, and no more
    assert arrived + theirs.same(2) == every


def test_closing_does_not_wait_for_a_silent_peer(start: Start) -> None:
    ours, theirs = start("ours", LARGE, MANY, tls="tcp"), start("theirs", LARGE, MANY, tls="tcp")
    assert ours.connect(theirs) is None
    theirs.process.send_signal(signal.SIGSTOP)
    ours.post(theirs, list(range(MANY)), list(range(MANY)))
    ours.poll_for(0.1)
    ours.close_transport()
