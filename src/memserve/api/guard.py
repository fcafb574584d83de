"""Signature checks for a server that only the cluster may use."""

from __future__ import annotations

from collections.abc import Collection

from memserve.api.errors import ApiError
from memserve.api.http_message import Reply, Request
from memserve.api.http_server import Handler
from memserve.api.signatures import Verifier, digest_of


async def require_signature(verifier: Verifier, request: Request, reply: Reply) -> None:
    """Check a request's signature, and have the reply prove itself. On a local connection the
    connection's token does, too (`local_connection`). Raises Unauthenticated."""
    given, local = request.header(b"authorization"), request.local
    if local is not None and local.lets_in(given):
        return
    refusal = verifier.turns_away(given)
    if refusal is not None:
        raise refusal
    digest = await digest_of(request.body)
    proof = verifier.check(given, request.method.encode(), request.target, digest)
    if local is None:
        reply.added = proof.headers
        return
    more = local.proven(proof)
    reply.added = lambda status, body: proof.headers(status, body) + more


def turns_away(verifier: Verifier, request: Request) -> ApiError | None:
    """Return the refusal of a request that `require_signature` would refuse by its head alone;
    None: read on."""
    given, local = request.header(b"authorization"), request.local
    if local is not None and local.lets_in(given):
        return None
    return verifier.turns_away(given)


class Guard:
    """A handler that passes signed requests on, and all requests for `open_paths`."""

    def __init__(
        self, handler: Handler, verifier: Verifier, open_paths: Collection[str] = ()
    ) -> None:
        self._handler = handler
        self._verifier = verifier
        self._open_paths = open_paths

    async def __call__(self, request: Request, reply: Reply) -> None:
        if request.path not in self._open_paths:
            try:
                await require_signature(self._verifier, request, reply)
            except ApiError as error:
                reply.send_error(error)
                return
        await self._handler(request, reply)

    def admit(self, request: Request) -> ApiError | None:
        """Return the refusal of a request by its head, before the body is read; None: go on."""
        return turns_away(self._verifier, request)
