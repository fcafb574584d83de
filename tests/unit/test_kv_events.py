"""The wire types, and streams from engines that are not ours."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from memserve.api.kv_events import (
    AllBlocksCleared,
    BlockStored,
    EventBatch,
    MalformedEvents,
    decode_batch,
    extra_keys,
    namespace_of,
    text_blocks,
)
from memserve.api.namespaces import is_private, private, salt_of, salted
from memserve.instance.kv_events import wire_events
from memserve.pool.listener import StoredRun
from memserve.scheduler.event_stream import EventCounts, EventStream
from memserve.scheduler.prompt_tree import PromptTree
from memserve.types import InstanceId, Namespace

V = InstanceId("vllm")
TOKENS = list(range(8))


def stored(hashes: list[object], parent: object = None, **fields: object) -> dict[str, object]:
    """As vLLM 0.32 encodes it: a map, without the fields that have their defaults."""
    count = 4 * len(hashes)
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": TOKENS[:count],
        "block_size": 4,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        **fields,
    }


def removed(hashes: list[object], **fields: object) -> dict[str, object]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU", **fields}


class Follower:
    """A tree that follows one publisher without snapshots."""

    def __init__(self) -> None:
        self.tree = PromptTree()
        self.tree.join(V, 4)
        self.counts = EventCounts()
        self.stream = EventStream(self.tree, V, 4, self.counts, position=-1)
        self._next = 0

    def tell(self, *events: dict[str, object]) -> None:
        payload = msgspec.msgpack.encode([1.0, list(events), 0])
        self.stream.offer(self._next, decode_batch(payload))
        self._next += 1

    def match(self, namespace: str = "") -> int:
        tokens = np.array(TOKENS, dtype=np.int32)
        return self.tree.match(Namespace(namespace), tokens).get(V, 0)


def test_hashes_may_be_bytes_or_64_bit_numbers() -> None:
    follower = Follower()
    follower.tell(stored([b"\x01" * 32]))
    follower.tell(stored([2**64 - 1], parent=b"\x01" * 32, token_ids=TOKENS[4:]))
    assert follower.match() == 8
    follower.tell(removed([2**64 - 1]))
    assert follower.match() == 4
    follower.tell({"type": "AllBlocksCleared"})
    assert follower.match() == 0


def test_fields_of_later_versions_are_ignored() -> None:
    follower = Follower()
    follower.tell(stored([1, 2], group_idx=0, kv_cache_spec_kind="full_attention", news={"a": 1}))
    assert follower.match() == 8


def test_salts_and_adapters_are_namespaces() -> None:
    follower = Follower()
    follower.tell(stored([1, 2], extra_keys=[["x"], None]))
    follower.tell(stored([3, 4], extra_keys=[["a"], ["a"]], lora_name="a"))
    follower.tell(stored([5], extra_keys=[["a", "x"]], lora_name="a"))
    assert follower.match() == 0
    assert follower.match("salt:x") == 8
    assert follower.match("lora:a:") == 8
    assert follower.match("lora:a:salt:x") == 4


def test_blocks_with_images_are_not_known_by_their_tokens() -> None:
    follower = Follower()
    follower.tell(stored([1, 2], extra_keys=[None, [["image", 3]]]))
    assert follower.match() == 4
    follower.tell(stored([3], parent=2))
    assert follower.counts.unplaced == 1


def test_windows_and_states_are_no_prefixes() -> None:
    follower = Follower()
    follower.tell(stored([1, 2], group_idx=0, kv_cache_spec_kind="full_attention"))
    follower.tell(
        stored([1, 2], group_idx=1, kv_cache_spec_kind="sliding_window"),
        stored([1, 2], group_idx=2, kv_cache_spec_sliding_window=128),
        removed([1, 2], group_idx=1),
        removed([1], group_idx=2),
    )
    assert follower.match() == 8
    follower.tell(removed([2], group_idx=0))
    assert follower.match() == 4


def test_a_block_is_gone_with_its_last_copy() -> None:
    follower = Follower()
    follower.tell(stored([1]), stored([1], medium="CPU"), removed([1]))
    assert follower.match() == 4
    follower.tell(removed([1], medium="CPU"))
    assert follower.match() == 0


def test_what_another_machine_has_does_not_count() -> None:
    follower = Follower()
    follower.tell(stored([1], locality="REMOTE"))
    assert follower.match() == 0


def test_events_that_cannot_be_are_counted_and_skipped() -> None:
    follower = Follower()
    follower.tell(
        stored([1], block_size=8, token_ids=TOKENS),
        stored([1, 1]),
        stored([1], token_ids=[2**40, 1, 2, 3]),
        stored([1, 2], token_ids=TOKENS[:4]),
    )
    assert (follower.counts.malformed, follower.match()) == (4, 0)
    with pytest.raises(MalformedEvents):
        decode_batch(msgspec.msgpack.encode([1.0, [{"type": "Unheard"}]]))


def test_without_a_replay_what_is_held_is_learned_anew() -> None:
    follower = Follower()
    follower.tell(stored([1]))
    follower._next += 1  # lost
    follower.tell(stored([2], parent=1, token_ids=TOKENS[4:]))
    assert follower.stream.gap
    assert follower.stream.lag == 2
    follower.stream.skip()
    assert (follower.stream.gap, follower.match()) == (False, 0)
    follower.tell(stored([1, 2]))
    assert follower.match() == 8


def test_events_are_encoded_as_vllm_does() -> None:
    """Its type demands some fields, and has defaults for the others."""
    run = StoredRun("salt:x", None, np.array([1 << 24, (1 << 48) | 5]), bytes(range(32)))
    events = [*wire_events(run, 4), *wire_events(run.refs, 4), AllBlocksCleared()]
    payload = msgspec.msgpack.encode(EventBatch(1.5, [*events], 0))
    always = {"block_hashes", "parent_block_hash", "token_ids", "block_size"}
    always |= {"type", "lora_id", "medium", "lora_name"}
    time, told, rank = msgspec.msgpack.decode(payload)
    assert (time, rank) == (1.5, 0)
    assert [event["type"] for event in told] == [
        "BlockStored",
        "BlockStored",
        "BlockRemoved",
        "BlockRemoved",
        "AllBlocksCleared",
    ]
    assert set(told[0]) == always | {"extra_keys"}
    assert set(told[1]) == always
    assert told[1]["parent_block_hash"] == told[0]["block_hashes"][0]
    assert [event["medium"] for event in told[:4]] == ["GPU", "CPU", "GPU", "CPU"]
    assert set(told[2]) == {"type", "block_hashes", "medium"}


@pytest.mark.parametrize("namespace", ["", "salt:x", "salt:", "tenant", "namespace"])
def test_namespaces_survive_the_wire(namespace: str) -> None:
    keys = extra_keys(Namespace(namespace), 2)
    event = BlockStored([1, 2], None, TOKENS, 4, None, "GPU", None, keys)
    event = msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=BlockStored)
    assert namespace_of(event) == namespace
    assert text_blocks(event) == 2


def test_salts_cannot_reach_private_namespaces() -> None:
    assert salted("sequence:x") != private("x")
    assert is_private(private("x"))
    assert not is_private(salted("sequence:x"))
    assert salt_of(salted("x")) == "x"
    assert salt_of(private("x")) is None
    assert salted("") == salted(None) == ""
