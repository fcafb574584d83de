"""`Capacity`: TTFT and TPOT of a split at a multiple of the present demand, and how large that
multiple may be.

A closed form over the cost models that route requests, fast enough for every split of a cluster:

- prompts wait in an M/G/n queue (Sakasegawa's approximation), whose work is measured on the last
  prompts. What prefill members cannot take, decode members compute beside their answers;
- a decode step is a straight line in the batch, and by Little's law the batch is the answers'
  rate times their length times TPOT. Both together are one linear equation;
- a batch that does not fit HBM, or `max_running`, cannot be carried.

Its figures are worse than a simulation's and good enough to rank splits, which is all they are
used for; docs/planner.md compares them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from memserve.config import PlannerConfig
from memserve.planner.contract import Demand, Prediction, Split
from memserve.planner.demand import Traffic
from memserve.scheduler.contract import Costs, Seconds

# Of a prefill member's time that it spends on prompts, the most first. What is beyond that, decode
# members compute.
PREFILL_LIMITS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
# How fast requests miss their objectives as headroom shrinks: served / missed goes with this power
# of it. At 6, if the 90th percentile is at its objective, one of ten requests misses it, and one of
# four at 1.2 times the load. Few long prompts are less steep, many short ones steeper.
STEEPNESS = 6.0
_SURE = 1.28  # standard deviations of memory in use that have to fit, too: 9 of 10 moments
# An objective that an idle member misses is taken as so many times what that takes: splits are to
# be told apart even where nothing can meet it.
_WITHIN_REACH = 1.25
MOST_HEADROOM, _LEAST = 64.0, 1 / 64  # its bounds
_HALVINGS = 20


@dataclass(frozen=True, slots=True)
class Machine:
    """Capacity of one member; the planner takes all members as alike."""

    costs: Costs
    prefill_factor: float = 1.0
    step_factor: float = 1.0
    kv_tokens: float | None = None  # of HBM; None: not known, no limit
    max_running: int = 64
    chunk_tokens: int = 512


class Capacity:
    """Predictions for one demand. Pure: equal arguments give equal predictions."""

    def __init__(self, machine: Machine, objectives: PlannerConfig, traffic: Traffic) -> None:
        q = 0.5 if objectives.percentile is None else objectives.percentile / 100
        self._machine = machine
        self._quantile = q
        self._mean = objectives.percentile is None
        self._deviations = 0.0 if self._mean else NormalDist().inv_cdf(q)
        self._rate = traffic.rate
        self._output = max(float(traffic.output_tokens), 1.0)
        weights = np.array(traffic.weights) / sum(traffic.weights)
        prompts = np.array([one.prompt_tokens for one in traffic.prompts], dtype=np.int64)
        cached = np.array([one.cached_tokens for one in traffic.prompts], dtype=np.int64)
        cached = np.minimum(cached, prompts - 1)
        alone = machine.costs.prefill_seconds(prompts, cached) * machine.prefill_factor
        self._prefill = float(weights @ alone)
        self._longest = self._prefill if self._mean else _quantile(alone, weights, q)
        self._spread = float(weights @ alone**2) / self._prefill**2  # E[S^2] / E[S]^2
        self._chunks = float(weights @ np.ceil((prompts - cached) / machine.chunk_tokens))
        held = prompts + self._output
        self._held = float(weights @ held)
        self._held_squared = float(weights @ held**2)
        prompt = float(weights @ prompts)
        self._step, self._each = self._line(prompt + self._output / 2)
        self._objective_ttft = max(objectives.ttft, _WITHIN_REACH * (self._longest + self._step))
        self._objective_tpot = max(objectives.tpot, _WITHIN_REACH * (self._step + self._each))
        moved = prompt * machine.costs.kv_bytes_per_token
        self.transfer = float(machine.costs.transfer_seconds(moved, prompt / 16, "nixl"))
        self.demand = Demand(
            requests_per_second=self._rate,
            prompt_tokens=prompt,
            uncached_tokens=prompt - float(weights @ cached),
            output_tokens=self._output,
            prefill_seconds=self._prefill,
        )

    def predict(self, split: Split) -> Prediction:
        """Return what a split gives, without cost and gain."""
        headroom = self._headroom(split)
        now = self._latencies(split, self._rate)
        ttft, tpot = now if now is not None else (None, None)
        return Prediction(
            split=split, headroom=headroom, served=self.served(headroom), ttft=ttft, tpot=tpot
        )

    def served(self, headroom: float) -> float:
        """Return the share of requests that meet both objectives."""
        q = self._quantile
        return float(q / (q + (1 - q) * headroom**-STEEPNESS))

    def answer_seconds(self, tpot: float | None) -> float:
        """Return how long an answer takes at a TPOT; None: at the objective."""
        return self._output * (self._objective_tpot if tpot is None else tpot)

    def _headroom(self, split: Split) -> float:
        low, high = math.log(_LEAST), math.log(MOST_HEADROOM)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self._meets(split, self._rate * math.exp(middle)):
                low = middle
            else:
                high = middle
        return math.exp(low)

    def _meets(self, split: Split, rate: float) -> bool:
        found = self._latencies(split, rate)
        return (
            found is not None
            and found[0] <= self._objective_ttft
            and found[1] <= self._objective_tpot
        )

    def _latencies(self, split: Split, rate: float) -> tuple[float, float] | None:
        """TTFT and TPOT; None: the split cannot carry `rate` requests per second."""
        members = split.members
        if not members:
            return None
        if not split.prefill or not split.decode:  # roles are soft: each does both
            return self._mixed(members, rate)
        pairs = self._apart(split.prefill, split.decode, rate * (1 - split.colocated / members))
        if not split.colocated or pairs is None:
            return pairs
        mixed = self._mixed(split.colocated, rate * split.colocated / members)
        return None if mixed is None else (max(pairs[0], mixed[0]), max(pairs[1], mixed[1]))

    def _apart(self, prefill: int, decode: int, rate: float) -> tuple[float, float] | None:
        """Prefill members hand over to decode members. These compute prompts, too, where others
        would wait too long: as many as it takes."""
        work = rate * self._prefill
        found = None
        for limit in PREFILL_LIMITS:
            taken = min(work, prefill * limit)
            tpot = self._tpot(decode, rate, (work - taken) / decode, whole=True)
            if tpot is None:
                break
            wait = self._wait(prefill, taken / prefill, self._prefill)
            found = self._longest + wait + self.transfer + tpot, tpot
            if found[0] <= self._objective_ttft:
                break
        return found

    def _mixed(self, members: int, rate: float) -> tuple[float, float] | None:
        """Each member computes prompts between the steps of its answers."""
        tpot = self._tpot(members, rate, rate * self._prefill / members)
        if tpot is None:
            return None
        batch = rate * self._output * tpot / members
        longer = self._chunks * (self._step + self._each * batch)
        busy = rate * (self._prefill + longer) / members
        if busy >= 1:
            return None
        return self._longest + longer + self._wait(members, busy, self._prefill + longer), tpot

    def _tpot(
        self, members: int, rate: float, prompts: float, *, whole: bool = False
    ) -> float | None:
        """TPOT of answers on `members` that spend the share `prompts` of their time on prompts.
        `whole`: the KV of the next answer has to fit at once, since its first token is out; else
        its prompt can wait. None: the batch grows without bound, or does not fit."""
        per_member = rate * self._output / members  # tokens per second
        left = 1 - prompts - self._each * per_member
        if left <= 0:
            return None
        tpot = self._step / left
        batch = per_member * tpot
        above = self._deviations * math.sqrt(batch / members)
        if batch + max(above, 0.0) > self._machine.max_running or not self._fits(
            batch, members, whole
        ):
            return None
        if self._mean:
            return tpot
        return (self._step + self._each * (batch + above)) / (1 - prompts)

    def _fits(self, batch: float, members: int, whole: bool) -> bool:
        if self._machine.kv_tokens is None:
            return True
        # Members share fluctuations, since requests go where there is room. What is left on each
        # is too small for the next sequence: by all of a typical token's sequence, or half of it.
        varying = _SURE * math.sqrt(batch * members * self._held_squared) / members
        unusable = self._held_squared / self._held / (1 if whole else 2)
        return batch * self._held + varying + unusable <= self._machine.kv_tokens

    def _wait(self, servers: int, busy: float, service: float) -> float:
        """Mean wait, or that of the quantile, in an M/G/n queue. `busy`: below 1."""
        crowded = busy ** (math.sqrt(2 * (servers + 1)) - 1) / (servers * (1 - busy))
        mean = self._spread / 2 * service * float(crowded)
        return mean if self._mean else mean * math.log(1 / (1 - self._quantile))

    def _line(self, context: float) -> tuple[float, float]:
        """A decode step's seconds as a line in the batch: of an empty batch, and of each answer."""
        machine = self._machine
        most = machine.max_running
        if machine.kv_tokens is not None:
            most = max(2, min(most, int(machine.kv_tokens / self._held)))
        few, many = 1, max(2, most)
        batches = np.array([few, many], dtype=np.int64)
        first, last = (
            machine.costs.decode_step_seconds(batches, batches * context) * machine.step_factor
        ).tolist()
        each = max((last - first) / (many - few), 0.0)
        return max(first - each * few, 0.0) or first, each


def _quantile(values: Seconds, weights: Seconds, q: float) -> float:
    """The quantile of weighted values; `weights`: their sum is 1."""
    order = np.argsort(values)
    at = int(np.searchsorted(np.cumsum(weights[order]), q))
    return float(values[order[min(at, len(order) - 1)]])
