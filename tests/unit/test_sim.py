"""The simulator counts what the cost model says, and its caches do what pools do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.scheduler.contract import Seconds, TransferPath
from memserve.sim.cache import SimCache
from memserve.sim.cluster import Network, SimCluster
from memserve.sim.instance import InstanceShape
from memserve.sim.prompt import BlockKeys, SimRequest, SimSession
from memserve.types import InstanceId, RequestId, Role

BLOCK = 4


class UnitCosts:
    """A second for each computed token, a tenth for a decode step, a hundredth for each byte."""

    kv_bytes_per_token = 1

    def prefill_seconds(self, prompt_tokens: object, cached_tokens: object) -> Seconds:
        return np.asarray(prompt_tokens, dtype=np.float64) - np.asarray(cached_tokens)

    def decode_step_seconds(self, sequences: object, context_tokens: object) -> Seconds:
        return np.full(np.shape(sequences), 0.1)

    def transfer_seconds(self, num_bytes: object, pieces: object, path: TransferPath) -> Seconds:
        return np.asarray(num_bytes, dtype=np.float64) * 0.01


def shape(
    name: str,
    role: Role = Role.COLOCATED,
    hbm: int = 100,
    dram: int = 0,
    short_share: float = 0.5,
) -> InstanceShape:
    return InstanceShape(
        InstanceId(name),
        role,
        UnitCosts(),
        BLOCK,
        hbm,
        dram,
        chunk_tokens=8,
        short_share=short_share,
        swap_bytes_per_second=1e9,
    )


class Requests:
    def __init__(self) -> None:
        self.keys = BlockKeys(BLOCK)
        self.count = 0

    def make(
        self, tokens: Sequence[int], output: int, answer: Sequence[int] | None = None
    ) -> SimRequest:
        self.count += 1
        prompt = np.array(tokens, dtype=np.int32)
        final = None if answer is None else np.array([*tokens, *answer][:-1], dtype=np.int32)
        return SimRequest(
            id=RequestId(str(self.count)),
            tokens=prompt,
            keys=self.keys.of(prompt),
            output_tokens=output,
            session="s",
            final_tokens=final,
            final_keys=() if final is None else self.keys.of(final),
        )


def play(cluster: SimCluster, *sessions: SimSession) -> list[SimRequest]:
    done: list[SimRequest] = []
    cluster.run(sessions, done.append)
    return done


def test_one_request_takes_what_the_model_says() -> None:
    cluster = SimCluster([shape("a")], "prompt-tree")
    (request,) = play(cluster, SimSession(5.0, [Requests().make(range(20), output=11)]))
    assert request.first_token == pytest.approx(25.0)
    assert request.end == pytest.approx(26.0)  # ten more tokens
    assert request.cached_tokens == 0


def test_the_next_turn_computes_what_is_new() -> None:
    requests = Requests()
    first = requests.make(range(20), 9, answer=range(100, 109))
    second = requests.make([*range(20), *range(100, 109), *range(7)], 1)
    cluster = SimCluster([shape("a")], "prompt-tree")
    done = play(cluster, SimSession(0.0, [first, second]))
    assert [request.id for request in done] == ["1", "2"]
    assert second.cached_tokens == 28  # whole blocks of all but the answer's last token
    assert second.first_token is not None
    assert second.first_token - second.arrival == pytest.approx(36 - 28)


def test_decoding_goes_on_while_another_prompt_is_computed() -> None:
    requests = Requests()
    a, b = requests.make(range(8), 101), requests.make(range(50, 66), 1)
    cluster = SimCluster([shape("a")], "prompt-tree")
    play(cluster, SimSession(0.0, [a]), SimSession(9.0, [b]))
    # Two chunks of eight tokens, each with a decode step in it, from the end of a running step.
    assert b.first_token == pytest.approx(9.0 + 2 * 8.1, abs=0.11)
    assert a.end == pytest.approx(8.0 + 100 * 0.1 + 16.0, abs=0.11)


def test_without_mixed_steps_answers_wait_for_prompts_and_every_step_for_its_host() -> None:
    requests = Requests()
    a, b = requests.make(range(8), 101), requests.make(range(50, 66), 1)
    old = replace(shape("a"), mixed_steps=False, step_overhead=0.05)
    play(SimCluster([old], "prompt-tree"), SimSession(0.0, [a]), SimSession(9.0, [b]))
    # Two chunks, no decode step in either; 100 decode steps before and after.
    assert b.first_token == pytest.approx(9.0 + 2 * 8.05, abs=0.16)
    assert a.end == pytest.approx(8.05 + 100 * 0.15 + 2 * 8.05, abs=0.01)


@pytest.mark.parametrize(("caching", "cached"), [("off", 0), ("p", 16), ("pd", 16), ("full", 28)])
def test_each_step_of_caching_saves_more(caching: str, cached: int) -> None:
    requests = Requests()
    first = requests.make(range(20), 9, answer=range(100, 109))
    second = requests.make([*range(20), *range(100, 109), *range(7)], 5)
    keeps = {"off": (False, False), "p": (True, False)}.get(caching, (True, True))
    shapes = [
        InstanceShape(InstanceId("p"), Role.PREFILL, UnitCosts(), BLOCK, 100, caches=keeps[0]),
        InstanceShape(InstanceId("d"), Role.DECODE, UnitCosts(), BLOCK, 100, caches=keeps[1]),
    ]
    cluster = SimCluster(shapes, "round-robin", caching)  # type: ignore[arg-type]
    play(cluster, SimSession(0.0, [first, second], think=10.0))
    expected = 20 if caching in ("p", "pd") else cached
    assert second.cached_tokens == expected
    assert first.moved_tokens == 20
    # D has what it received and made itself, where it caches.
    assert second.moved_tokens == (8 if caching in ("pd", "full") else 36)
    assert first.first_token == pytest.approx(20 + 0.2)  # computed, then moved


def test_a_prompt_waits_for_memory_and_evicts_history_for_it() -> None:
    requests = Requests()
    a = requests.make(range(20), 101)  # 121 tokens: 31 of 36 blocks
    b = requests.make(range(200, 220), 1)  # six blocks
    c = requests.make(range(20), 1)
    cluster = SimCluster([shape("a", hbm=36)], "prompt-tree")
    done = play(cluster, SimSession(0.0, [a]), SimSession(1.0, [b]), SimSession(100.0, [c]))
    assert [request.id for request in done] == ["1", "2", "3"]
    assert b.first_token is not None
    assert a.end is not None
    assert b.first_token >= a.end + 20 - 1e-9
    assert c.cached_tokens == 16


@pytest.mark.parametrize(("share", "short", "long"), [(0.5, 16.0, 48.0), (0.0, 48.0, 40.0)])
def test_a_short_prompt_has_its_share_of_steps(share: float, short: float, long: float) -> None:
    requests = Requests()
    a, b = requests.make(range(40), 1), requests.make(range(50, 58), 1)
    cluster = SimCluster([shape("a", short_share=share)], "round-robin")
    play(cluster, SimSession(0.0, [a]), SimSession(0.5, [b]))
    # The first step is not shared. Then each has four of eight tokens until the short one ends.
    assert b.first_token == pytest.approx(8.0 + short if share else short)
    assert a.first_token == pytest.approx(long)


def test_a_prompt_waits_for_another_that_brings_its_prefix() -> None:
    requests = Requests()
    a, b = requests.make(range(40), 1), requests.make([*range(40), 7], 1)
    c = requests.make(range(200, 208), 1)
    cluster = SimCluster([shape("a")], "round-robin")
    play(cluster, *(SimSession(float(at), [r]) for at, r in enumerate((a, b, c))))
    assert b.cached_tokens == 40
    assert a.first_token == pytest.approx(48.0)  # with the other one in between
    assert c.first_token == pytest.approx(24.0)
    assert b.first_token == pytest.approx(49.0)


def test_nothing_passes_what_waits_for_memory() -> None:
    requests = Requests()
    a = requests.make(range(20), 101)  # 31 of 36 blocks
    b = requests.make(range(200, 220), 1)  # six
    c = requests.make(range(300, 304), 1)  # two: there is room
    cluster = SimCluster([shape("a", hbm=36)], "round-robin")
    done = play(cluster, *(SimSession(float(at), [r]) for at, r in enumerate((a, b, c))))
    assert a.end is not None
    assert done[0] is a
    assert c.first_token is not None
    assert c.first_token > a.end


def test_the_same_inputs_give_the_same_times() -> None:
    def times() -> list[tuple[float | None, float | None]]:
        requests = Requests()
        sessions = [
            SimSession(i * 0.7, [requests.make([i % 3, *range(i, i + 15)], 3 + i % 5)])
            for i in range(40)
        ]
        cluster = SimCluster([shape(name) for name in "abc"], "prompt-tree")
        return [(request.first_token, request.end) for request in play(cluster, *sessions)]

    assert times() == times()


def test_the_trees_know_what_the_caches_hold() -> None:
    requests = Requests()
    sessions = [
        SimSession(float(i), [requests.make([i % 5, *range(i % 7, i % 7 + 19)], 6)])
        for i in range(60)
    ]
    cluster = SimCluster([shape(name, hbm=24, dram=6) for name in "ab"], "round-robin")
    play(cluster, *sessions)
    for name, instance in cluster.instances.items():
        for session in sessions:
            (request,) = session.requests
            matched = cluster.tree.match("", request.tokens).get(name, 0)  # type: ignore[arg-type]
            held = instance.cache.found(request.keys) * BLOCK
            assert matched >= held  # and more only where a prompt is still expected
    cluster.tree.expire(float("inf"))
    for name, instance in cluster.instances.items():
        for session in sessions:
            (request,) = session.requests
            matched = cluster.tree.match("", request.tokens).get(name, 0)  # type: ignore[arg-type]
            assert matched == instance.cache.found(request.keys) * BLOCK


class Dropped:
    def __init__(self) -> None:
        self.keys: set[int] = set()

    def removed(self, key: int) -> None:
        self.keys.add(key)


@given(
    st.integers(0, 6),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.booleans()), max_size=30),
)
def test_a_cache_never_holds_more_than_it_can_nor_forgets_what_is_pinned(
    dram: int, steps: list[tuple[int, int, bool]]
) -> None:
    dropped = Dropped()
    cache = SimCache(12, dram, dropped)
    held: list[tuple[list[int], int]] = []
    for chain, length, end in steps:
        keys = [chain * 100 + at for at in range(length)]
        if end and held:
            cache.release(*held.pop(0))
            continue
        found = cache.found(keys)
        if cache.acquire(keys[:found], len(keys) - found + 1) is not None:
            for position in cache.publish(keys[found:]):
                dropped.keys.discard(keys[found + position])
            held.append((keys, 1))
        for pinned, _ in held:
            assert all(key in cache for key in pinned)
        assert cache.free >= 0
        assert not any(key in cache for key in dropped.keys)
    for pins in held:
        cache.release(*pins)
    assert cache.free == 12


def test_network_pieces_are_what_the_mode_says() -> None:
    class Pieces(UnitCosts):
        def transfer_seconds(
            self, num_bytes: object, pieces: object, path: TransferPath
        ) -> Seconds:
            return np.asarray(pieces, dtype=np.float64)

    one = InstanceShape(InstanceId("a"), Role.COLOCATED, Pieces(), BLOCK, 10)
    discrete = SimCluster([one], "round-robin", network=Network("nixl", False, 40))
    assert discrete.transfer_seconds(InstanceId("a"), 3) == 3 * 80
    assert SimCluster([one], "round-robin").transfer_seconds(InstanceId("a"), 3) == 3
