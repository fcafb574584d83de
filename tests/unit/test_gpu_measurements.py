"""What is measured on a GPU, tried on a CPU: the work is the same, the figures mean nothing."""

from __future__ import annotations

import pytest
import torch

from evaluation.gpu.copies import CopiesConfig, copies_table, run_copies
from evaluation.gpu.llama import config_of, random_llama, weight_bytes
from evaluation.gpu.steps import StepsConfig, run_steps, steps_table
from evaluation.handover import HandoverReport, HandoverRun, handover_table
from memserve.bench.tables import PlainTable, plain_tables
from memserve.pool.storage import BlockStore


def silent(_: str) -> None:
    pass


def test_steps_of_the_engine_beside_generate() -> None:
    config = StepsConfig(
        size="tiny",
        device="cpu",
        dtype="float32",
        prompt_tokens=40,
        batches=(1, 3),
        steps=5,
        repeats=2,
        compiled=False,
    )
    report = run_steps(config, silent)
    assert [decode.batch for decode in report.decodes] == [1, 3]
    for decode in report.decodes:
        assert decode.step.generate is not None
        assert 0 < decode.floor < decode.step.engine
        low, high = decode.step.spread
        assert low <= decode.step.engine <= high
    (shown,) = plain_tables(steps_table(report))
    assert isinstance(shown, PlainTable)
    assert [row[0] for row in shown.rows] == [
        "prefill of 40",
        "step of 1 behind 40",
        "step of 3 behind 40",
    ]


def test_weights_are_counted_as_a_step_reads_them() -> None:
    device = torch.device("cpu")
    assert config_of("1b").tie_word_embeddings
    model = random_llama("tiny", torch.float32, device, "sdpa")
    numbers = sum(p.numel() for p in model.parameters())
    shape = config_of("tiny")
    assert weight_bytes(model) == 4 * (numbers - shape.vocab_size * shape.hidden_size)


def test_copies_of_a_pool() -> None:
    config = CopiesConfig(size="tiny", device="cpu", blocks=8, repeats=2)
    report = run_copies(config, silent)
    assert [(t.direction, t.aggregated) for t in report.timings] == [
        (direction, aggregated)
        for aggregated in (True, False)
        for direction in ("swap out", "swap in", "read in HBM")
    ]
    assert all(min(t.pool, t.cuda, t.by_block) > 0 for t in report.timings)
    (shown,) = plain_tables(copies_table(report))
    assert isinstance(shown, PlainTable)
    assert len(shown.rows) == 6


def test_a_copy_that_changes_bytes_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        pass

    monkeypatch.setattr(BlockStore, "copy_from", lost)
    with pytest.raises(AssertionError, match="swaps changed bytes"):
        run_copies(CopiesConfig(size="tiny", device="cpu", blocks=8, repeats=1), silent)


def test_what_a_hand_over_exposes_is_told_against_the_same_turn() -> None:
    runs = [
        HandoverRun("colocated", 0, 0.1, 0.010),
        HandoverRun("by-layer", 0, 0.1, 0.012),
        HandoverRun("by-request", 0, 0.1, 0.015),
        HandoverRun("colocated", 1, 0.1, 0.020),
        HandoverRun("by-layer", 1, 0.1, 0.026),
        HandoverRun("by-request", 1, 0.1, 0.029),
    ]
    (shown,) = plain_tables(handover_table(HandoverReport(2048, tuple(runs))))
    assert isinstance(shown, PlainTable)
    assert [tuple(row) for row in shown.rows] == [
        ("colocated", "100", "15.0", "", ""),
        ("by-layer", "100", "19.0", "4.0", "2.0, 6.0"),
        ("by-request", "100", "22.0", "7.0", "5.0, 9.0"),
    ]
