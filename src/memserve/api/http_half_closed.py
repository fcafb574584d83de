"""Detection whether a client that has finished sending (FIN) is still there.

A FIN may mean that the client has left (`close`), or that it has sent all and waits for the answer
(`shutdown`, as `printf ... | nc` does); the two look the same. So:

- Once the answer has begun, and with TLS, the client has left, and its request is cancelled.
- Before that, an HTTP/1.1 client is probed: the server sends `100 Continue`, which every client
  must skip (RFC 9110, 15.2), and which a closed socket answers with a reset. The connection's
  state shows the reset after a round trip. A client whose request is younger than YOUNG_SECONDS
  is probed after that time, so that most simple clients see only their answer; others at once.
- HTTP/1.0 has no `100 Continue`. If the FIN comes within YOUNG_SECONDS of the request, the client
  has `HttpLimits.half_closed_seconds` to wait for its answer; otherwise it has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from memserve.api.http_message import Reply
from memserve.api.tcp_info import tcp_info

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
YOUNG_SECONDS = 0.05  # shorter than any client's timeout
# Between looks at the state after a probe: a round trip in the machine room, one around the
# world, and then the next probe.
LOOK_SECONDS = (0.005, 0.1, 1.0)


class HalfClosed:
    """Watches one half-closed client until its answer is complete; then `cancel` it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.Transport,
        reply: Reply,
        departed: Callable[[], None],
    ) -> None:
        """`departed` is called once, when the client has left. The reply must not have begun."""
        self._loop = loop
        self._transport = transport
        self._reply = reply
        self._departed = departed
        self._next: asyncio.TimerHandle | None = None

    def wait(self, seconds: float) -> None:
        """Call `departed` after `seconds`, without a probe."""
        self._next = self._loop.call_later(seconds, self._departed)

    def ask(self, seconds: float) -> None:
        """Probe the client periodically, from `seconds` on."""
        self._next = self._loop.call_later(seconds, self._ask)

    def cancel(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _ask(self) -> None:
        if not self._reply.started:
            self._transport.write(CONTINUE)
        self._look(0)

    def _look(self, step: int) -> None:
        if self._transport.is_closing():
            return
        info = tcp_info(self._transport)
        if info is not None and info.reset:
            self._departed()
        elif step < len(LOOK_SECONDS):
            self._next = self._loop.call_later(LOOK_SECONDS[step], self._look, step + 1)
        else:
            self._ask()
