"""Statistics of one answer: `usage.memserve` beside OpenAI's own figures, and the log's line."""

from __future__ import annotations

import msgspec


class RequestStats(msgspec.Struct, frozen=True):
    """Tokens, whole blocks and bytes are sums over a request's prompts; seconds are those of the
    sequence that took longest. Returns of KV after the answer are in the metrics alone.
    """

    cached_tokens_prefill: int  # of the prompts, cached at the prefill instance
    cached_tokens_decode: int  # of the prompts, cached at the decode instance
    blocks_fetched: int  # from a third instance, before the prompts were computed
    blocks_received: int  # from the prefill instance
    bytes_received: int
    bytes_avoided: int  # of blocks already present at the decode instance
    queue_seconds: float  # until the first step, at the prefill and at the decode instance
    fetch_seconds: float
    prefill_seconds: float  # from the first step to the first token
    transfer_seconds: float  # from the first token until the KV is at the decode instance
    decode_seconds: float  # from the first token to the last
    preemptions: int

    def __str__(self) -> str:
        return (
            f"cached {self.cached_tokens_prefill} where computed, "
            f"{self.cached_tokens_decode} where decoded; "
            f"{self.blocks_fetched} blocks fetched, {self.blocks_received} received "
            f"({self.bytes_received} bytes, {self.bytes_avoided} avoided); "
            f"queue {self.queue_seconds:.4f} s, fetch {self.fetch_seconds:.4f} s, "
            f"prefill {self.prefill_seconds:.4f} s, transfer {self.transfer_seconds:.4f} s, "
            f"decode {self.decode_seconds:.4f} s; {self.preemptions} preemptions"
        )
