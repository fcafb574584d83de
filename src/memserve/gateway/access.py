"""Access control of a gateway's endpoints.

| caller | credentials | paths |
| --- | --- | --- |
| client | `Authorization: Bearer KEY`, if there are keys | `/v1/*`, and vLLM's other paths |
| scraper | none (`metrics_secret`: as an operator) | `/metrics`, `/load` |
| probe | none | `/health`, `/live`, `/ready`, `/ping` |
| reader | none | `/`, `/version`, `/docs`, `/openapi.json` |
| operator | the cluster's secret: signed, or as Bearer by TLS or from this machine | `/cluster*` |
| member | the cluster's secret, signed | `/cluster/members` |

Any other path is answered with 404.

A web page of another site can make its visitor's browser send requests. A client's request with
another `Origin` is refused unless `cors_origins` allows it; other requests need the secret, which
no page has, or tell nothing of clients.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import urlsplit

from memserve.api.api_keys import ApiKey, ApiKeys
from memserve.api.audience import Audience, check_url
from memserve.api.errors import ApiError, path_not_found
from memserve.api.forward import WHOLE_PATHS
from memserve.api.guard import require_signature, turns_away
from memserve.api.http_message import Header, Reply, Request
from memserve.api.namespaces import portable
from memserve.api.signatures import SCHEME, Verifier
from memserve.hosts import is_loopback
from memserve.scheduler.admission import NOBODY, Grant, Tenant, tenant_id
from memserve.secrets import Secret

_BEARER = b"bearer "
_CLIENTS = "/v1/"
_MORE_CLIENTS = frozenset(path.value for path in WHOLE_PATHS if not path.startswith(_CLIENTS))
METRICS_PATH = "/metrics"
LOAD_PATH = "/load"
_OPERATORS = "/cluster"
# Open paths tell nothing of clients, and of the cluster only its state and degraded pairs.
_OPEN = frozenset(
    {"/", "/health", "/live", "/ready", "/ping", "/version", "/openapi.json", "/docs"}
)
_MAX_AGE = b"600"  # seconds that a browser may cache a preflight's answer
_ANY = "*"
_USUAL_HEADERS = b"authorization, content-encoding, content-type, x-request-id, x-session-id"


class Client(NamedTuple):
    """The sender of a request. `key`: None if the gateway has no keys."""

    key: ApiKey | None = None

    @property
    def turns(self) -> Tenant:
        """The tenant in admission."""
        return NOBODY if self.key is None else _turns(self.key)

    def salted(self, cache_salt: str) -> str:
        """Return the cache salt with the key's tenant in it: tenants never share cached KV."""
        return portable(cache_salt if self.key is None else f"key@{self.key.tenant}:{cache_salt}")


ANYBODY = Client()


