"""Log-probabilities of a prompt's tokens, computed while the prompt is."""

from __future__ import annotations

import torch

from memserve.engine.request import TokenLogprobs
from memserve.engine.sampler import row_logprobs
from memserve.types import TokenArray

# Logits of scored tokens that a step holds in memory, 64 MiB as float32.
MAX_SCORED_LOGITS = 16 * 1024 * 1024


def scored_rows(vocab_size: int) -> int:
    """Return how many tokens one step may score."""
    return max(8, MAX_SCORED_LOGITS // vocab_size)


class PromptScores:
    """The scores of one sequence's prompt. Row p of the logits scores token p + 1; the first token
    of a prompt has no score. Owned by the engine's thread.
    """

    def __init__(self, prompt: TokenArray, count: int) -> None:
        """`prompt`: [tokens] int32. `count`: of the most probable tokens to report at each
        position, besides the prompt's own token."""
        self._prompt = prompt
        self._count = count
        self._scores: list[TokenLogprobs] = []
        self._taken = False

    @property
    def complete(self) -> bool:
        return self._taken or len(self._scores) == len(self._prompt) - 1

    @property
    def scored(self) -> int:
        """Number of leading tokens whose logits are not needed any more."""
        return len(self._scores)

    def rows(self, begin: int, end: int) -> range:
        """Return the rows to score, relative to `begin`, of a step that computes the tokens
        `begin` to `end`."""
        if self.complete:
            return range(0)
        return range(len(self._scores) - begin, min(end, len(self._prompt) - 1) - begin)

    def add(self, logits: torch.Tensor) -> None:
        """Score the next tokens; `logits`: [rows, vocab] on the host."""
        for row in logits:
            token = int(self._prompt[len(self._scores) + 1])
            self._scores.append(row_logprobs(row, token, self._count))

    def take(self) -> tuple[TokenLogprobs, ...]:
        """Return the scores of all tokens but the first, once; () again afterwards."""
        scores, self._scores = self._scores, []
        self._taken = True
        return tuple(scores)
