"""Contract of observers that follow a prefill block by block. No torch import.

The engine's thread makes all calls except, on a GPU, `PrefillWatch.ready`. The engine does not
wait for observers, so calls must return at once and raise nothing.
"""

from __future__ import annotations

from typing import Protocol

from memserve.types import RefArray


class PrefillWatch(Protocol):
    """Follows the blocks of one sequence from an admission to the end or a preemption."""

    by_layer: bool  # True: one `ready` per layer of a chunk; False: one after the whole chunk

    def ready(self, first: int, last: int, layer: int | None) -> None:
        """Blocks [first, last) have their final bytes in `layer` (None: in all layers).

        Each block is ready once per layer. Cached blocks are ready at admission, in all layers.
        On a GPU the call comes from another thread after the kernels have run, and may come after
        `released`.
        """
        ...

    def superseded(self, refs: RefArray) -> None:
        """The watch owns `refs` [n] from now on and frees them. The index had other blocks for
        these tokens, which the sequence uses instead."""
        ...

    def released(self, computed: int) -> None:
        """The sequence is about to release its blocks. The first `computed` blocks, or those that
        superseded them, are in the index; the others are freed. The last call except `ready`."""
        ...


class PrefillObserver(Protocol):
    """Receives the admissions of one sequence."""

    def begin(self, refs: RefArray) -> PrefillWatch | None:
        """The sequence was admitted; called again, with other blocks, after a preemption. Returns
        a watch, or None to ignore this admission.

        `refs` [n], in HBM: the whole blocks of the sequence's tokens, computed or not. A block is
        valid until `released`, or until the watch frees it after `superseded`.
        """
        ...
