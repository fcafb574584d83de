"""Between two network namespaces, through a cable that only TCP can pass."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from memserve import KVLayout
from memserve.bench.link import EmulatedLink
from memserve.errors import EmulationError
from memserve.transfer.session import LEASE
from tests.transfer_child import Child
from tests.transfer_harness import eventually
from tests.transfer_peer import PeerProcess, Spec

pytest.importorskip("nixl", reason="NIXL is not installed")

# 64 KiB in each block.
LAYOUT = KVLayout(layers=8, kv_heads=4, head_dim=32, dtype="float32", block_tokens=8)
BLOCKS = 64
BLOCKS_SENT = 14
GIGABIT = 10**9


@pytest.fixture
def link() -> Iterator[EmulatedLink]:
    try:
        with EmulatedLink(GIGABIT) as link:
            yield link
    except EmulationError as error:
        pytest.skip(f"no network namespaces: {error}")


@pytest.mark.parametrize("aggregated", [True, False])
def test_blocks_cross_the_network(link: EmulatedLink, aggregated: bool) -> None:
    other = replace(LAYOUT, aggregated=aggregated)
    ours = PeerProcess(Spec("ours", LAYOUT, BLOCKS, tls="tcp"), link.near.prefix)
    theirs = PeerProcess(Spec("theirs", other, BLOCKS, tls="tcp"), link.far.prefix)
    try:
        ours.fill(1)
        assert ours.connect(theirs) is None
        every = list(range(BLOCKS))
        end = ours.drain(ours.post(theirs, every, every))
        assert (end.outcome, end.target_drained) == ("done", True)
        assert theirs.same(1) == every
    finally:
        ours.kill()
        theirs.kill()


@pytest.fixture
def cable() -> Iterator[EmulatedLink]:
    """A slow one: all blocks of a child take more than a second."""
    try:
        with EmulatedLink(GIGABIT // 10) as link:
            yield link
    except EmulationError as error:
        pytest.skip(f"no network namespaces: {error}")


@pytest.fixture
def sending(cable: EmulatedLink) -> Iterator[tuple[Child, Child]]:
    """A pool at each end, and a transfer between them that has begun."""
    near, far = cable.near, cable.far
    with (
        Child("a", "tcp", f"tcp://{near.address}:0", near.prefix) as a,
        Child("b", "tcp", f"tcp://{far.address}:0", far.prefix) as b,
    ):
        assert a.ask(f"connect b {b.address}") == "connected"
        a.ask(f"send b {BLOCKS_SENT}")
        eventually(lambda: b.ask("left") == f"0 0 {BLOCKS_SENT}", "the Prepare")
        yield a, b


def test_a_cable_cut_for_less_than_a_lease_delays_a_transfer(
    cable: EmulatedLink, sending: tuple[Child, Child]
) -> None:
    a, b = sending
    cable.cut()
    time.sleep(LEASE / 3)  # the fault itself
    cable.mend()
    assert a.ask("result") == "done"
    assert b.ask(f"whole {BLOCKS_SENT}") == str(BLOCKS_SENT)
    eventually(lambda: a.ask("left") == f"0 0 {BLOCKS_SENT}", "the end at the source")
    assert b.ask("left") == "0 0 0"


def test_a_cable_cut_for_longer_aborts_it_and_both_sides_are_whole_later(
    cable: EmulatedLink, sending: tuple[Child, Child]
) -> None:
    a, b = sending
    cable.cut()
    assert a.ask("result") == f"PeerLost: peer 'b': no message for {LEASE:g} s"
    eventually(lambda: b.ask("left") == f"0 {BLOCKS_SENT} {BLOCKS_SENT}", "the quarantine")
    cable.mend()
    eventually(lambda: a.ask("left") == f"0 0 {BLOCKS_SENT}", "the end at the source")
    eventually(lambda: b.ask("left") == "0 0 0", "the end of the quarantine")
    assert b.ask(f"whole {BLOCKS_SENT}") == "0"
    a.ask("send b 1")
    assert a.ask("result") == "done"
    assert b.ask("whole 1") == "1"
