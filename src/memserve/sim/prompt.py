"""A simulated request: its prompt as blocks, and what happened to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from memserve.types import InstanceId, RequestId, TokenArray

BlockKey = int  # names a block together with everything in front of it


class BlockKeys:
    """Names for blocks of tokens: equal exactly for equal prefixes."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._names: dict[tuple[BlockKey, bytes], BlockKey] = {}

    def of(self, tokens: TokenArray) -> tuple[BlockKey, ...]:
        """The keys of the whole blocks of `tokens` [n] int32."""
        data, size = tokens.tobytes(), 4 * self.block_tokens
        keys: list[BlockKey] = []
        key = 0
        for at in range(0, len(data) - size + 1, size):
            key = self._names.setdefault((key, data[at : at + size]), len(self._names) + 1)
            keys.append(key)
        return tuple(keys)


@dataclass(slots=True)
class SimRequest:
    """One request. Times are virtual seconds; `cached_tokens` is what was not computed."""

    id: RequestId
    tokens: TokenArray  # [prompt tokens] int32
    keys: tuple[BlockKey, ...]  # of the prompt's whole blocks
    output_tokens: int
    session: str
    # Of prompt and answer, where the data tells what the next prompt goes on from.
    final_tokens: TokenArray | None = None
    final_keys: tuple[BlockKey, ...] = ()
    arrival: float = 0.0
    first_token: float | None = None
    end: float | None = None
    cached_tokens: int = 0
    fetched_tokens: int = 0
    computed_at: InstanceId | None = None
    moved_tokens: int = 0  # from prefill to decode

    @property
    def prompt_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class SimSession:
    """Requests of which each arrives when the one before has ended, after `think` seconds."""

    arrival: float
    requests: Sequence[SimRequest]
    think: float = field(default=0.0)
