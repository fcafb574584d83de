"""One sequence in the engine: tokens, number of tokens with KV, block table, sampler state."""

from __future__ import annotations

import numpy as np

from memserve.api.generate import FinishReason
from memserve.api.timeline import MAX_CHUNKS, Chunk
from memserve.engine.block_table import BlockTable
from memserve.engine.constraint import Constraint
from memserve.engine.observer import PrefillObserver, PrefillWatch
from memserve.engine.request import EngineRequest, TokenLogprobs, Usage
from memserve.engine.sampler import SamplerState
from memserve.engine.scoring import PromptScores
from memserve.types import RequestId, TokenArray

# A sequence waits for another's prefill if that saves at least this share of its tokens that
# the other sequence has not computed yet.
_WORTH_WAITING = 0.5


class Sequence:
    """Prompt and generated tokens of one sequence, with their KV. Owned by the engine's thread.

    A sequence decodes while only its last token has no KV, and prefills while more tokens have
    none.
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
        """`observer`: the request's observer, on a GPU behind a `KernelFence`. `like`: another
        sequence; if both are samples of one call, they share the fixed part of their sampler
        state."""
        self.request = request
        self.arrival = arrival
        self.submitted = submitted  # seconds of the engine's clock
        self.queue_seconds = 0.0  # from `submitted` to the first step
        self.chunks: list[Chunk] = []
        self.table = table
        self.computed = 0  # leading tokens whose KV is in the table
        self.cached_tokens = 0  # prompt tokens found in the index when first admitted
        self.preemptions = 0
        self.fresh = True  # has never been in a step
        params = request.sampling
        eos = () if params.ignore_eos else eos_token_ids
        grammar = request.grammar
        self.sampler: SamplerState = SamplerState(
            params,
            request.prompt,
            eos,
            None if like is None else like.sampler,
            None if grammar is None else Constraint(grammar, eos_token_ids),
        )
        wanted = len(request.output) + 1 if request.prefill_only else params.max_tokens
        self.limit = min(len(request.prompt) + wanted, max_model_len)
        self._tokens = np.empty(self.limit, dtype=np.int32)
        self.length = len(request.prompt) + len(request.output)
        self._tokens[: self.length] = request.tokens
        for token in request.output.tolist():
            self.sampler.append(token)
        self.scores: PromptScores | None = None
        if params.prompt_logprobs is not None and not len(request.output):
            self.scores = PromptScores(request.prompt, params.prompt_logprobs)
        self._counted = 0  # leading prompt tokens that `advance` has returned, or that were cached
        self._observer = observer
        self._observed = self.length // table.block_tokens  # whole blocks that are watched
        self.watch: PrefillWatch | None = None  # while the sequence is admitted

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
        """Sort key: priority, then arrival; the lowest runs first."""
        return (self.request.priority, self.arrival)

    @property
    def usage(self) -> Usage:
        counts = (self.prompt_tokens, self.cached_tokens, self.preemptions, self.queue_seconds)
        return Usage(*counts, self.chunks)

    def computed_at(self, now: float, tokens: int) -> None:
        """Note that a step has computed so many of the tokens that had no KV, before `advance`."""
        if not (self.fresh or self.prefilling):
            return
        chunk = Chunk(now - self.submitted, tokens)
        if len(self.chunks) < MAX_CHUNKS:
            self.chunks.append(chunk)
        else:
            self.chunks[-1] = Chunk(chunk.end, tokens + self.chunks[-1].tokens)

    def admit(self, headroom: int) -> None:
        """Pin the cached prefix and reserve blocks for all current tokens.

        Raises OutOfBlocks, and then holds nothing, unless `headroom` blocks stay free for other
        sequences.
        """
        reusable = self.length - 1  # the last token is computed for its logits
        if self.scores is not None and not self.scores.complete:
            reusable = self.scores.scored  # before a preemption
        self.computed = self.table.acquire(self.tokens, reusable, headroom)
        if self.fresh:
            self.cached_tokens = min(self.computed, self.prompt_tokens)
            self._counted = self.cached_tokens
        if self._observer is not None and self._observed:
            self.watch = self._observer.begin(self.table.refs[: self._observed])
            cached = self._observed_blocks(self.computed)
            if self.watch is not None and cached:
                self.watch.ready(0, cached, None)

    def gains_from(self, other: Sequence) -> bool:
        """Whether this waiting sequence should wait for the prefill of `other`, which is about to
        compute a large part (`_WORTH_WAITING`) of the same blocks."""
        if self.request.ephemeral or self.request.namespace != other.request.namespace:
            return False
        if self.scores is not None:
            return False
        mine, others = self.tokens, other.tokens
        most = min(len(mine) - 1, len(others))
        # Cheap exit: most prompts differ from the start, so one token tells.
        if most <= other.computed or mine[other.computed] != others[other.computed]:
            return False
        differ = np.flatnonzero(mine[:most] != others[:most])
        common = int(differ[0]) if len(differ) else most
        gained = common - common % self.table.block_tokens - other.computed
        return gained >= _WORTH_WAITING * (len(mine) - other.computed)

    def completes(self, count: int) -> tuple[int, int]:
        """Range [first, last) of the watched blocks that `count` more tokens complete."""
        return self._observed_blocks(self.computed), self._observed_blocks(self.computed + count)

    def _observed_blocks(self, tokens: int) -> int:
        return min(tokens // self.table.block_tokens, self._observed)

    def advance(self, count: int) -> int:
        """Count `count` more tokens as computed, and give full blocks to the index.

        Returns the number of prompt tokens among them, without those that were computed before a
        preemption.
        """
        first, last = self.completes(count)
        self.computed += count
        self.fresh = False
        watch = self.watch
        self.table.commit(self.tokens[: self.computed], None if watch is None else watch.superseded)
        if watch is not None and first < last and not watch.by_layer:
            watch.ready(first, last, None)
        before = self._counted
        self._counted = max(before, min(self.computed, self.prompt_tokens))
        return self._counted - before

    def append(self, token: int) -> FinishReason | None:
        """Add a sampled token. Returns the finish reason if it is the last one, else None."""
        self._tokens[self.length] = token
        self.length += 1
        self.sampler.append(token)
        if token in self.sampler.end_tokens or self.sampler.ended:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.length == self.limit else None

    def take_scores(self) -> tuple[TokenLogprobs, ...]:
        """Return the log-probabilities of the prompt once, when all are there."""
        return () if self.scores is None else self.scores.take()

    def preempt(self) -> None:
        """Release all blocks. The next admission finds the full ones that are still cached."""
        self._end_watch()
        self.table.release()
        self.computed = 0
        self.preemptions += 1

    def close(self) -> None:
        """Release all blocks for good; drop the KV of an ephemeral namespace."""
        self._end_watch()
        self.table.close()
        self.computed = 0

    def _end_watch(self) -> None:
        if self.watch is not None:
            self.watch.released(self._observed_blocks(self.computed))
            self.watch = None
