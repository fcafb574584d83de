"""What decode steps take, and what prefills and answers cost each other in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memserve.scheduler.contract import Seconds
from memserve.scheduler.load import Load

# A second in which an answer stands still, beside one in which it is decoded.
STALL = 2.0
_INSTANT = 1e-9  # no prefill is faster


@dataclass(frozen=True, slots=True)
class Steps:
    """Decode steps, [instances]: as they are now, with what is to come, with this request."""

    now: Seconds
    before: Seconds
    after: Seconds

    @classmethod
    def predict(cls, load: Load, context_tokens: float) -> Steps:
        contexts = load.step_contexts.copy()
        contexts[2] += context_tokens
        seconds = np.empty(contexts.shape)
        for group in load.cost_groups:
            at = group.slots
            seconds[:, at] = group.costs.decode_step_seconds(
                load.step_sequences[:, at], contexts[:, at]
            )
        seconds *= load.step_factor
        return cls(seconds[0], seconds[1], seconds[2])

    def prefill_slowdown(self, load: Load, prompt: int, whole: Seconds) -> Seconds:
        """How many times longer a prefill takes because each chunk's step decodes too."""
        slowed: Seconds = self.now * (prompt / load.chunk_tokens)
        slowed /= np.maximum(whole, _INSTANT)
        slowed += 1.0
        return slowed

    def decode_seconds(self, load: Load, output: int) -> tuple[Seconds, Seconds]:
        """Of the answer, with what it costs the answers beside it; and the time until a full
        batch has room."""
        decode = (output - 1) * self.after
        slower = np.maximum(self.after - self.before, 0.0)
        slower *= load.batch
        slower *= np.minimum(load.remaining, output)
        decode += slower
        return decode, load.wait_steps * self.before

    def stall_seconds(self, load: Load, answering: Seconds, prefill: Seconds) -> Seconds:
        """What a prefill costs the answers that are decoded beside it, together. If there are
        fewer than on the others, more will come before it ends, or crowd elsewhere.

        `answering` [instances]: 1 where answers are decoded as roles are meant, else 0.
        """
        usual = float(load.running @ answering) / float(answering.sum())
        stall: Seconds = np.maximum(load.running, usual * answering)
        stall *= STALL
        stall *= prefill
        return stall
