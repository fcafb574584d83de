"""Token counts of one sequence, for its penalties."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from memserve.api.generate import SamplingParams
from memserve.types import TokenArray

# `_distinct` sorts fewer tokens than this, and marks more in a table.
SORTED_BELOW = 1024


class TokenCounts:
    """Distinct prompt tokens and generated tokens of one sequence, with counts of the latter.

    Arrays, not sets, hold the prompt's tokens: with long prompts and many samples, sets would take
    gigabytes.
    """

    __slots__ = ("_counts", "_generated", "_prompt", "_slots", "_unseen")

    def __init__(self, prompt: TokenArray) -> None:
        """`prompt`: [tokens] int32, subject to the repetition penalty only."""
        self._prompt = _distinct(prompt)  # ascending
        self._generated = array("i")  # distinct generated tokens
        self._counts = array("i")  # count of each token in `_generated`
        self._slots: dict[int, int] = {}  # token -> place in `_generated`
        self._unseen = array("i")  # generated tokens that the prompt does not have

    def add(self, token: int) -> None:
        """Count one generated token."""
        slot = self._slots.setdefault(token, len(self._generated))
        if slot == len(self._generated):
            self._generated.append(token)
            self._counts.append(0)
            at = int(np.searchsorted(self._prompt, token))
            if at == len(self._prompt) or self._prompt[at] != token:
                self._unseen.append(token)
        self._counts[slot] += 1

    def penalise(self, logits: NDArray[np.float32], params: SamplingParams) -> None:
        """Apply repetition, frequency and presence penalties to `logits` [vocab] in place."""
        repetition = params.repetition_penalty
        if repetition != 1:
            for ids in (self._prompt, np.asarray(self._unseen)):
                values = logits[ids]
                logits[ids] = np.where(values > 0, values / repetition, values * repetition)
        if self._generated and (params.frequency_penalty or params.presence_penalty):
            generated = np.asarray(self._generated)
            values = logits[generated]
            values -= params.frequency_penalty * np.asarray(self._counts)
            values -= params.presence_penalty
            logits[generated] = values


def _distinct(tokens: TokenArray) -> NDArray[np.signedinteger]:
    """Return the distinct tokens of `tokens` [n], ascending."""
    if len(tokens) < SORTED_BELOW:
        return np.unique(tokens)
    seen = np.zeros(int(tokens.max()) + 1, dtype=np.bool_)
    seen[tokens] = True
    return np.flatnonzero(seen)
