"""Cost models of instances: from their profiles, corrected by measured times.

Instances of equal hardware and model share one cost model: the scheduler predicts for all of them
at once. Corrections are each instance's own, since equal machines are not equally busy.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import get_args

from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.status import EngineTotals, LinkTotals
from memserve.errors import ProfileError
from memserve.scheduler.architecture import GEMMA3_270M
from memserve.scheduler.contract import Costs, InstanceSpec, Link
from memserve.scheduler.hardware import HARDWARE, derive
from memserve.scheduler.profiles import decode_profile, read_profile
from memserve.scheduler.refined_costs import RefinedCosts

log = logging.getLogger(__name__)

PROFILE_PATH = "/profile"
_PROFILE_SECONDS = 5.0  # timeout; a profile is a small file, held in memory
# Between requests for a profile; an instance that serves has measured it, or never will.
RETRY_SECONDS = 2.0
MAX_QUESTIONS = 3
# Fewer steps give no useful mean.
_MIN_STEPS = 8

# Fewer bytes say more about a transfer's constant costs than about the link.
_MIN_MOVED = 16 << 20

# Assumed costs until an instance gives a profile: only their proportions are right.
UNKNOWN: Costs = derive(HARDWARE["cpu"], GEMMA3_270M)


class InstanceCosts:
    """Makes the cost model of each instance. Belongs to the event loop."""

    def __init__(self, peers: PeerClient) -> None:
        self._peers = peers
        self._first: dict[str, RefinedCosts] = {}  # by fingerprint: of the first such instance
        self._typical: Costs = UNKNOWN

    def unknown(self) -> RefinedCosts:
        """Return a cost model for an instance without a profile: a copy of the last profile that
        another instance gave, with corrections of its own."""
        return RefinedCosts(self._typical)

    def is_guess(self, costs: Costs) -> bool:
        """Return whether `costs` are what `unknown` would return now, with or without corrections
        of their own."""
        return isinstance(costs, RefinedCosts) and costs.model is self._typical

    async def of(self, address: str) -> RefinedCosts | None:
        """Fetch the profile of the instance at a URL; return its cost model, which equal instances
        share, with the corrections that the first of them has now. None: it gives no profile."""
        for _ in range(MAX_QUESTIONS):
            try:
                body = await self._peers.call(
                    "GET", address + PROFILE_PATH, bytes, seconds=_PROFILE_SECONDS
                )
                fingerprint = read_profile(body).subject.fingerprint
                first = self._first.get(fingerprint)
                if first is None:
                    costs = self._first[fingerprint] = RefinedCosts(decode_profile(body).costs)
                else:
                    costs = first.copy()
                self._typical = costs.model
                return costs
            except PeerError as error:
                log.debug("%s does not give its costs: %s", address, error)
            except ProfileError as error:
                log.warning("%s gives costs that cannot be read: %s", address, error)
                break
            await asyncio.sleep(RETRY_SECONDS)
        log.info("%s has no cost model; it is treated as an unknown one", address)
        return None


class StepTimes:
    """Learns the time of decode steps from an instance's totals, poll after poll."""

    def __init__(self) -> None:
        self._last: EngineTotals | None = None

    def learn(self, spec: InstanceSpec, now: EngineTotals) -> None:
        """`now`: the last poll's totals."""
        last = self._last
        if last is None:
            self._last = now
            return
        steps = now.decode_steps - last.decode_steps
        if steps < _MIN_STEPS:
            return
        self._last = now
        sequences = max(1, round((now.decode_tokens - last.decode_tokens) / steps))
        context = (now.decode_context_tokens - last.decode_context_tokens) // steps
        seconds = (now.decode_seconds - last.decode_seconds) / steps
        if isinstance(spec.costs, RefinedCosts):
            spec.costs.observe_decode_step(sequences, context, seconds)


class LinkTimes:
    """Learns the time of transfers to other instances from a pool's totals, poll after poll."""

    def __init__(self) -> None:
        self._last: dict[str, LinkTotals] = {}

    def learn(self, spec: InstanceSpec, now: Mapping[str, LinkTotals]) -> None:
        """`now`: the last poll's totals, by transport."""
        for path in get_args(Link):
            total, last = now.get(path), self._last.get(path, LinkTotals())
            if total is None:
                continue
            moved, pieces = total.bytes - last.bytes, total.pieces - last.pieces
            if moved < _MIN_MOVED:
                continue
            self._last[path] = total
            seconds = total.seconds - last.seconds
            if isinstance(spec.costs, RefinedCosts):
                # As one transfer: of a by-layer one, each layer is written on its own.
                spec.costs.observe_transfer(moved, pieces, path, seconds)


def answer_tokens(last: EngineTotals, now: EngineTotals) -> float | None:
    """Return the mean length, in tokens, of the answers between two polls; None: unknown.

    The generated tokens are divided by the finished sequences plus half of the growth in running
    ones: a running sequence is on average half done.
    """
    ended = now.finished - last.finished
    answers = ended + (now.running - last.running) / 2
    generated = now.generated_tokens - last.generated_tokens
    return generated / answers if ended > 0 and answers > 0 else None
