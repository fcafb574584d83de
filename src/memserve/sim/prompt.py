"""`SimRequest`, a simulated request with its prompt's blocks and its results; `SimSession`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from memserve.types import InstanceId, RequestId, TokenArray

BlockKey = int  # identifies a block and all blocks before it


class BlockKeys:
    """Maps blocks to keys, which are equal exactly for equal prefixes."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._names: dict[tuple[BlockKey, bytes], BlockKey] = {}

    def of(self, tokens: TokenArray) -> tuple[BlockKey, ...]:
        """Keys of the whole blocks of `tokens` [n] int32."""
        data, size = tokens.tobytes(), 4 * self.block_tokens
        keys: list[BlockKey] = []
        key = 0
        for at in range(0, len(data) - size + 1, size):
            key = self._names.setdefault((key, data[at : at + size]), len(self._names) + 1)
            keys.append(key)
        return tuple(keys)


@dataclass(slots=True)
class SimRequest:
    """One request and its results. Times are virtual seconds; None: not yet."""

    id: RequestId
    tokens: TokenArray  # [prompt tokens] int32
    keys: tuple[BlockKey, ...]  # of the prompt's whole blocks
    output_tokens: int
    session: str
    # Of prompt and answer, if the data has answers: the next prompt of the session extends them.
    final_tokens: TokenArray | None = None
    final_keys: tuple[BlockKey, ...] = ()
    arrival: float = 0.0
    first_token: float | None = None
    end: float | None = None
    cached_tokens: int = 0  # of the prompt: not computed, fetched ones included
    fetched_tokens: int = 0
    computed_at: InstanceId | None = None
    moved_tokens: int = 0  # from prefill to decode instance

    @property
    def prompt_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class SimSession:
    """Requests in sequence: each arrives `think` seconds after the end of the one before."""

    arrival: float
    requests: Sequence[SimRequest]
    think: float = field(default=0.0)
