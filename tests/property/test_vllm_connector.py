"""Nothing that was computed from garbage is ever published, and nothing wrong is ever loaded:
whatever is aborted, preempted or fails, and however small the memories are."""

from __future__ import annotations

from itertools import count
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memserve.types import Medium
from tests.fake_vllm_scheduler import BLOCK, FakeRequest, FakeVllm

WAYS = ("submit", "step", "step")
SALTS = (None, None, "tenant")


def request_of(number: int, rng: Random) -> FakeRequest:
    """One of a few stems, and an end of its own, which two may have, too."""
    stem = [rng.choice((1, 2, 3))] * rng.choice((3, 8, 17))
    prompt = stem + [rng.randint(10, 12) for _ in range(rng.randint(0, 14))]
    return FakeRequest(f"r{number}", prompt, len(prompt) + rng.randint(1, 9), rng.choice(SALTS))


@given(
    st.randoms(use_true_random=False),
    st.sampled_from((0, 1)),
    st.sampled_from((5, 12, 60)),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_happens_blocks_hold_what_they_must(
    rng: Random, late: int, dram: int, by_block: bool, streams: bool
) -> None:
    how = {"by_block": by_block, "streams": streams}
    vllm = FakeVllm(rng, blocks=48, dram_blocks=dram, late=late, **how)
    try:
        numbers = count()
        for _ in range(rng.randint(5, 60)):
            match rng.choice((*WAYS, *WAYS, "abort", "preempt", "reset")):
                case "submit":
                    request = request_of(next(numbers), rng)
                    vllm.submit(request)
                    if rng.random() < 0.2:
                        vllm.fail_next_load(request)
                case "step":
                    vllm.step()
                case "reset":
                    if rng.random() < 0.3:
                        vllm.connector.reset()
                case "abort":
                    everything = [*vllm.waiting, *vllm.running, *vllm.loading.values()]
                    if everything:
                        vllm.abort(rng.choice(everything))
                case "preempt":
                    if vllm.running:
                        vllm.preempt(rng.choice(vllm.running))
        vllm.drain()
        vllm.check_pool()
        assert not vllm.connector._known
        assert not vllm.connector._jobs
    finally:
        vllm.connector.close()


@pytest.fixture
def vllm() -> FakeVllm:
    return FakeVllm(Random(1), blocks=48, dram_blocks=40, late=0)


def run(vllm: FakeVllm, name: str, prompt: list[int], salt: str | None = None) -> None:
    vllm.submit(FakeRequest(name, list(prompt), len(prompt) + 5, salt))
    vllm.drain()


def offered(vllm: FakeVllm, name: str, prompt: list[int], salt: str | None = None) -> int:
    """Tokens that the pool would give now."""
    request = FakeRequest(name, list(prompt), len(prompt) + 1, salt, all_token_ids=list(prompt))
    vllm.connector.arrived(request, cacheable=True)
    found = vllm.connector.offer(request, 0)
    vllm.connector.finished(name)
    return found


PROMPT = list(range(100, 122))


def test_a_prompt_is_loaded_but_for_one_token_at_least(vllm: FakeVllm) -> None:
    run(vllm, "first", PROMPT)
    assert offered(vllm, "same", PROMPT) == len(PROMPT) // BLOCK * BLOCK
    assert offered(vllm, "whole blocks", PROMPT[:20]) == 16
    assert offered(vllm, "another", PROMPT[1:]) == 0
    assert offered(vllm, "tenant", PROMPT, "tenant") == 0
    vllm.connector.close()


def test_an_answer_is_cached_with_its_prompt(vllm: FakeVllm) -> None:
    request = FakeRequest("first", list(PROMPT), len(PROMPT) + 9, None)
    vllm.submit(request)
    vllm.drain()
    computed = (request.length - 1) // BLOCK * BLOCK  # the last token was never an input
    assert offered(vllm, "next turn", [*request.tokens, 7, 8, 9]) == computed
    vllm.connector.close()


def test_what_is_no_function_of_tokens_is_neither_saved_nor_loaded(vllm: FakeVllm) -> None:
    run(vllm, "first", PROMPT)
    image = FakeRequest("image", list(PROMPT), 30, None, all_token_ids=list(PROMPT))
    vllm.connector.arrived(image, cacheable=False)
    assert vllm.connector.offer(image, 0) == 0
    vllm.connector.finished("image")
    scores = FakeRequest("scores", list(PROMPT), 30, None, True, list(PROMPT))
    vllm.connector.arrived(scores, cacheable=True)
    assert vllm.connector.offer(scores, 0) == 0  # each of its positions is wanted
    vllm.connector.finished("scores")
    vllm.connector.close()


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("by_block", [False, True])
def test_a_load_that_failed_is_computed_and_not_offered_again(
    by_block: bool, streams: bool
) -> None:
    how = {"by_block": by_block, "streams": streams}
    vllm = FakeVllm(Random(1), blocks=48, dram_blocks=40, late=0, **how)
    run(vllm, "first", PROMPT)
    again = FakeRequest("again", list(PROMPT), len(PROMPT) + 5, None)
    vllm.submit(again)
    vllm.fail_next_load(again)
    vllm.drain()
    assert again.load_failed
    assert vllm.finished == 2
    assert vllm.connector.failed_loads == 1
    assert vllm.check_pool()
    vllm.connector.close()


def test_blocks_that_are_invalid_void_what_was_saved_behind_them(vllm: FakeVllm) -> None:
    request = FakeRequest("first", list(PROMPT), len(PROMPT) + 5, None)
    late = FakeVllm(Random(1), blocks=48, dram_blocks=40, late=1)
    late.submit(request)
    late.step()
    late.connector.update((), (), {request.blocks[2]}, None)  # before the save is reported
    late.abort(request)
    late.drain()
    assert late.pool.stats().dram.cached == 0
    assert late.pool.stats().dram.active == 0
    late.connector.close()
    vllm.connector.close()


def test_reset_forgets_every_tenant_s(vllm: FakeVllm) -> None:
    run(vllm, "first", PROMPT)
    run(vllm, "tenant", PROMPT, "tenant")
    assert vllm.pool.stats().dram.cached == 12
    vllm.connector.reset()
    assert vllm.pool.stats().dram.cached == 0
    vllm.connector.close()


def test_nothing_from_before_a_reset_is_published_after_it() -> None:
    late = FakeVllm(Random(1), blocks=48, dram_blocks=40, late=1)
    late.submit(FakeRequest("first", list(PROMPT), len(PROMPT) + 9, None))
    late.step()  # its save is done and not reported yet
    late.connector.reset()
    late.drain()
    assert late.check_pool() == 0
    run(late, "second", PROMPT)
    assert late.check_pool() == 6
    late.connector.close()


def test_memory_that_is_taken_is_no_error(vllm: FakeVllm) -> None:
    held = vllm.pool.alloc_mem(38, Medium.DRAM)
    run(vllm, "first", PROMPT)
    assert vllm.connector.unsaved == 1
    vllm.pool.free_mem(held)
    run(vllm, "second", PROMPT)
    assert vllm.check_pool() == 6
    vllm.connector.close()


def test_memory_that_cannot_be_mapped_costs_its_cache_and_no_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    from memserve.vllm.connector import worker

    monkeypatch.setattr(worker, "SHM_DIRECTORY", tmp_path)
    vllm = FakeVllm(Random(1), blocks=48, dram_blocks=40, late=0)
    run(vllm, "first", PROMPT)
    run(vllm, "second", PROMPT)
    assert vllm.finished == 2
    assert vllm.pool.stats().dram.cached == vllm.pool.stats().dram.active == 0
    vllm.connector.close()
