"""Connections within a machine, which are proven once instead of with every request.

Between two processes of one machine nobody else can read a TCP connection or write to it. The
first signed request on one so proves both ends for all that follows:

    MemServe-Connection: TOKEN            in the answer to it
    Authorization: MemServe TOKEN         in later requests, whose answers carry no proof

The token is derived from the secret and that request's MAC, so only who has the secret can tell
it, and it is good for this connection alone. It is not left out altogether: a proxy may send
requests of others through a connection on which ours went before.
"""

from __future__ import annotations

import hmac

from memserve.api.signatures import SCHEME, Proof

CONNECTION_HEADER = b"memserve-connection"


class LocalConnection:
    """The server's side of one, and what its requests are let in with."""

    __slots__ = ("_authorization",)

    def __init__(self) -> None:
        self._authorization = b""

    def lets_in(self, authorization: bytes | None) -> bool:
        """Whether a request has the token that was given out here."""
        known = self._authorization
        return bool(known and authorization) and hmac.compare_digest(known, authorization or b"")

    def proven(self, proof: Proof) -> list[tuple[bytes, bytes]]:
        """Headers for the answer to a signed request that was accepted."""
        if self._authorization:
            return []
        token = proof.connection_token()
        self._authorization = SCHEME + token
        return [(CONNECTION_HEADER, token)]
