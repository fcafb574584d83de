"""The HTTP client that gateways and instances call instances with."""

from __future__ import annotations

import aiohttp

from memserve.api.serving import IDLE_CONNECTION_SECONDS

CONNECT_SECONDS = 2.0  # an instance accepts at once, or it is gone
# No limit on an answer's time: it may wait in a queue. Polls find out when an instance is lost.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)


def instance_session() -> aiohttp.ClientSession:
    """An HTTP client for instances: connections are kept and their number is not limited."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=_TIMEOUT,
    )
