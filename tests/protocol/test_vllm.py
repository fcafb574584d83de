"""The events of a vLLM that runs, through sockets into the trees, beside what it reuses."""

from __future__ import annotations

import aiohttp
import numpy as np
import pytest

from memserve.api.namespaces import salted
from memserve.bench.vllm_engine import python_of, why_missing
from memserve.cluster.kv_feed import KvFeed
from memserve.cluster.kv_subscription import EventSource
from memserve.scheduler.prompt_tree import PromptTree
from memserve.types import InstanceId
from tests.insider import peers
from tests.vllm_events import BLOCK, TOPIC, Step, reusable, script, stored, take, vllm_server
from tests.waiting import until

V = InstanceId("vllm")
_MISSING = why_missing("vllm")


@pytest.mark.real_vllm
@pytest.mark.skipif(_MISSING is not None, reason=f"vLLM is {_MISSING}")
async def test_matches_are_what_a_vllm_reuses() -> None:
    with vllm_server(python_of("vllm")) as server:
        tree = PromptTree()

        def match(step: Step) -> int:
            tokens = np.array(step.prompt, dtype=np.int32)
            return tree.match(salted(step.salt), tokens).get(V, 0)

        async with peers() as session, aiohttp.ClientSession() as clients:
            feed = KvFeed(tree, session)
            source = EventSource(V, server.endpoint, BLOCK, TOPIC, server.replay_endpoint)
            try:
                first, *steps = script()
                # Before anybody listens: the replay has to bring it.
                assert await take(clients, server.url, first) == 0
                feed.follow_source(source)
                await until(lambda: match(first) == stored(first), "what came before")
                forgotten = False
                for step in steps:
                    expected = reusable(match(step), step)
                    cached = await take(clients, server.url, step)
                    if not forgotten:
                        assert not step.prompt or cached == expected, step
                    forgotten = not step.prompt
                    if step.prompt:
                        await until(lambda s=step: match(s) == stored(s), f"{step}")  # type: ignore[misc]
                (member,) = feed.members()
                counts = member.counts
                assert (counts.unplaced, counts.malformed, counts.resets) == (0, 0, 0)
                tree.check_integrity()
            finally:
                await feed.close()
