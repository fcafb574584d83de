"""One sequence in the engine: its tokens, how far their KV is computed, its blocks."""

from __future__ import annotations

import numpy as np

from memserve.api.generate import FinishReason
from memserve.engine.block_table import BlockTable
from memserve.engine.observer import PrefillObserver, PrefillWatch
from memserve.engine.request import EngineRequest, Usage
from memserve.engine.sampler import SamplerState
from memserve.types import RequestId, TokenArray

# The part of a prompt that must be saved for it to wait for another that has it in common.
_WORTH_WAITING = 0.5


class Sequence:
    """Owned by the engine's thread.

    Tokens are the prompt and what has been generated. A sequence decodes while exactly its last
    token has no KV, and prefills while more have none.
    """

    def __init__(
        self,
        request: EngineRequest,
        arrival: int,
        table: BlockTable,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        submitted: float = 0.0,
        observer: PrefillObserver | None = None,
        like: Sequence | None = None,
    ) -> None:
        """`observer`: the request's, as the engine's device has it. `like`: perhaps another sample
        of the same call, to share with it what their sampling has in common."""
        self.request = request
        self.arrival = arrival
        self.submitted = submitted  # seconds of the engine's clock
        self.queue_seconds = 0.0  # until its first step
        self.table = table
        self.computed = 0  # leading tokens whose KV is in the table
        self.cached_tokens = 0  # prompt tokens found in the index when first admitted
        self.preemptions = 0
        self.fresh = True  # has never been in a step
        params = request.sampling
        eos = () if params.ignore_eos else eos_token_ids
        self.sampler: SamplerState = SamplerState(
            params, request.prompt, eos, None if like is None else like.sampler
        )
        wanted = len(request.output) + 1 if request.prefill_only else params.max_tokens
        self.limit = min(len(request.prompt) + wanted, max_model_len)
        self._tokens = np.empty(self.limit, dtype=np.int32)
        self.length = len(request.prompt) + len(request.output)
        self._tokens[: self.length] = request.tokens
        for token in request.output.tolist():
            self.sampler.append(token)
        self._observer = observer
        self._observed = self.length // table.block_tokens  # blocks
        self.watch: PrefillWatch | None = None  # while it is admitted

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def tokens(self) -> TokenArray:
        """[length] int32, a view."""
        return self._tokens[: self.length]

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens without KV."""
        return self.length - self.computed

    @property
    def prefilling(self) -> bool:
        return self.remaining > 1

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: priority, then arrival."""
        return (self.request.priority, self.arrival)

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.cached_tokens, self.preemptions, self.queue_seconds)

    def admit(self, headroom: int) -> None:
        """Take what is cached, and room for all present tokens.

        Raises OutOfBlocks unless `headroom` blocks would be left for others; then nothing is
        held.
        """
        self.computed = self.table.acquire(self.tokens, headroom)
        if self.fresh:
            self.cached_tokens = min(self.computed, self.prompt_tokens)
        if self._observer is not None and self._observed:
            self.watch = self._observer.begin(self.table.refs[: self._observed])
            cached = self._observed_blocks(self.computed)
            if self.watch is not None and cached:
                self.watch.ready(0, cached, None)

    def gains_from(self, other: Sequence) -> bool:
        """Whether to let `other`, which prefills, go ahead: it is about to compute a good part
        of what this one, which waits, would compute too."""
        if self.request.ephemeral or self.request.namespace != other.request.namespace:
            return False
        mine, others = self.tokens, other.tokens
        most = min(len(mine) - 1, len(others))
        # Most prompts differ from the start: looking at one token is enough.
        if most <= other.computed or mine[other.computed] != others[other.computed]:
            return False
        differ = np.flatnonzero(mine[:most] != others[:most])
        common = int(differ[0]) if len(differ) else most
        gained = common - common % self.table.block_tokens - other.computed
        return gained >= _WORTH_WAITING * (len(mine) - other.computed)

    def completes(self, count: int) -> tuple[int, int]:
        """Which of the watched blocks, first and behind the last, get their last KV with
        `count` more tokens."""
        return self._observed_blocks(self.computed), self._observed_blocks(self.computed + count)

    def _observed_blocks(self, tokens: int) -> int:
        return min(tokens // self.table.block_tokens, self._observed)

    def advance(self, count: int) -> int:
        """`count` more tokens have KV now; full blocks become shared.

        Returns how many of them are prompt tokens.
        """
        before = self.computed
        first, last = self.completes(count)
        self.computed += count
        self.fresh = False
        watch = self.watch
        self.table.commit(self.tokens[: self.computed], None if watch is None else watch.superseded)
        if watch is not None and first < last and not watch.by_layer:
            watch.ready(first, last, None)
        return max(0, min(self.computed, self.prompt_tokens) - before)

    def append(self, token: int) -> FinishReason | None:
        """Add a sampled token; says whether it was the last."""
        self._tokens[self.length] = token
        self.length += 1
        self.sampler.append(token)
        if token in self.sampler.end_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.length == self.limit else None

    def preempt(self) -> None:
        """Give the memory back; cached blocks are found again at the next admission."""
        self._end_watch()
        self.table.release()
        self.computed = 0
        self.preemptions += 1

    def close(self) -> None:
        """The end: nothing is held any more."""
        self._end_watch()
        self.table.close()
        self.computed = 0

    def _end_watch(self) -> None:
        if self.watch is not None:
            self.watch.released(self._observed_blocks(self.computed))
            self.watch = None
