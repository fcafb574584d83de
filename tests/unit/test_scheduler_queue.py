"""What waits on an instance: prompts by their discipline, and KV by its memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.scheduler.instance_load import PrefillQueue, Resident, Residents
from memserve.types import SHARED, Namespace, RequestId

A, B, C = (RequestId(name) for name in "abc")


def queue(share: float) -> PrefillQueue:
    prompts = PrefillQueue(share)
    prompts.append(A, 8.0, now=10.0)
    prompts.append(B, 1.0, now=10.0)
    return prompts


def test_in_order_only_the_oldest_goes_on() -> None:
    prompts = queue(0.0)
    prompts.append(C, 5.0, now=13.0)
    assert list(prompts.left()) == pytest.approx([5.0, 1.0, 5.0])
    assert prompts.under_way() == pytest.approx(5.0)


def test_the_shortest_has_its_share() -> None:
    prompts = queue(0.5)
    prompts.append(C, 5.0, now=11.0)
    assert list(prompts.left()) == pytest.approx([7.5, 0.5, 5.0])
    assert prompts.under_way() == pytest.approx(8.0)


def test_a_prompt_that_is_late_holds_its_place() -> None:
    prompts = queue(0.5)
    prompts.append(C, 5.0, now=14.0)
    assert list(prompts.left()) == pytest.approx([6.0, 0.0, 5.0])
    assert prompts.discard(B, now=14.0)
    assert not prompts.discard(B, now=14.0)
    prompts.append(B, 9.0, now=16.0)
    assert list(prompts.left()) == pytest.approx([5.0, 4.0, 9.0])


@given(
    st.sampled_from([0.0, 0.25, 0.5]),
    st.lists(st.tuples(st.floats(0.01, 9), st.floats(0, 5)), min_size=1, max_size=9),
)
def test_no_more_is_done_than_time_allows(share: float, steps: list[tuple[float, float]]) -> None:
    prompts, now, given_work = PrefillQueue(share), 0.0, 0.0
    for number, (seconds, pause) in enumerate(steps):
        prompts.append(RequestId(str(number)), seconds, now)
        given_work += seconds
        now += pause
    prompts.discard(RequestId("none"), now)
    prompts.append(A, 0.0, now)
    left = sum(prompts.left())
    assert given_work - now - 1e-9 <= left <= given_work + 1e-9
    assert prompts.under_way() <= left + 1e-9


class _Looked(PrefillQueue):
    """Looks for the shortest every time."""

    def _served(self) -> tuple[RequestId, RequestId]:
        self._shortest = None
        return super()._served()


# With a small share the oldest soon has the least left; few different seconds make many equal.
_SHARES = st.sampled_from([0.0, 0.25, 0.25, 0.5])
_SECONDS = st.sampled_from([1.0, 2.0, 4.0])


@given(st.lists(st.tuples(st.sampled_from("abcd"), _SECONDS, _SECONDS, _SHARES), max_size=40))
def test_the_shortest_is_known_whatever_has_come_and_gone(
    events: list[tuple[str, float, float, float]],
) -> None:
    known, looked, now = PrefillQueue(0.5), _Looked(0.5), 0.0
    for name, seconds, pause, share in events:
        now += pause / 2
        for prompts in (known, looked):
            if not prompts.discard(RequestId(name), now):
                prompts.append(RequestId(name), seconds, now)
        assert list(known.left()) == list(looked.left())
        assert known.under_way() == looked.under_way()
        known.short_share = looked.short_share = share


def resident(tokens: int, output: int, namespace: Namespace = SHARED) -> Resident:
    return Resident(namespace, np.arange(tokens, dtype=np.int32), tokens, output)


def test_memory_comes_back_when_answers_end() -> None:
    residents = Residents()
    residents.add(A, resident(100, 50))
    residents.add(B, resident(200, 100))
    residents.prefilled(A, now=10.0)
    residents.prefilled(B, now=10.0)

    # Steps of a tenth: the first ends after 5 s, the second after 10.
    def wait(excess: float, now: float = 11.0) -> float:
        return residents.wait(excess, queue=3.0, step=0.1, now=now)

    assert wait(100) == pytest.approx(4.0)
    assert wait(101) == pytest.approx(9.0)
    assert wait(100, now=20.0) == pytest.approx(1.25)  # late: any time
    assert residents.kv_tokens == 300
    residents.remove(A)
    residents.remove(A)
    assert (residents.kv_tokens, len(residents)) == (200, 1)


def test_a_prompt_computed_for_others_leaves_when_it_is_done() -> None:
    residents = Residents()
    residents.add(A, resident(100, 0))
    assert residents.wait(1, queue=3.0, step=0.1, now=0.0) == pytest.approx(3.0)
    residents.prefilled(A, now=1.0)
    assert residents.kv_tokens == 0


def test_what_is_shared_is_held_once() -> None:
    residents = Residents()
    residents.add(A, resident(100, 10))
    residents.add(B, resident(300, 10, Namespace("salt")))
    tokens = np.arange(200, dtype=np.int32)
    assert residents.shared(SHARED, tokens) == 100
    assert residents.shared(Namespace("salt"), tokens) == 200
    assert residents.shared(Namespace("other"), tokens) == 0
    tokens[40] = -1
    assert residents.shared(SHARED, tokens) == 40
    assert residents.shared(SHARED, tokens[:0]) == 0
