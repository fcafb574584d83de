"""`EngineHealth`: whether an instance's engine produces tokens."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import numpy as np

from memserve.api.generate import SamplingParams
from memserve.clock import Clock
from memserve.engine.request import EngineProtocol, EngineRequest
from memserve.errors import EngineStopped, MemserveError, QueueFull
from memserve.instance.dispatcher import Dispatcher
from memserve.types import RequestId

# Limit of the self-test at start: kernels may be compiled and weights read from disk.
FIRST_TOKEN_SECONDS = 300.0
# If the engine has produced nothing for IDLE_SECONDS, a health check asks it for a token. The
# limit for that token, HEALTH_SECONDS, is below the usual timeout of a health probe, 10 s.
IDLE_SECONDS = 10.0
HEALTH_SECONDS = 8.0


class SelfTestFailed(MemserveError):
    """The engine could not produce a token."""


class EngineHealth:
    """Checks of the engine: by its recent outputs or steps, or else by a request for one token.
    Used on one event loop."""

    def __init__(
        self,
        engine: EngineProtocol,
        token: int,
        dispatcher: Dispatcher,
        clock: Clock,
        lost: Callable[[], None],
    ) -> None:
        """`token`: the prompt of probes. `lost`: called when the engine has stopped."""
        self._engine = engine
        self._prompt = np.array([token], dtype=np.int32)
        self._dispatcher = dispatcher
        self._clock = clock
        self._lost = lost
        self._numbers = itertools.count()
        self._steps_seen = 0  # the engine's step count at the last `check` that read it

    async def check(self) -> bool:
        """Return whether the engine produces tokens now. An idle engine is asked for one token."""
        if self._clock.now() - self._dispatcher.last_output < IDLE_SECONDS:
            return True
        stats = self._engine.stats()
        progress = stats.running and stats.steps != self._steps_seen
        self._steps_seen = stats.steps
        if progress:  # a long prompt takes steps without producing anything
            return True
        return await self.self_check()

    async def first_token(self) -> None:
        """Ask a new engine for a token. Raises SelfTestFailed if none comes."""
        if not await self._probe(FIRST_TOKEN_SECONDS):
            self._lost()
            raise SelfTestFailed("the engine did not produce a first token")

    async def self_check(self) -> bool:
        """Ask the engine for a token; return whether it came in time."""
        return await self._probe(HEALTH_SECONDS)

    async def _probe(self, seconds: float) -> bool:
        """Ask the engine for one token; return whether it came within `seconds`."""
        probe = EngineRequest(
            id=RequestId(f"self-test-{next(self._numbers)}"),
            prompt=self._prompt,
            sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        )
        with self._dispatcher.mailbox([probe.id]) as mailbox:
            try:
                self._engine.submit([probe])
                async with asyncio.timeout(seconds):
                    (output,) = await mailbox.take()
                return bool(output.token_ids)
            except TimeoutError:
                self._engine.cancel([probe.id])
                return False
            except EngineStopped:
                self._lost()
                return False
            except QueueFull:
                return True  # a full queue is no sign of a broken engine
