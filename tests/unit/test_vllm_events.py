"""What a real vLLM sent, and what it reused afterwards: the trees must have known it."""

from __future__ import annotations

import msgspec
import numpy as np

from memserve.api.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, decode_batch
from memserve.api.namespaces import salted
from memserve.scheduler.event_stream import EventCounts, EventStream
from memserve.scheduler.prompt_tree import PromptTree
from memserve.types import InstanceId
from tests.vllm_events import RECORDING, Recording, Step, reusable, script, stored

V = InstanceId("vllm")


class Follower:
    """A tree that follows the recording."""

    def __init__(self, recording: Recording) -> None:
        self.tree = PromptTree()
        self.tree.join(V, recording.block_tokens)
        self.counts = EventCounts()
        self._stream = EventStream(self.tree, V, recording.block_tokens, self.counts, position=-1)

    def match(self, step: Step) -> int:
        tokens = np.array(step.prompt, dtype=np.int32)
        return self.tree.match(salted(step.salt), tokens).get(V, 0)

    def tell(self, frames: list[list[bytes]]) -> None:
        for _, sequence, payload in frames:
            self._stream.offer(int.from_bytes(sequence, "big"), decode_batch(payload))
        self.tree.check_integrity()


def _recording() -> Recording:
    return msgspec.msgpack.decode(RECORDING.read_bytes(), type=Recording)


def test_matches_are_what_vllm_reused() -> None:
    recording = _recording()
    follower = Follower(recording)
    compared = 0
    forgotten = False
    for each in recording.steps:
        if each.step.prompt and not forgotten:
            assert reusable(follower.match(each.step), each.step) == each.cached, each.step
            compared += 1
        # It tells that it has forgotten everything only with what it does next.
        forgotten = not each.step.prompt
        follower.tell(each.frames)
        if each.step.prompt:
            assert follower.match(each.step) == stored(each.step)
    assert compared >= 15
    assert (follower.counts.unplaced, follower.counts.malformed, follower.counts.gaps) == (0, 0, 0)


def test_the_recording_is_of_this_script_and_has_every_kind_of_event() -> None:
    recording = _recording()
    assert [each.step for each in recording.steps] == script()
    payloads = [frames[-1] for each in recording.steps for frames in each.frames]
    events = [event for payload in payloads for event in decode_batch(payload).events]
    assert {type(event) for event in events} == {BlockStored, BlockRemoved, AllBlocksCleared}
    assert any(event.extra_keys for event in events if isinstance(event, BlockStored))
    assert {each.cached > 0 for each in recording.steps} == {True, False}
