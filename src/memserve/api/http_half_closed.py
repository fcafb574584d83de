"""Whether a client that has finished sending is still there.

The end of what a client sends (FIN) may mean that it has left (`close`), or that it has said all
and waits for the answer (`shutdown`, as `printf ... | nc` does); the two look the same. So:

- Once the answer has begun, and with TLS, the client has left, and its request is cancelled.
- Before that, a client of HTTP/1.1 is asked: it is sent `100 Continue`, which every client has to
  skip (RFC 9110, 15.2), and which a socket that was closed answers with a reset. The connection's
  state shows the reset after a round trip. Asked are those whose request is young after
  YOUNG_SECONDS, so that most of the simple ones see nothing but their answer; all others at once.
- HTTP/1.0 has no `100 Continue`. Who sends the end right behind the request has some seconds
  (`HttpLimits.half_closed_seconds`) to wait for its answer; anybody else has left.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from memserve.api.http_message import Reply

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
YOUNG_SECONDS = 0.05  # less than anybody waits for an answer
# After a sign of life was asked for: a round trip in the machine room, one around the world, and
# then the next time.
LOOK_SECONDS = (0.005, 0.1, 1.0)

_TCP_CLOSE = 7  # the first byte of TCP_INFO, after a reset (Linux, net/tcp_states.h)


class HalfClosed:
    """One such client, until its answer is complete. `cancel` it then."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.Transport,
        reply: Reply,
        departed: Callable[[], None],
    ) -> None:
        """`departed` is called once, when it turns out to have left. The reply has not begun."""
        self._loop = loop
        self._transport = transport
        self._reply = reply
        self._departed = departed
        self._next: asyncio.TimerHandle | None = None

    def wait(self, seconds: float) -> None:
        """It has left after so long, whatever it does."""
        self._next = self._loop.call_later(seconds, self._departed)

    def ask(self, seconds: float) -> None:
        """Make it answer with a reset if it has left, from so many seconds on."""
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
        if _was_reset(self._transport):
            self._departed()
        elif step < len(LOOK_SECONDS):
            self._next = self._loop.call_later(LOOK_SECONDS[step], self._look, step + 1)
        else:
            self._ask()


def _was_reset(transport: asyncio.Transport) -> bool:
    sock = transport.get_extra_info("socket")
    try:
        state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    except OSError:
        return False  # not TCP: there, a write fails at once
    return bool(state[0] == _TCP_CLOSE)
