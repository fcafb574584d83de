"""Grammars in the engine: which tokens may follow, and where an answer may end.

`CompiledGrammar` and `Matcher` are the contract with whoever compiles grammars; the engine knows
neither their languages nor the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from memserve.engine import kernels

FloatArray = NDArray[np.float32]


class Matcher(Protocol):
    """State of a grammar behind some tokens; a function of these tokens alone. One thread's."""

    def allowed(self) -> tuple[NDArray[np.uint8], bool]:
        """Return the tokens that may follow, one bit for each (the lowest bit first; an array that
        may be written to), and whether the text may end here. Raises GrammarFailed."""

    def accept(self, token: int) -> None:
        """Add a token. If it was not allowed, `allowed` raises GrammarFailed from now on."""

    @property
    def ended(self) -> bool:
        """Whether the text is whole and no token may follow."""


class CompiledGrammar(Protocol):
    """A grammar for one model's tokens. Immutable; any thread may call it."""

    def matcher(self) -> Matcher:
        """Return a state behind no tokens."""


class Constraint:
    """A sequence's grammar. The model's end tokens are no text of any grammar."""

    __slots__ = ("_eos_ids", "_matcher")

    def __init__(self, grammar: CompiledGrammar, eos_token_ids: Sequence[int]) -> None:
        """`eos_token_ids`: the model's, whether they end this sequence or not."""
        kernels.prepare()
        self._matcher = grammar.matcher()
        self._eos_ids = np.array(eos_token_ids, np.int64)

    def accept(self, token: int) -> None:
        """Add a token that does not end the sequence."""
        self._matcher.accept(token)

    @property
    def ended(self) -> bool:
        return self._matcher.ended

    def mask(self, logits: FloatArray, end_ids: NDArray[np.int64]) -> None:
        """Set `logits` [vocab] of all tokens that are not allowed to -inf, in place. Where the
        text may end, `end_ids` are allowed. Raises GrammarFailed."""
        bits, may_end = self._matcher.allowed()
        ends = logits[end_ids]
        kernels.keep_allowed.run(bits, logits)
        logits[self._eos_ids] = -np.inf
        if may_end:
            logits[end_ids] = ends
