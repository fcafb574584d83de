"""What instances cost: the models that they give, corrected by what happens.

Instances of equal hardware and model share one model, and what is learnt of it: the scheduler
predicts for all of them in one go.
"""

from __future__ import annotations

import asyncio
import logging

import aiohttp

from memserve.api.status import EngineTotals
from memserve.errors import ProfileError
from memserve.scheduler.architecture import GEMMA3_270M
from memserve.scheduler.contract import Costs, InstanceSpec
from memserve.scheduler.hardware import HARDWARE, derive
from memserve.scheduler.profiles import decode_profile
from memserve.scheduler.refined_costs import RefinedCosts

log = logging.getLogger(__name__)

PROFILE_PATH = "/profile"
_TIMEOUT = aiohttp.ClientTimeout(total=5.0)  # it is a small file, held in memory
# Between questions for a profile; an instance that serves has measured it, or never will.
RETRY_SECONDS = 2.0
MAX_QUESTIONS = 3
# A step's mean over fewer steps than this says little.
_MIN_STEPS = 8

# For instances that say nothing, until what they do is known: right are only the proportions.
UNKNOWN: Costs = derive(HARDWARE["cpu"], GEMMA3_270M)


class InstanceCosts:
    """Cost models by fingerprint. Belongs to the event loop."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._models: dict[str, RefinedCosts] = {}

    def unknown(self) -> RefinedCosts:
        """For an instance whose profile has not come."""
        return self._models.setdefault("", RefinedCosts(UNKNOWN))

    async def of(self, address: str) -> RefinedCosts:
        """The costs of the instance at a URL; of one that gives none, the unknown ones."""
        for _ in range(MAX_QUESTIONS):
            try:
                async with self._session.get(address + PROFILE_PATH, timeout=_TIMEOUT) as answer:
                    if answer.status == 200:
                        profile = decode_profile(await answer.read())
                        fingerprint = profile.subject.fingerprint
                        return self._models.setdefault(fingerprint, RefinedCosts(profile.costs))
            except (aiohttp.ClientError, TimeoutError) as error:
                log.debug("%s does not give its costs: %s", address, error)
            except ProfileError as error:
                log.warning("%s gives costs that cannot be read: %s", address, error)
                break
            await asyncio.sleep(RETRY_SECONDS)
        log.info("%s has no cost model; it is treated as an unknown one", address)
        return self.unknown()


class StepTimes:
    """Learns the time of decode steps from an instance's totals, poll after poll."""

    def __init__(self) -> None:
        self._last: EngineTotals | None = None

    def learn(self, spec: InstanceSpec, now: EngineTotals, context_tokens: float) -> None:
        """`context_tokens`: that its running sequences hold in all, about."""
        last, self._last = self._last, now
        if last is None or now.steps < last.steps + _MIN_STEPS:
            return
        if now.computed_prompt_tokens != last.computed_prompt_tokens:
            return  # not only decode steps
        steps = now.steps - last.steps
        sequences = max(1, round((now.generated_tokens - last.generated_tokens) / steps))
        seconds = (now.busy_seconds - last.busy_seconds) / steps
        if isinstance(spec.costs, RefinedCosts):
            spec.costs.observe_decode_step(sequences, int(context_tokens), seconds)
