"""The engine's promises to those who call it: order, fairness, limits, cancellation."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memserve.api.generate import FinishReason, SamplingParams
from memserve.engine.batch import StepPlan, share_budget
from memserve.engine.model import Model
from memserve.engine.request import EngineRequest
from memserve.errors import EngineStopped, QueueFull, RequestError
from memserve.types import RequestId
from tests.engine_harness import load, running_engine
from tests.tiny_models import VOCAB, save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(save_tiny_model("llama", tmp_path_factory.mktemp("models")))


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, VOCAB, length)]


def test_decoding_goes_on_beside_a_long_prompt(model: Model) -> None:
    with running_engine(model, mixed_tokens=32) as engine:
        steady = engine.submit(prompt(10), 200)
        engine.outputs.wait_tokens(steady, 1)
        long = engine.submit(prompt(400, 1), 1)
        engine.finish(long)
        # 400 tokens are 12 full steps of 32 and a rest; each of them also decoded.
        assert len(engine.outputs.tokens(steady)) >= 12
        engine.finish(steady)


def test_a_short_prompt_passes_a_long_one_which_does_not_starve(model: Model) -> None:
    with running_engine(model, max_tokens=32) as engine:
        long = engine.submit(prompt(480), 1)
        shorts = [engine.submit(prompt(20, seed), 1) for seed in range(1, 5)]
        engine.finish(*shorts)
        assert not engine.outputs.tokens(long)
        engine.finish(long)
        # Half of every step was the long prompt's: 80 tokens of others, and 480 in 32 a step.
        assert engine.engine.stats().steps <= (480 + 80) // 32 + 3


def test_prompts_that_have_most_in_common_are_computed_once(model: Model) -> None:
    with running_engine(model, max_tokens=32) as engine:
        requests = [engine.submit([*prompt(160), 5 + i, 6], 3) for i in range(3)]
        other = engine.submit(prompt(40, 9), 3)
        answers = engine.finish(*requests)
        engine.finish(other)
        assert [engine.cached(r) for r in requests] == [0, 160, 160]
        assert engine.engine.stats().computed_prompt_tokens == 162 + 2 + 2 + 40
    with running_engine(model) as engine:
        assert engine.run([*prompt(160), 6, 6], 3) == answers[1]


@given(st.integers(1, 100), st.lists(st.integers(1, 120), max_size=8))
def test_a_steps_budget_is_used_up_and_half_of_it_is_the_firsts(
    budget: int, remaining: list[int]
) -> None:
    counts = share_budget(budget, remaining)
    assert sum(counts) == min(budget, sum(remaining))
    assert all(0 <= count <= left for count, left in zip(counts, remaining, strict=True))
    if remaining:
        assert counts[0] >= min(remaining[0], budget - budget // 2)
    done = [at for at in range(1, len(remaining)) if counts[at] == remaining[at]]
    for at in range(1, len(remaining)):
        if at not in done:  # nothing shorter waits for something longer
            assert all(remaining[other] <= remaining[at] for other in done)


def test_steps_that_compute_prompts_do_not_count_as_decode_steps(model: Model) -> None:
    with running_engine(model, max_tokens=32) as engine:
        requests = [engine.submit(prompt(100, seed), 8) for seed in range(2)]
        engine.finish(*requests)
        stats = engine.engine.stats()
        # The first tokens come of steps with prompts, and some more while the other one's runs.
        assert 7 <= stats.decode_steps <= stats.steps - 200 / 32
        assert 7 <= stats.decode_tokens <= 2 * 7
        assert stats.decode_seconds > 0.0
        before = stats
        engine.finish(engine.submit(prompt(30, 9), 1))  # its only token comes of its prompt
        stats = engine.engine.stats()
        assert stats.steps > before.steps
        assert stats.decode_steps == before.decode_steps


def test_what_a_preemption_lost_is_not_computed_in_decode_steps(model: Model) -> None:
    with running_engine(model, hbm_blocks=18, dram_blocks=0) as engine:
        plan, wide = engine.engine._scheduler.plan, []

        def watched() -> StepPlan | None:
            found = plan()
            if found is not None and any(each.count > 1 for each in found.scheduled):
                wide.append(found)
            return found

        engine.engine._scheduler.plan = watched  # type: ignore[method-assign]
        engine.finish(*(engine.submit(prompt(40 + 5 * i, 30 + i), 60) for i in range(5)))
        stats = engine.engine.stats()
        assert stats.preemptions > 0
        assert len(wide) > 1  # prompts, and what is computed again
        assert stats.decode_steps <= stats.steps - len(wide)


def test_pauses_between_requests_are_no_time_of_decode_steps(model: Model) -> None:
    with running_engine(model) as engine:
        begun = time.monotonic()
        for seed in range(3):
            engine.finish(engine.submit(prompt(20, seed), 4))
            time.sleep(0.2)
        elapsed = time.monotonic() - begun
        assert engine.engine.stats().decode_seconds <= elapsed - 3 * 0.2


def test_priority_then_arrival(model: Model) -> None:
    with running_engine(model, max_running=1) as engine:
        first = engine.submit(prompt(10), 40)
        engine.outputs.wait_tokens(first, 1)
        late = engine.submit(prompt(10, 1), 40, priority=5)
        urgent = engine.submit(prompt(10, 2), 2, priority=-1)
        engine.finish(urgent)
        assert not engine.outputs.tokens(late)
        engine.finish(first, late)


def test_samples_of_one_prompt_share_its_blocks(model: Model) -> None:
    with running_engine(model) as engine:
        leader = engine.submit(prompt(100), 5)
        others = [engine.submit(prompt(100), 5, follows=leader) for _ in range(3)]
        answers = engine.finish(leader, *others)
        assert all(answer == answers[0] for answer in answers)
        assert [engine.cached(o) for o in others] == [96, 96, 96]
        assert engine.engine.stats().computed_prompt_tokens == 100 + 3 * 4


def test_sequences_with_equal_prefixes_share_memory_while_they_run(model: Model) -> None:
    """Four sequences of 100 equal tokens fit where memory for one and four tails is."""
    with running_engine(model, hbm_blocks=6 + 4 * 2, dram_blocks=0, max_tokens=100) as engine:
        requests = [engine.submit([*prompt(96), 5 + i], 12) for i in range(4)]
        engine.finish(*requests)
        assert engine.engine.stats().preemptions == 0


@pytest.mark.parametrize("wait_for", [0, 1, 5])
def test_cancelled_requests_say_nothing_more_and_free_everything(
    model: Model, wait_for: int
) -> None:
    with running_engine(model, mixed_tokens=16) as engine:
        other = engine.submit(prompt(10, 1), 60)
        gone = engine.submit(prompt(300), 100)
        engine.outputs.wait_tokens(gone, wait_for)
        engine.engine.cancel([RequestId(gone)])
        engine.finish(other)
        assert all(o.finish_reason is None for o in engine.outputs.of(gone))
        assert len(engine.outputs.tokens(gone)) < 100
        assert engine.engine.stats().cancelled == 1
        assert engine.engine.stats().running == 0


def test_unknown_ids_are_ignored_by_cancel(model: Model) -> None:
    with running_engine(model) as engine:
        engine.engine.cancel([RequestId("nobody")])
        assert len(engine.run(prompt(5), 3)) == 3


def test_end_tokens(model: Model) -> None:
    with running_engine(model) as engine:
        free = engine.run(prompt(20), 30)
        stop = free[10]
        until = free[: free.index(stop) + 1]
        request = engine.submit(prompt(20), 30, stop_token_ids=(stop,))
        assert engine.finish(request) == [until]
        last = engine.outputs.of(request)[-1]
        assert last.finish_reason is FinishReason.STOP
        assert last.stop_token == stop
        # Masked until there are enough tokens; so the answer may differ from there on.
        longer = engine.run(prompt(20), 30, stop_token_ids=(stop,), min_tokens=20)
        assert len(longer) >= 20


def test_the_context_ends_an_answer(model: Model) -> None:
    with running_engine(model, hbm_blocks=8) as engine:
        assert engine.engine.info.max_tokens == 128
        request = engine.submit(prompt(100), 1000)
        [answer] = engine.finish(request)
        assert len(answer) == 28
        assert engine.outputs.of(request)[-1].finish_reason is FinishReason.LENGTH


def test_same_seed_same_tokens_in_any_company(model: Model) -> None:
    options = {"temperature": 1.0, "seed": 7}
    with running_engine(model) as engine:
        alone = engine.run(prompt(30), 20, **options)
        company = [engine.submit(prompt(40 + i, i), 30, temperature=1.0) for i in range(5)]
        among = engine.run(prompt(30), 20, **options)
        engine.finish(*company)
        assert among == alone
        assert engine.run(prompt(30), 20, temperature=1.0, seed=8) != alone


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "seed": 4, "frequency_penalty": 1.5, "repetition_penalty": 1.2},
    ],
)
@pytest.mark.parametrize("done", [1, 7, 19])
def test_taking_over_continues_as_the_first_run_would(
    model: Model, options: dict[str, float], done: int
) -> None:
    with running_engine(model) as first, running_engine(model) as second:
        whole = first.run(prompt(30), 20, **options)
        request = second.submit(prompt(30), 20, output=whole[:done], **options)
        assert second.finish(request) == [whole[done:]]
        assert second.outputs.of(request)[-1].usage.prompt_tokens == 30
        with pytest.raises(RequestError, match="exist already"):
            second.submit(prompt(30), 20, output=whole)


def test_prefill_only_gives_the_first_token_and_caches_the_prompt(model: Model) -> None:
    with running_engine(model) as engine:
        request = engine.submit(prompt(50), 20, prefill_only=True)
        [first] = engine.finish(request)
        assert engine.outputs.of(request)[-1].finish_reason is FinishReason.LENGTH
        assert engine.pool.stats().hbm.cached == 3
        rest = engine.run(prompt(50), 20, output=first)
        assert first + rest == engine.run(prompt(50), 20)
        assert len(first) == 1


def test_logprobs_come_with_tokens(model: Model) -> None:
    with running_engine(model) as engine:
        request = engine.submit(prompt(20), 5, logprobs=3)
        engine.finish(request)
        for output in engine.outputs.of(request):
            [logprobs] = output.logprobs
            assert len(logprobs.top) == 3
            assert logprobs.rank == 1
            assert logprobs.top[0] == (output.token_ids[0], logprobs.chosen)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "empty"),
        ([3, VOCAB], str(VOCAB)),
        ([3, -1], "-1"),
        ([3] * 128, "at most 128"),
    ],
)
def test_prompts_that_can_never_run(model: Model, tokens: list[int], words: str) -> None:
    with running_engine(model, hbm_blocks=8) as engine:
        with pytest.raises(RequestError, match=words) as error:
            engine.submit(tokens, 1)
        assert error.value.param == "prompt"
        assert len(engine.run(prompt(5), 3)) == 3


def test_a_full_queue_refuses_all_of_a_call(model: Model) -> None:
    with running_engine(model, max_running=1, max_waiting=3) as engine:
        running = engine.submit(prompt(10), 100)
        engine.outputs.wait_tokens(running, 1)
        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        call = [
            EngineRequest(RequestId(f"x{i}"), np.arange(3, 9, dtype=np.int32), params)
            for i in range(4)
        ]
        with pytest.raises(QueueFull, match="at most 3"):
            engine.engine.submit(call)
        engine.engine.submit(call[:3])
        with pytest.raises(QueueFull):
            engine.engine.submit(call[3:])
        engine.outputs.wait_finished("x0", "x1", "x2")


def test_stopping_tells_everyone(model: Model) -> None:
    with running_engine(model, max_running=1) as engine:
        running, waiting = engine.submit(prompt(10), 500), engine.submit(prompt(10, 1), 500)
        engine.outputs.wait_tokens(running, 1)
        engine.engine.stop()
        for request in (running, waiting):
            assert engine.outputs.of(request)[-1].finish_reason is FinishReason.CANCELLED
        with pytest.raises(EngineStopped):
            engine.submit(prompt(10), 1)


def test_a_failing_step_tells_everyone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("device lost")

    with running_engine(model) as engine:
        running = engine.submit(prompt(10), 500)
        engine.outputs.wait_tokens(running, 1)
        monkeypatch.setattr(model, "forward", broken)
        engine.outputs.wait_finished(running)
        last = engine.outputs.of(running)[-1]
        assert last.finish_reason is FinishReason.ERROR
        assert last.error is not None
        assert "device lost" in last.error
        with pytest.raises(EngineStopped):
            engine.submit(prompt(10), 1)


def test_an_idle_engine_does_nothing(model: Model) -> None:
    with running_engine(model) as engine:
        engine.run(prompt(10), 3)
        steps, used = engine.engine.stats().steps, time.process_time()
        time.sleep(0.2)
        assert engine.engine.stats().steps == steps
        assert time.process_time() - used < 0.15
