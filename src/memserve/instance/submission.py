"""The engine as calls see it: its refusals in the API's form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from memserve.api.errors import invalid, queue_full, unavailable
from memserve.engine.request import EngineProtocol, EngineRequest
from memserve.errors import EngineStopped, QueueFull, RequestError
from memserve.instance.throughput import FinishRate
from memserve.types import RequestId


class Submission:
    """Queues sequences and cancels them. `lost` is called when the engine turns out to be gone."""

    def __init__(self, engine: EngineProtocol, rate: FinishRate, lost: Callable[[], None]) -> None:
        self._engine = engine
        self._rate = rate
        self._lost = lost

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Raises ApiError where the engine does not take them."""
        with self._refusals(requests):
            self._engine.submit(requests)

    def check(self, requests: Sequence[EngineRequest]) -> None:
        """Raise what `submit` would raise now: before others are asked to work for them."""
        with self._refusals(requests):
            self._engine.check(requests)

    def goes_on(self, request: EngineRequest) -> bool:
        """Whether the engine can go on exactly behind what another one has generated."""
        try:
            self._engine.check([request])
        except RequestError:
            return False
        except (QueueFull, EngineStopped):
            return True  # which `submit` will say
        return True

    @contextmanager
    def _refusals(self, requests: Sequence[EngineRequest]) -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            if any(len(request.output) for request in requests):
                # It ran elsewhere until now: what is wrong with it is that it is here.
                raise unavailable(
                    f"This instance cannot go on: {error}", "cannot_resume"
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
