"""The measurement of scale: its stand-ins are members, and its report says what was measured."""

from __future__ import annotations

import msgspec
from rich.console import Console

from evaluation.scale.blocks import BLOCK_TOKENS, Blocks
from evaluation.scale.page import scale_tables
from evaluation.scale.run import ScaleConfig, ScaleResult, run_scale
from memserve.api.kv_events import EventBatch, KVSnapshot
from memserve.scheduler.event_stream import EventCounts, EventStream
from memserve.scheduler.prompt_tree import PromptTree
from memserve.types import Epoch, InstanceId


def test_the_stand_ins_events_lead_where_their_snapshot_does() -> None:
    name, epoch = InstanceId("a"), Epoch(1)
    held = []
    for turns, seen in ((0, 0), (40, 0), (40, 40)):  # events alone; a snapshot behind them
        blocks, tree, counts = Blocks(epoch, 128), PromptTree(), EventCounts()
        tree.join(name, BLOCK_TOKENS, references=True)
        stream = EventStream(tree, name, BLOCK_TOKENS, counts)
        for _ in range(seen):
            blocks.turn()
        snapshot = KVSnapshot(name, epoch, seen - 1, BLOCK_TOKENS, blocks.snapshot())
        for _ in stream.restore(snapshot):
            pass
        for sequence in range(seen, turns):
            stream.offer(sequence, EventBatch(0.0, [*blocks.turn()]))
        tree.check_integrity()
        assert (counts.malformed, counts.unplaced) == (0, 0)
        held.append(tree.held(name))
    assert len(held[0]) == len(held[1]) == 128
    assert held[0] != held[1]
    assert held[1] == held[2]


def test_a_small_cluster_is_measured() -> None:
    config = ScaleConfig(
        members=4,
        held_blocks=64,
        seconds=0.5,
        batches=20,
        decisions=5,
        prompts=20,
        ready_seconds=60.0,
    )
    result = run_scale(config, None, lambda _: None)
    (gateway,) = result.gateways
    assert (gateway.members, gateway.most_ready, gateway.held_blocks) == (4, 4, 256)
    assert gateway.ready is not None
    assert gateway.synchronised is not None
    assert gateway.metrics is not None
    assert gateway.metrics.num_bytes > 10_000
    assert gateway.request_cpu is not None
    assert gateway.lag == 0
    assert [(each.instances, each.candidates) for each in result.decisions] == [(4, 4), (4, 6)]
    same = msgspec.json.decode(msgspec.json.encode(result), type=ScaleResult)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(scale_tables(same))
    assert "prefill + decode" in capture.get()
