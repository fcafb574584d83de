"""`Submission` of sequences to the engine, and `FinishRate` for times to retry."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from memserve.api.errors import invalid, queue_full, unavailable
from memserve.clock import Clock
from memserve.engine.request import EngineProtocol, EngineRequest
from memserve.errors import EngineStopped, QueueFull, RequestError
from memserve.types import RequestId

WINDOW_SECONDS = 30.0
MAX_RETRY_SECONDS = 60  # longer estimates are too uncertain


class FinishRate:
    """Finish times of sequences in the last `WINDOW_SECONDS`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started = clock.now()
        self._ends: deque[float] = deque()

    def record(self, count: int) -> None:
        now = self._clock.now()
        self._ends.extend([now] * count)
        self._forget(now)

    def retry_after(self, waiting: int) -> int:
        """Return the estimated seconds until `waiting` sequences end: 1 to MAX_RETRY_SECONDS."""
        now = self._clock.now()
        self._forget(now)
        if not self._ends:
            return 1
        rate = len(self._ends) / max(min(now - self._started, WINDOW_SECONDS), 1.0)
        return max(1, min(math.ceil(waiting / rate), MAX_RETRY_SECONDS))

    def _forget(self, now: float) -> None:
        while self._ends and self._ends[0] < now - WINDOW_SECONDS:
            self._ends.popleft()


class Submission:
    """Queues and cancels sequences. Calls `lost` if the engine has stopped."""

    def __init__(self, engine: EngineProtocol, rate: FinishRate, lost: Callable[[], None]) -> None:
        self._engine = engine
        self._rate = rate
        self._lost = lost

    @property
    def max_tokens(self) -> int:
        """Maximum of prompt plus output tokens of a sequence."""
        return self._engine.info.max_tokens

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Queue sequences, all or none. Raises ApiError if the engine refuses them."""
        with self._refusals(requests):
            self._engine.submit(requests)

    def check(self, requests: Sequence[EngineRequest]) -> None:
        """Raise the ApiError that `submit` would raise now, without queueing: called before other
        instances work for these sequences."""
        with self._refusals(requests):
            self._engine.check(requests)

    def goes_on(self, request: EngineRequest) -> bool:
        """Return whether the engine can continue right after the tokens in `request.output`, which
        another engine has generated."""
        try:
            self._engine.check([request])
        except RequestError:
            return False
        except (QueueFull, EngineStopped):
            return True  # `submit` raises these
        return True

    @contextmanager
    def _refusals(self, requests: Sequence[EngineRequest]) -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            if any(len(request.output) for request in requests):
                # Another instance accepted this request, so the instance is at fault, not the
                # client.
                raise unavailable(
                    f"This instance cannot continue the answer: {error}", "cannot_resume"
                ) from error
            raise invalid(str(error), error.param) from error
        except QueueFull as error:
            if len(requests) > error.limit:
                raise invalid(
                    f"{len(requests)} sequences in one request, and at most {error.limit} may wait",
                    "n",
                ) from error
            raise queue_full(str(error), self._rate.retry_after(error.waiting)) from error
        except EngineStopped as error:
            self._lost()
            raise unavailable("The instance has lost its engine.", "instance_dead") from error

    def cancel(self, ids: Sequence[RequestId]) -> None:
        self._engine.cancel(ids)
