"""What a member of the stand-in process caches: prompts behind a prefix, the oldest given up."""

from __future__ import annotations

from collections import deque

import numpy as np

from memserve.api.kv_events import (
    AllBlocksCleared,
    BlockHash,
    BlockRemoved,
    BlockStored,
    StoredBlocks,
)
from memserve.types import GENERATION_BITS, SHARED, Epoch, IndexArray, TokenArray

BLOCK_TOKENS = 16
VOCABULARY = 50_000
PREFIX_BLOCKS = 32  # that all members have cached: a system prompt
PROMPT_BLOCKS = 16  # of each prompt behind it
_PREFIX_SEED = 1


def prefix_tokens() -> TokenArray:
    """Return the prefix that all members have, [tokens] int32."""
    rng = np.random.default_rng(_PREFIX_SEED)
    return rng.integers(0, VOCABULARY, PREFIX_BLOCKS * BLOCK_TOKENS, np.int32)


class Blocks:
    """The cached blocks of one member: the prefix, and a ring of prompts of its own.

    Tokens are a function of the member and of the prompt's number, so that none are kept.
    """

    def __init__(self, epoch: Epoch, held: int) -> None:
        """`held`: blocks, of which the prefix takes PREFIX_BLOCKS."""
        self._epoch = epoch
        self._ring = max(1, (held - PREFIX_BLOCKS) // PROMPT_BLOCKS)  # prompts
        self._prefix = np.arange(PREFIX_BLOCKS, dtype=np.int64) << GENERATION_BITS
        self._next = self._ring  # number of the next prompt
        self._present = deque(range(self._ring))

    def snapshot(self) -> list[StoredBlocks]:
        """Return all blocks, in a snapshot's format."""
        prefix = StoredBlocks(SHARED, None, self._prefix.tobytes(), prefix_tokens().tobytes())
        last = int(self._prefix[-1])
        return [prefix] + [
            StoredBlocks(SHARED, last, self._names(n).tobytes(), self._tokens(n).tobytes())
            for n in self._present
        ]

    def turn(self) -> list[BlockStored | BlockRemoved | AllBlocksCleared]:
        """Cache one more prompt in place of the oldest; return the events of that."""
        gone, number = self._present.popleft(), self._next
        self._next += 1
        self._present.append(number)
        names: list[BlockHash] = self._names(number).tolist()
        return [
            BlockRemoved(self._names(gone).tolist(), "GPU"),
            BlockStored(
                block_hashes=names,
                parent_block_hash=int(self._prefix[-1]),
                token_ids=self._tokens(number).tolist(),
                block_size=BLOCK_TOKENS,
                lora_id=None,
                medium="GPU",
                lora_name=None,
            ),
        ]

    def _names(self, number: int) -> IndexArray:
        """References of a prompt's blocks: places in the ring, and how often they were used."""
        first = PREFIX_BLOCKS + number % self._ring * PROMPT_BLOCKS
        index = np.arange(first, first + PROMPT_BLOCKS, dtype=np.int64)
        return index << GENERATION_BITS | number // self._ring

    def _tokens(self, number: int) -> TokenArray:
        rng = np.random.default_rng((self._epoch, number))
        return rng.integers(0, VOCABULARY, PROMPT_BLOCKS * BLOCK_TOKENS, np.int32)
