"""The door of a server that only the cluster may use."""

from __future__ import annotations

from collections.abc import Collection

from memserve.api.errors import ApiError
from memserve.api.http_message import Reply, Request
from memserve.api.http_server import Handler
from memserve.api.signatures import Verifier, digest_of


async def require_signature(verifier: Verifier, request: Request, reply: Reply) -> None:
    """Let a signed request pass; its answer will prove itself. Raises ApiError (401)."""
    digest = await digest_of(request.body)
    given = request.header(b"authorization")
    proof = verifier.check(given, request.method.encode(), request.target, digest)

    reply.added = proof.headers


def guarded(handler: Handler, verifier: Verifier, open_paths: Collection[str] = ()) -> Handler:
    """A handler that answers signed requests; those for `open_paths`, anybody's."""

    async def handle(request: Request, reply: Reply) -> None:
        if request.path not in open_paths:
            try:
                await require_signature(verifier, request, reply)
            except ApiError as error:
                reply.send_error(error)
                return
        await handler(request, reply)

    return handle
