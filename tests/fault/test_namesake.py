"""Two lives of one instance, of which the first was only stopped. Protects: the name belongs to the
one that is heard of, and what the other says and sends is nobody's."""

from __future__ import annotations

import torch

from memserve import MemPool
from tests.transfer_child import BLOCKS, Child
from tests.transfer_harness import LAYOUT, LOCAL, kv_blocks, quiet, tokens_of


def test_a_stopped_namesake_that_comes_back_does_not_get_its_name_back() -> None:
    with MemPool(LAYOUT, BLOCKS, instance="b") as b, Child("a") as first:
        address = b.serve(LOCAL)
        first.ask(f"connect b {address}")
        first.stop()
        with Child("a") as second:
            second.ask(f"connect b {address}")  # once the first has been silent for a lease
            second.ask("send b 3")
            assert second.ask("result") == "done"
            first.go_on()
            first.ask("send b 4")
            assert first.ask("result") != "done"
            second.ask("send b 5")
            assert second.ask("result") == "done"
        with b.match(tokens_of(5)) as match:
            assert torch.equal(b.read(match.refs), kv_blocks(5))
        quiet(b)
