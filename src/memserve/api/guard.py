"""The door of a server that only the cluster may use."""

from __future__ import annotations

from collections.abc import Collection

from memserve.api.errors import ApiError
from memserve.api.http_message import Reply, Request
from memserve.api.http_server import Handler
from memserve.api.signatures import Verifier, digest_of


async def require_signature(verifier: Verifier, request: Request, reply: Reply) -> None:
    """Let a signed request pass; its answer will prove itself. On a local connection one is
    enough (`local_connection`). Raises Unauthenticated."""
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
    """Why a request that `require_signature` will be asked for is not worth reading."""
    given, local = request.header(b"authorization"), request.local
    if local is not None and local.lets_in(given):
        return None
    return verifier.turns_away(given)


class Guard:
    """A handler that answers signed requests; those for `open_paths`, anybody's."""

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
        """Why the body of a request, of which the head is there, need not be sent."""
        return turns_away(self._verifier, request)
