"""What instances cost: the models that they give, corrected by what happens.

Instances of equal hardware and model share one model, and what is learnt of it: the scheduler
predicts for all of them in one go.
"""

from __future__ import annotations

import asyncio
import logging

from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.status import EngineTotals
from memserve.errors import ProfileError
from memserve.scheduler.architecture import GEMMA3_270M
from memserve.scheduler.contract import Costs, InstanceSpec
from memserve.scheduler.hardware import HARDWARE, derive
from memserve.scheduler.profiles import decode_profile
from memserve.scheduler.refined_costs import RefinedCosts

log = logging.getLogger(__name__)

PROFILE_PATH = "/profile"
_PROFILE_SECONDS = 5.0  # it is a small file, held in memory
# Between questions for a profile; an instance that serves has measured it, or never will.
RETRY_SECONDS = 2.0
MAX_QUESTIONS = 3
# A step's mean over fewer steps than this says little.
_MIN_STEPS = 8

# Where no instance has said anything, until what they do is known: right are the proportions.
UNKNOWN: Costs = derive(HARDWARE["cpu"], GEMMA3_270M)


class InstanceCosts:
    """Cost models by fingerprint. Belongs to the event loop."""

    def __init__(self, peers: PeerClient) -> None:
        self._peers = peers
        self._models: dict[str, RefinedCosts] = {}
        self._typical: Costs = UNKNOWN

    def unknown(self) -> RefinedCosts:
        """For an instance that has given no profile: most probably it is like the others. What
        is learnt of it is its own."""
        return RefinedCosts(self._typical)

    async def of(self, address: str) -> RefinedCosts | None:
        """The costs of the instance at a URL; None: it gives none."""
        for _ in range(MAX_QUESTIONS):
            try:
                body = await self._peers.call(
                    "GET", address + PROFILE_PATH, bytes, seconds=_PROFILE_SECONDS
                )
                profile = decode_profile(body)
                self._typical = profile.costs
                fingerprint = profile.subject.fingerprint
                return self._models.setdefault(fingerprint, RefinedCosts(profile.costs))
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

    def learn(self, spec: InstanceSpec, now: EngineTotals, context_tokens: float) -> None:
        """`context_tokens`: that its running sequences hold in all, about."""
        last = self._last
        if last is None or now.computed_prompt_tokens != last.computed_prompt_tokens:
            self._last = now  # not only decode steps
            return
        if now.steps < last.steps + _MIN_STEPS:
            return
        self._last = now
        steps = now.steps - last.steps
        sequences = max(1, round((now.generated_tokens - last.generated_tokens) / steps))
        seconds = (now.busy_seconds - last.busy_seconds) / steps
        if isinstance(spec.costs, RefinedCosts):
            spec.costs.observe_decode_step(sequences, int(context_tokens), seconds)


def answer_tokens(last: EngineTotals, now: EngineTotals) -> float | None:
    """How long answers were between two polls, in tokens; None: that cannot be told.

    What was generated belongs to those that ended, and to those that run now and did not then:
    they are half way, as those were that ran then and do not now.
    """
    ended = now.finished - last.finished
    answers = ended + (now.running - last.running) / 2
    generated = now.generated_tokens - last.generated_tokens
    return generated / answers if ended > 0 and answers > 0 else None