class Access:
    """Checks the credentials of a gateway's requests. Belongs to the event loop."""

    def __init__(
        self,
        keys: ApiKeys,
        secret: Secret,
        origins: Sequence[str] = (),
        metrics_secret: bool = False,
        advertised: str | None = None,
    ) -> None:
        """`advertised`: a URL of the gateway besides those of its sockets."""
        self.keys = keys  # replaced as a whole by a reload
        self.audience = Audience(any_name=True)  # the caller adds the sockets that it serves
        if advertised is not None:
            self.audience.add_url(advertised)
        self.verifier = Verifier(secret, self.audience)
        self._tokens = [_digest(value.encode()) for value in secret.values]
        for origin in origins:
            if origin != _ANY:
                check_url(origin)
        self._origins = frozenset(origin.rstrip("/").encode() for origin in origins)
        self._metrics_secret = metrics_secret
        self.unauthorised = 0  # clients without a key
        self.foreign = 0  # refused requests of other sites' pages

    def client(self, request: Request, reply: Reply) -> Client:
        """Return the client of a request for a client's path. Raises ApiError (401, 403)."""
        origin = request.header(b"origin")
        if origin is not None:
            self._from_page(origin, request, reply)
        if not self.keys.wanted:
            return ANYBODY
        key = self.key(request)
        if key is None:
            raise self._no_key()
        return Client(key)

    def key(self, request: Request) -> ApiKey | None:
        """Return the API key that a request shows; None: no valid one."""
        return self.keys.find(_bearer(request) or b"")

    def grants(self) -> dict[Tenant, Grant]:
        """Return the grants of the keys' tenants."""
        return {_turns(key): Grant(key.weight, key.privileged) for key in self.keys}

    def turns_away(self, request: Request) -> ApiError | None:
        """Return the refusal of a request by its head, before the body is read; None: go on."""
        if not _is_clients(request.path):
            return turns_away(self.verifier, request)
        if self.keys.wanted and self.key(request) is None:
            return self._no_key()
        return None

    async def admit(self, request: Request, reply: Reply) -> None:
        """Check the credentials of a request that does not generate. Raises ApiError."""
        path = request.path
        if _is_clients(path):
            self.client(request, reply)
        elif path == _OPERATORS or path.startswith(f"{_OPERATORS}/"):
            await self._operator(request, reply)
        elif path in (METRICS_PATH, LOAD_PATH):
            if self._metrics_secret:
                await self._operator(request, reply)
        elif path not in _OPEN:
            raise path_not_found(path)
        elif (origin := request.header(b"origin")) is not None and self._allows(origin):
            reply.added = lambda status, body: _cors(origin)

    def preflight(self, request: Request, reply: Reply) -> bool:
        """Answer a CORS preflight of an allowed origin; return False for any other request."""
        origin = request.header(b"origin")
        if request.method != "OPTIONS" or origin is None or not self._allows(origin):
            return False
        asked = request.header(b"access-control-request-headers")
        headers = (
            (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE"),
            # Any header may be allowed: none weakens a check.
            (b"access-control-allow-headers", asked or _USUAL_HEADERS),
            (b"access-control-max-age", _MAX_AGE),
            *_cors(origin),
        )
        reply.send(HTTPStatus.OK, b"", headers)
        return True

    async def _operator(self, request: Request, reply: Reply) -> None:
        given = request.header(b"authorization")
        token = _bearer(request)
        if token is None or (given is not None and given.startswith(SCHEME)):
            await require_signature(self.verifier, request, reply)
            return
        digest = _digest(token)
        if not any(hmac.compare_digest(digest, known) for known in self._tokens):
            await require_signature(self.verifier, request, reply)  # raises: not signed
        if not request.private:
            raise ApiError(
                HTTPStatus.FORBIDDEN,
                "The cluster's secret is taken as a Bearer token over TLS or from this machine "
                "only; `memserve cluster` signs instead.",
                type="authentication_error",
                code="not_private",
            )

    def _no_key(self) -> ApiError:
        self.unauthorised += 1
        return ApiError(
            HTTPStatus.UNAUTHORIZED,
            "Incorrect API key provided, or none: 'Authorization: Bearer KEY' is needed.",
            code="invalid_api_key",
            authenticate="Bearer",
        )

    def _from_page(self, origin: bytes, request: Request, reply: Reply) -> None:
        if self._allows(origin):
            reply.added = lambda status, body: _cors(origin)
        elif not self._own(origin, request):
            self.foreign += 1
            raise ApiError(
                HTTPStatus.FORBIDDEN,
                "Pages of this origin may not ask; cors_origins names those that may.",
                code="cross_origin",
            )

    def _allows(self, origin: bytes) -> bool:
        return origin in self._origins or _ANY.encode() in self._origins

    def _own(self, origin: bytes, request: Request) -> bool:
        """Return whether the page comes from this gateway. Without keys, only a loopback host
        counts: DNS can make any other name lead here."""
        host = request.header(b"host") or b""
        if origin.partition(b"://")[2] != host:
            return False
        return self.keys.wanted or is_loopback(_host_of(host))


def _is_clients(path: str) -> bool:
    return path.startswith(_CLIENTS) or path in _MORE_CLIENTS


def _turns(key: ApiKey) -> Tenant:
    return tenant_id(b"tenant:" + key.tenant.encode())


def _cors(origin: bytes) -> tuple[Header, ...]:
    return (
        (b"access-control-allow-origin", origin),
        (b"access-control-expose-headers", b"x-request-id, retry-after"),
        (b"vary", b"origin"),
    )


def _bearer(request: Request) -> bytes | None:
    given = request.header(b"authorization")
    if given is None or given[: len(_BEARER)].lower() != _BEARER:
        return None
    return given[len(_BEARER) :].strip()


def _host_of(netloc: bytes) -> str:
    try:
        return urlsplit(f"//{netloc.decode('latin-1')}").hostname or ""
    except ValueError:
        return ""


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
