"""`RefinedCosts`: a cost model corrected by observed times.

One factor each for prefills, decode steps and transfers by each path. Observed times include
disturbances that the model must not learn (an unknown queue, a machine that is briefly busy), which
only make them longer. So a factor follows a low quantile of the last ratios of observed to
predicted times, in small steps and within bounds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Literal

from numpy.typing import ArrayLike

from memserve.scheduler.contract import Costs, Link, Seconds, TransferPath

# "shm" and "nixl": transfers by that `Link`.
Kind = Literal["prefill", "decode", "shm", "nixl"]

# Last ratios that a factor is taken from: enough for a quantile, few enough to forget. Those of
# decode steps are means of an engine's own times, without waits, one a second: a few tell that a
# machine is busy, before requests have suffered from it for long.
_REMEMBERED = 64
_REMEMBERED_STEPS = 10
_FEWEST = 5  # ratios before the factor changes
# Below the median, since half of the observations may include a wait.
_QUANTILE = 0.35
# Share of the distance to the quantile (of logarithms) per observation: half of it in three.
_PACE = 0.2
# A machine is not that much faster or slower than measured: beyond 8x the cause is another one. A
# network is not measured at all: 1 Gbit/s is 300 times slower than what is assumed of GPU servers.
_BOUND = math.log(8.0)
_LINK_BOUND = math.log(1000.0)


class _Factor:
    """A correction factor, learnt as its logarithm, which is at most `bound` from 0, from the last
    `remembered` ratios."""

    def __init__(self, bound: float = _BOUND, remembered: int = _REMEMBERED) -> None:
        self._bound = bound
        self._remembered = remembered
        self._logs: deque[float] = deque(maxlen=remembered)
        self._log = 0.0
        self.value = 1.0

    def copy(self) -> _Factor:
        factor = _Factor(self._bound, self._remembered)
        factor._logs.extend(self._logs)
        factor._log, factor.value = self._log, self.value
        return factor

    @property
    def learnt(self) -> bool:
        return len(self._logs) >= _FEWEST

    def observe(self, ratio: float) -> None:
        self._logs.append(min(self._bound, max(-self._bound, math.log(ratio))))
        if not self.learnt:
            return
        target = _quantile(self._logs, _QUANTILE)
        self._log += _PACE * (target - self._log)
        self.value = math.exp(self._log)


class RefinedCosts:
    """Implements `Costs`: the seconds of `model` times learnt factors. Not thread-safe.

    Observed times are compared with `model`, not with corrected predictions, so that a factor
    cannot amplify its own error.
    """

    def __init__(self, model: Costs) -> None:
        self.model = model
        self._factors: dict[Kind, _Factor] = {
            "prefill": _Factor(),
            "decode": _Factor(remembered=_REMEMBERED_STEPS),
            "shm": _Factor(_LINK_BOUND),
            "nixl": _Factor(_LINK_BOUND),
        }

    def copy(self) -> RefinedCosts:
        """Return costs of the same model, whose factors start as these are and are learnt on their
        own."""
        costs = RefinedCosts(self.model)
        costs._factors = {kind: factor.copy() for kind, factor in self._factors.items()}
        return costs

    def learnt(self, kind: Kind) -> float | None:
        """Ratio of observed to predicted time; None: too few were observed."""
        factor = self._factors[kind]
        return factor.value if factor.learnt else None

    def factor(self, kind: Kind) -> float:
        """Ratio of observed to predicted time; 1.0 at first."""
        return self._factors[kind].value

    # --- predictions ------------------------------------------------------------------

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token, all layers."""
        return self.model.kv_bytes_per_token

    def prefill_seconds(self, prompt_tokens: ArrayLike, cached_tokens: ArrayLike) -> Seconds:
        """Seconds of `model`, times the prefill factor."""
        seconds: Seconds = self._factors["prefill"].value * self.model.prefill_seconds(
            prompt_tokens, cached_tokens
        )
        return seconds

    def decode_step_seconds(self, sequences: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        """Seconds of `model`, times the decode factor."""
        seconds: Seconds = self._factors["decode"].value * self.model.decode_step_seconds(
            sequences, context_tokens
        )
        return seconds

    def transfer_seconds(
        self, num_bytes: ArrayLike, pieces: ArrayLike, path: TransferPath
    ) -> Seconds:
        """Seconds of `model`, times the path's factor, if it is one between instances."""
        factor = 1.0 if path == "host" else self._factors[path].value
        seconds: Seconds = factor * self.model.transfer_seconds(num_bytes, pieces, path)
        return seconds

    # --- observations -----------------------------------------------------------------

    def observe_prefill(self, prompt_tokens: int, cached_tokens: int, seconds: float) -> None:
        """Report seconds to the first token of a prompt that did not wait."""
        self._observe("prefill", self.model.prefill_seconds(prompt_tokens, cached_tokens), seconds)

    def observe_decode_step(self, sequences: int, context_tokens: int, seconds: float) -> None:
        """Report seconds of a decode step, or the mean of several."""
        self._observe("decode", self.model.decode_step_seconds(sequences, context_tokens), seconds)

    def observe_transfer(self, num_bytes: int, pieces: int, path: Link, seconds: float) -> None:
        """Report seconds of a transfer to another instance, or of several without a pause."""
        self._observe(path, self.model.transfer_seconds(num_bytes, pieces, path), seconds)

    def _observe(self, kind: Kind, predicted: Seconds, seconds: float) -> None:
        expected = float(predicted)
        # No ratio for an empty task, or if the clock did not advance.
        if expected > 0 and seconds > 0 and math.isfinite(seconds):
            self._factors[kind].observe(seconds / expected)


def _quantile(values: Sequence[float] | deque[float], share: float) -> float:
    """Quantile at `share` of `values` (not empty), linear between neighbours."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
