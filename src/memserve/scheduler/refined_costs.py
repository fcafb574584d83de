"""A cost model corrected by what requests really took.

A factor each for prefill, decode steps and transfers. What a caller sees includes disturbances
that the model is not to learn (a queue it did not know of, a busy machine for a moment), and
they only ever make things slower. So each factor follows a low quantile of the last ratios of
real to predicted times, as far as they agree, in small steps and between bounds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Literal

from numpy.typing import ArrayLike

from memserve.scheduler.contract import Costs, Path, Seconds

Kind = Literal["prefill", "decode", "transfer"]

# Ratios that a factor is taken from: enough for a quantile, few enough to forget.
_REMEMBERED = 64
_FEWEST = 5
# Below the median: half of what is seen may have waited for something.
_QUANTILE = 0.35
# A step towards the quantile, in logarithms; half of the way is made in three observations.
_PACE = 0.2
# No machine is that much faster or slower than it was measured: beyond this something else is
# wrong, and predictions are to stay in proportion.
_BOUND = math.log(8.0)


class _Factor:
    """One factor, as its logarithm."""

    def __init__(self) -> None:
        self._logs: deque[float] = deque(maxlen=_REMEMBERED)
        self._log = 0.0
        self.value = 1.0

    def observe(self, ratio: float) -> None:
        self._logs.append(min(_BOUND, max(-_BOUND, math.log(ratio))))
        if len(self._logs) < _FEWEST:
            return
        target = _quantile(self._logs, _QUANTILE)
        self._log += _PACE * (target - self._log)
        self.value = math.exp(self._log)


class RefinedCosts:
    """Implements `Costs`: `model`, times what was learnt. Not thread-safe.

    Observed times are compared with the model itself, not with the corrected prediction, so
    that a factor cannot feed on its own error.
    """

    def __init__(self, model: Costs) -> None:
        self.model = model
        self._factors: dict[Kind, _Factor] = {
            "prefill": _Factor(),
            "decode": _Factor(),
            "transfer": _Factor(),
        }

    def factor(self, kind: Kind) -> float:
        """Real over predicted time; 1.0 while nothing was learnt."""
        return self._factors[kind].value

    # --- predictions ------------------------------------------------------------------

    @property
    def kv_bytes_per_token(self) -> int:
        """KV of all layers, K and V, of one token."""
        return self.model.kv_bytes_per_token

    def prefill_seconds(self, prompt_tokens: ArrayLike, cached_tokens: ArrayLike) -> Seconds:
        """As the model's."""
        seconds: Seconds = self._factors["prefill"].value * self.model.prefill_seconds(
            prompt_tokens, cached_tokens
        )
        return seconds

    def decode_step_seconds(self, sequences: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        """As the model's."""
        seconds: Seconds = self._factors["decode"].value * self.model.decode_step_seconds(
            sequences, context_tokens
        )
        return seconds

    def transfer_seconds(self, num_bytes: ArrayLike, pieces: ArrayLike, path: Path) -> Seconds:
        """As the model's."""
        seconds: Seconds = self._factors["transfer"].value * self.model.transfer_seconds(
            num_bytes, pieces, path
        )
        return seconds

    # --- observations -----------------------------------------------------------------

    def observe_prefill(self, prompt_tokens: int, cached_tokens: int, seconds: float) -> None:
        """A prompt that did not wait took so long to its first token."""
        self._observe("prefill", self.model.prefill_seconds(prompt_tokens, cached_tokens), seconds)

    def observe_decode_step(self, sequences: int, context_tokens: int, seconds: float) -> None:
        """A step, or the mean of some, took so long."""
        self._observe("decode", self.model.decode_step_seconds(sequences, context_tokens), seconds)

    def observe_transfer(self, num_bytes: int, pieces: int, path: Path, seconds: float) -> None:
        """KV arrived after so long."""
        self._observe("transfer", self.model.transfer_seconds(num_bytes, pieces, path), seconds)

    def _observe(self, kind: Kind, predicted: Seconds, seconds: float) -> None:
        expected = float(predicted)
        # A clock that stood still or nothing that was to be done: there is no ratio.
        if expected > 0 and seconds > 0 and math.isfinite(seconds):
            self._factors[kind].observe(seconds / expected)


def _quantile(values: Sequence[float] | deque[float], share: float) -> float:
    """Linear between neighbours; values: not empty."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
