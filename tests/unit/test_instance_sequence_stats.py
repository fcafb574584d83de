"""What each request is said to have taken: in its usage, in the log, in the metrics."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from memserve.api.generate import FinishReason
from memserve.api.status import Latencies
from memserve.api.timeline import MAX_PAUSES
from memserve.engine.request import Usage
from memserve.instance.app import instance_page
from memserve.instance.sequence_stats import SequenceStats, combined
from memserve.instance.timelines import Timelines, timeline_of
from memserve.types import Role
from tests.fakes import save_tiny_tokenizer
from tests.handoff_harness import BLOCK, Node, call_of, completed, node, pair, prompt_of
from tests.metric_page import figures
from tests.tiny_models import save_tiny_model
from tests.waiting import until

PROMPT = prompt_of(70, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


def test_a_prompt_computed_here() -> None:
    latencies = Latencies()
    stats = SequenceStats(submitted=10.0)
    stats.take(Usage(70, 16, 0, queue_seconds=2.0), 15.0, 1)
    stats.take(Usage(70, 16, 1, queue_seconds=2.0), 16.0, 1)
    stats.end(latencies, 18.0)
    assert (stats.queue_seconds, stats.prefill_seconds, stats.decode_seconds) == (2, 3, 3)
    assert (stats.cached_tokens_prefill, stats.cached_tokens_decode) == (16, 16)
    assert stats.preemptions == 1
    parts = (latencies.queue, latencies.prefill, latencies.decode)
    assert [part.sum for part in parts] == [2.0, 3.0, 3.0]
    assert not sum(latencies.transfer.counts) + sum(latencies.fetch.counts)


def test_a_prompt_computed_elsewhere_queues_at_both_sides() -> None:
    latencies = Latencies()
    stats = SequenceStats(submitted=10.0, handed_over=True, queue_seconds=1.0)
    stats.prefill_seconds, stats.transfer_seconds = 4.0, 0.5
    stats.take(Usage(70, 16, 0), 16.0, 1)  # the first token, from the prefill instance
    stats.take(Usage(70, 64, 0, queue_seconds=2.0), 19.0, 1)
    stats.take(Usage(70, 64, 0, queue_seconds=2.0), 20.0, 1)
    stats.end(latencies, 20.0)
    assert (stats.queue_seconds, stats.prefill_seconds, stats.decode_seconds) == (3, 4, 2)
    assert (latencies.transfer.sum, sum(latencies.transfer.counts)) == (0.5, 1)


def test_pauses_are_long_times_between_outputs() -> None:
    stats = SequenceStats(submitted=10.0, handed_over=True)
    for now in (11.0, 14.0, 14.1, 15.1):  # behind the first, the second queue is no pause
        stats.take(Usage(70, 16, 0, queue_seconds=2.0), now, 1)
    assert [(round(begin, 6), round(length, 6)) for begin, length in stats.pauses] == [(4.1, 1.0)]
    for now in range(20, 20 + 2 * MAX_PAUSES):
        stats.take(Usage(70, 16, 0), float(now), 1)
    assert len(stats.pauses) == MAX_PAUSES


async def test_a_hand_over_has_a_time_line_at_the_decode_instance(model: Path) -> None:
    async with pair(model) as (p, d):
        call = call_of(PROMPT, 5, prefill=[p])
        with d.instance.run(call) as run:
            await completed(run)
        told = d.instance.timelines.find(call.id)
        assert told is not None
        assert (told.ended, told.handed_over, told.prompt_tokens) == (True, True, 70)
        assert (told.output_tokens, told.preemptions) == (5, 0)
        assert sum(chunk.tokens for chunk in told.chunks) == 70  # computed at P
        assert told.chunks[-1].end <= told.queue + told.prefill
        assert min(told.prefill, told.transfer, told.decode) > 0
        assert d.instance.timelines.find("another") is None


async def test_time_lines_are_bounded(model: Path) -> None:
    async with node(model, Role.COLOCATED) as one:
        calls = [call_of(PROMPT, 2) for _ in range(3)]
        known = Timelines(kept=2)
        for call in (calls[0], calls[1], calls[0], calls[2]):
            with one.instance.run(call) as run:
                await completed(run)
            known.add(timeline_of(run.generation))
    assert [known.find(call.id) is not None for call in calls] == [True, False, True]


def test_a_request_s_figures_are_sums_and_slowest_times() -> None:
    one = SequenceStats(0.0, cached_tokens_prefill=16, blocks_received=3, blocks_already_present=1)
    two = SequenceStats(0.0, cached_tokens_prefill=32, queue_seconds=2.0, preemptions=1)
    stats = combined([one, two], [one], block_bytes=100)
    assert stats.cached_tokens_prefill == 16
    assert (stats.bytes_received, stats.bytes_avoided) == (300, 100)
    assert (stats.queue_seconds, stats.preemptions) == (2.0, 1)


async def turn(one: Node, prompt: list[int], **options: Any) -> tuple[list[int], dict[str, Any]]:
    answer = await one.complete(*prompt, **options)
    return prompt + answer.tokens[0], answer.body["usage"]["memserve"]


async def test_usage_tells_both_sides_of_a_hand_over(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "memserve.instance")
    async with pair(model) as (p, d):
        size = d.link.block_bytes
        conversation, first = await turn(d, PROMPT, tokens=30, prefill=[p])
        assert (first["cached_tokens_prefill"], first["cached_tokens_decode"]) == (0, 0)
        assert (first["blocks_received"], first["bytes_received"]) == (4, 4 * size)
        assert first["bytes_avoided"] == 0
        assert first["prefill_seconds"] > 0
        assert first["decode_seconds"] > 0
        await until(lambda: d.totals.returns == 1, "the return")
        await p.settled()
        prompt = conversation + prompt_of(20, 2)
        _, second = await turn(d, prompt, tokens=8, prefill=[p])
        here = 99 // BLOCK * BLOCK
        assert (second["cached_tokens_prefill"], second["cached_tokens_decode"]) == (here, here)
        assert second["bytes_avoided"] == here // BLOCK * size
        assert second["bytes_received"] == (len(prompt) // BLOCK - here // BLOCK) * size
        totals = d.totals
        assert totals.prompt_tokens == 70 + len(prompt)
        assert (totals.cached_tokens_prefill, totals.cached_tokens_decode) == (here, here)
        id = d.instance.identity.id
        samples = {
            (name.removeprefix("memserve_instance_"), *labels): value
            for (name, *labels), value in figures(instance_page(d.instance)).items()
        }
        sent = totals.blocks_received * size
        assert samples[("handoff_bytes_total", id, "received")] == sent
        assert samples[("handoff_bytes_total", id, "already_present")] == second["bytes_avoided"]
        assert samples[("handoff_bytes_total", id, "returned")] > 0
        assert samples[("handoff_prompt_tokens_total", id, "prefill")] == here
        for part in ("queue", "prefill", "transfer", "decode"):
            assert samples[(f"{part}_seconds_count", id)] == 2
    lines = [r.getMessage() for r in caplog.records if " done: " in r.getMessage()]
    assert f"cached {here} where computed, {here} where decoded" in lines[-1]
    assert any("returned to" in record.getMessage() for record in caplog.records)


async def test_a_sequence_that_waits_says_how_long(model: Path) -> None:
    async with node(model, Role.COLOCATED, max_running=1) as one:
        with one.instance.run(call_of(prompt_of(9, 1), 60)) as first:
            await first.step()
            with one.instance.run(call_of(PROMPT, 4)) as second:
                ahead, behind = await completed(first), await completed(second)
    waited = behind.body["usage"]["memserve"]["queue_seconds"]
    assert waited > ahead.body["usage"]["memserve"]["queue_seconds"]
    # It could not run while the other one did; most of that time it was there.
    assert waited > ahead.body["usage"]["memserve"]["decode_seconds"] / 4
    assert behind.reasons == [FinishReason.LENGTH]


async def test_a_call_that_is_given_up_says_so(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "memserve.instance")
    async with node(model, Role.COLOCATED) as one:
        call = call_of(PROMPT, 200)
        with one.instance.run(call) as run:
            await run.step()
    assert any(f"{call.id} given up: 70 prompt" in r.getMessage() for r in caplog.records)
