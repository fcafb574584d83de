"""Connections within a machine: proven once, instead of signed with every request.

No other process can read or write a TCP connection between two processes of one machine. So the
first signed request on it proves both ends for all that follow:

    MemServe-Connection: TOKEN            in the answer to it
    Authorization: MemServe TOKEN         in later requests, whose answers carry no proof

The token is derived from the secret and that request's MAC: only a process with the secret can
compute it, and it is valid on this connection alone. Later requests still need it, since a proxy
may send other clients' requests through a connection on which a signed one went before.
"""

from __future__ import annotations

import hmac

from memserve.api.signatures import SCHEME, Proof

CONNECTION_HEADER = b"memserve-connection"


class LocalConnection:
    """The server's side of a local connection, with the token that it has given out."""

    __slots__ = ("_authorization",)

    def __init__(self) -> None:
        self._authorization = b""

    def lets_in(self, authorization: bytes | None) -> bool:
        """Return whether a request has the connection's token."""
        known = self._authorization
        return bool(known and authorization) and hmac.compare_digest(known, authorization or b"")

    def proven(self, proof: Proof) -> list[tuple[bytes, bytes]]:
        """Return the headers that give out the token, for the answer to the first accepted signed
        request; none for later ones."""
        if self._authorization:
            return []
        token = proof.connection_token()
        self._authorization = SCHEME + token
        return [(CONNECTION_HEADER, token)]
