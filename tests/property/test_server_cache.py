"""Random events of a vLLM server with memory behind its own: what a snapshot of them restores.

Whatever was stored, removed and cleared, in either memory: who restores the snapshot knows just the
prompts whose blocks are all held, and goes on with later events.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.api.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    KVSnapshot,
)
from memserve.instance.server_cache import ServerCache, stored_event
from memserve.scheduler.event_stream import EventCounts, EventStream
from memserve.scheduler.prompt_tree import PromptTree
from memserve.types import Epoch, InstanceId, Namespace

V = InstanceId("v")
BLOCK = 4
SALTS = "", "x"
_encode = msgspec.msgpack.Encoder().encode
_snapshots = msgspec.msgpack.Decoder(KVSnapshot)

Prompt = tuple[int, ...]  # a number for each block
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)
spaces = st.sampled_from(SALTS)
places = st.sampled_from(["GPU", "CPU"])
stores = st.tuples(st.just("store"), places, spaces, prompts, st.integers(0, 3))
removals = st.tuples(st.just("remove"), places, spaces, prompts)
clears = st.tuples(st.just("clear"))
changes = st.lists(st.one_of(stores, stores, removals, clears), max_size=25)


def name_of(salt: str, prompt: Prompt) -> bytes:
    """As vLLM's: a block's name is that of the prompt up to its end."""
    return repr((salt, prompt)).encode()


def tokens_of(prompt: Prompt) -> list[int]:
    return [number * 10 + at for number in prompt for at in range(BLOCK)]


class Server:
    """What a vLLM would say, and what is held then."""

    def __init__(self) -> None:
        self.held: dict[str, set[bytes]] = {"GPU": set(), "CPU": set()}

    def change(self, change: Sequence[object]) -> BlockStored | BlockRemoved | AllBlocksCleared:
        match change:
            case "store", str(place), str(salt), tuple(prompt), int(known):
                return self._store(place, salt, prompt, min(known, len(prompt) - 1))
            case "remove", str(place), str(salt), tuple(prompt):
                self.held[place].discard(name_of(salt, prompt))
                return BlockRemoved([name_of(salt, prompt)], place)
            case _:
                self.held["GPU"].clear()
                return AllBlocksCleared()

    def _store(self, place: str, salt: str, prompt: Prompt, known: int) -> BlockStored:
        """The blocks of `prompt` behind the first `known`."""
        names = [name_of(salt, prompt[: n + 1]) for n in range(known, len(prompt))]
        self.held[place].update(names)
        keys = [(salt,), *[None] * (len(names) - 1)] if salt and not known else None
        parent = name_of(salt, prompt[:known]) if known else None
        tokens = tokens_of(prompt[known:])
        return BlockStored(names, parent, tokens, BLOCK, None, place, None, keys)

    def reusable(self, salt: str, prompt: Prompt) -> int:
        """Tokens of the longest prefix whose blocks are all held."""
        held = self.held["GPU"] | self.held["CPU"]
        blocks = 0
        while blocks < len(prompt) and name_of(salt, prompt[: blocks + 1]) in held:
            blocks += 1
        return blocks * BLOCK


def follower(blocks: ServerCache) -> tuple[PromptTree, EventStream]:
    """Somebody who begins with a snapshot, as it comes over a network."""
    sent = _encode(KVSnapshot(V, Epoch(1), 7, BLOCK, [], blocks.copy().stored()))
    tree = PromptTree()
    tree.join(V, BLOCK)
    stream = EventStream(tree, V, BLOCK, EventCounts())
    for _ in stream.restore(_snapshots.decode(sent)):
        pass
    assert (stream.position, stream.counts.unplaced, stream.counts.malformed) == (7, 0, 0)
    return tree, stream


def matched(tree: PromptTree, salt: str, prompt: Prompt) -> int:
    space = Namespace(f"salt:{salt}" if salt else "")
    tree.check_integrity()
    return tree.match(space, np.array(tokens_of(prompt), np.int32)).get(V, 0)


@settings(max_examples=200, deadline=None)
@given(before=changes, after=changes, asked=st.lists(st.tuples(spaces, prompts), max_size=8))
def test_a_snapshot_has_what_is_held(
    before: list[tuple[object, ...]],
    after: list[tuple[object, ...]],
    asked: list[tuple[str, Prompt]],
) -> None:
    server, blocks = Server(), ServerCache()
    for change in before:
        outlasted = blocks.apply([server.change(change)])
        assert outlasted == (change[0] == "clear" and bool(server.held["CPU"]))
    assert len(blocks) == sum(map(len, server.held.values()))
    tree, stream = follower(blocks)
    for each in asked:
        assert matched(tree, *each) == server.reusable(*each)
    for at, change in enumerate(after):
        event = server.change(change)
        told: list[BlockStored | BlockRemoved | AllBlocksCleared] = [event]
        if blocks.apply([event]):
            told += [stored_event(run, BLOCK) for run in blocks.stored()]
        stream.offer(8 + at, EventBatch(0.0, told, 0))
    for each in asked:
        # A block whose beginning was not held at the snapshot is known only when it comes again.
        assert matched(tree, *each) <= server.reusable(*each)


def test_what_no_follower_takes_is_not_kept() -> None:
    blocks = ServerCache()
    good = BlockStored([1], None, [0] * BLOCK, BLOCK, None, "GPU", None)
    wrong = {
        "tokens": {"token_ids": [0]},
        "a token of 2^31": {"token_ids": [1 << 31] * BLOCK},
        "a window": {"kv_cache_spec_kind": "sliding_window"},
        "elsewhere": {"locality": "REMOTE"},
    }
    for fields in wrong.values():
        blocks.apply([msgspec.structs.replace(good, **fields)])
    assert len(blocks) == 0
    blocks.apply([good])
    assert [stored_event(run, BLOCK) for run in blocks.stored()] == [good]


def test_copies_in_two_places_are_two_runs() -> None:
    server, blocks = Server(), ServerCache()
    prompt: Prompt = tuple(range(8))
    for place in ("GPU", "CPU"):
        blocks.apply([server.change(("store", place, "x", prompt[: n + 1], n)) for n in range(8)])
    assert [(run.place, len(run.hashes)) for run in blocks.stored()] == [("GPU", 8), ("CPU", 8)]
    # The rest of one is behind the beginning of the other.
    blocks.apply([BlockRemoved([name_of("x", prompt[:1])], "GPU")])
    found = [(run.place, len(run.hashes)) for run in blocks.stored()]
    assert found == [("CPU", 1), ("GPU", 7), ("CPU", 7)]
