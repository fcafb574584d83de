"""Role, state and running calls of an instance, with listeners for changes of role and state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from memserve.api.control import conflict
from memserve.api.errors import ApiError
from memserve.api.status import InstanceState
from memserve.types import InstanceId, Role

_SERVING = (InstanceState.READY, InstanceState.DRAINING)


class InstanceLifecycle:
    """Role and state of one `Instance`; used on the instance's event loop."""

    def __init__(self, instance: InstanceId, role: Role) -> None:
        self.role = role
        self.state = InstanceState.STARTING
        self.ending = asyncio.Event()  # set by `end`: the instance will not be ready again
        self.restart = False  # the supervisor is to start the process again after the end
        self._instance = instance
        self._listeners: list[Callable[[], None]] = []
        self._running = 0  # calls
        self._idle = asyncio.Event()
        self._idle.set()

    def on_news(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change."""
        self._listeners.append(listener)

    def become(self, state: InstanceState) -> None:
        if state is not self.state:
            self.state = state
            self._tell()

    def change_role(self, role: Role) -> None:
        """Change the role; running calls continue. Raises ApiError (409) while starting and when
        dead."""
        if self.state not in _SERVING:
            raise self._not_now("change its role")
        if role is not self.role:
            self.role = role
            self._tell()

    def drain(self) -> None:
        """Refuse new calls. Raises ApiError (409) while starting and when dead."""
        if self.state not in _SERVING:
            raise self._not_now("drain")
        self.become(InstanceState.DRAINING)

    def resume(self) -> None:
        """Take calls again after `drain`. Raises ApiError (409) while starting, when dead, and
        after `end`."""
        if self.state not in _SERVING or self.ending.is_set():
            raise self._not_now("take requests")
        self.become(InstanceState.READY)

    def end(self, restart: bool = False) -> None:
        """Drain, without a later `resume`. The `restart` of the last call counts."""
        self.restart = restart
        self.ending.set()
        if self.state is not InstanceState.DEAD:
            self.become(InstanceState.DRAINING)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Context of a running call."""
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def idle(self) -> None:
        """Wait until no call is running."""
        await self._idle.wait()

    def _not_now(self, what: str) -> ApiError:
        state = "ending" if self.ending.is_set() else self.state.value
        return conflict(
            f"Instance {self._instance} is {state} and cannot {what}.", f"instance_{state}"
        )

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()
