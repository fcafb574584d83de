"""Who wants a prompt's KV block by block while it is computed: the contract, free of torch.

The engine tells; it never waits. All calls but `PrefillWatch.ready` come from the engine's
thread, between its steps or within one, so they return at once and raise nothing.
"""

from __future__ import annotations

from typing import Protocol

from memserve.types import RefArray


class PrefillWatch(Protocol):
    """Follows the blocks of one sequence from one admission to the end or to a preemption."""

    by_layer: bool  # `ready` for each layer of a chunk instead of once, when it is computed

    def ready(self, first: int, last: int, layer: int | None) -> None:
        """Blocks `first`..`last` have their final bytes in `layer` (None: in all of them).

        Each block is named once for each layer, cached ones at once. On a GPU the call comes
        from another thread, as soon as the kernels have run; it may come after `released`.
        """
        ...

    def superseded(self, refs: RefArray) -> None:
        """These blocks are the watch's from now on, to free: the sequence uses others with the
        same KV, since the index had them first."""
        ...

    def released(self, computed: int) -> None:
        """The sequence is about to let go of its blocks. The first `computed` of them are in
        the index (where they were superseded: others); the rest is lost. The last call but
        for `ready`."""
        ...


class PrefillObserver(Protocol):
    """Is told when a sequence has memory."""

    def begin(self, refs: RefArray) -> PrefillWatch | None:
        """The sequence was admitted. `refs` [n], in HBM, are or will be the whole blocks of its
        tokens. They are live until they are `superseded` and freed, or `released`.

        Once for each admission: again after a preemption, with other blocks. None: of no
        interest.
        """
        ...
