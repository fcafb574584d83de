"""The administrative endpoints, and the published schema of all endpoints."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import memserve
from memserve.api.chunks import ChatCompletion, Completion
from memserve.api.errors import (
    ApiError,
    ErrorBody,
    invalid,
    method_not_allowed,
    model_not_found,
    path_not_found,
)
from memserve.api.forward import ForwardPath
from memserve.api.metric import CONTENT_TYPE
from memserve.api.openai import ChatRequest, CompletionRequest
from memserve.api.peer_client import PeerClient
from memserve.api.responses import Response as ClientResponse
from memserve.api.responses import ResponsesRequest
from memserve.api.status import InstanceState
from memserve.cluster.client import DECISIONS_PATH, FEEDS_PATH
from memserve.cluster.kv_feed import MemberFeed
from memserve.cluster.member import DegradedPair
from memserve.cluster.membership import MemberChange, Membership
from memserve.gateway.access import LOAD_PATH, METRICS_PATH
from memserve.gateway.asgi import JsonResponse
from memserve.gateway.cluster_admin import cluster_routes
from memserve.gateway.metrics import GatewayMetrics, merged
from memserve.gateway.pages import page_routes
from memserve.gateway.responses import INPUT_TOKENS_PATH, InputTokens
from memserve.gateway.siblings import Siblings
from memserve.gateway.tokenization import DetokenizeRequest, Text, TokenizeRequest, Tokens
from memserve.scheduler.decision_view import DecisionView
from memserve.scheduler.decisions import Decision

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
OWN_METRICS_PATH = "/cluster/worker/metrics"  # one worker's metrics, for its siblings

_COMPONENTS = "#/components/schemas/"

_encode = msgspec.json.Encoder().encode
_decisions = msgspec.json.Decoder(list[DecisionView])

Decisions = Callable[[int], Sequence[Decision]]  # the last n, newest first
MAX_DECISIONS = 1_000_000  # largest n that a request may have; far fewer are kept
SHOWN_DECISIONS = 100  # default n


@dataclass(frozen=True, slots=True)
class Troubles:
    """Sources of faults that do not keep requests from being answered."""

    degraded: Callable[[], Sequence[DegradedPair]] = tuple
    feeds: Callable[[], Sequence[MemberFeed]] = tuple


class ModelCard(msgspec.Struct, frozen=True):
    id: str
    created: int
    max_model_len: int | None
    vocab_size: int | None = None  # token ids of prompts are below it
    object: str = "model"
    owned_by: str = "memserve"


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelCard]
    object: str = "list"


class Health(msgspec.Struct, frozen=True):
    status: str
    ready: int  # instances
    degraded: list[DegradedPair] | msgspec.UnsetType = msgspec.UNSET  # if there are any


class Status(msgspec.Struct, frozen=True):
    """`GET /live`, `GET /ready`."""

    status: str


class Load(msgspec.Struct, frozen=True):
    server_load: int


_load = msgspec.json.Decoder(Load)


class Version(msgspec.Struct, frozen=True):
    version: str


def admin_app(
    model: str,
    membership: Membership,
    peers: PeerClient,
    metrics: GatewayMetrics,
    draining: Callable[[], bool],
    decisions: Decisions,
    siblings: Siblings | None = None,
    troubles: Troubles | None = None,
) -> FastAPI:
    """Return the application of all endpoints that do not generate. With `siblings`, metrics and
    decisions are those of all workers; otherwise of this process alone."""
    known = troubles or Troubles()
    # FastAPI's own pages load their scripts from elsewhere.
    app = FastAPI(title="memserve", version=memserve.__version__, docs_url=None, redoc_url=None)
    started = int(time.time())

    def card() -> ModelCard:
        limits = [member.limits for member in membership.ready() if member.limits is not None]
        longest = min((limit.max_tokens for limit in limits), default=None)
        ids = min((limit.vocab_size for limit in limits), default=None)
        return ModelCard(model, started, longest, ids)

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JsonResponse(ModelList([card()]))

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> Response:
        if name != model:
            raise model_not_found(name, model)
        return JsonResponse(card())

    @app.get("/health")
    async def health() -> Response:
        ready = len(membership.ready())
        if draining():
            return JsonResponse(Health("draining", ready), 503)
        if not ready:
            return JsonResponse(Health("no instance", 0), 503)
        # `detail` has addresses, and anybody may read `/health`.
        degraded = [msgspec.structs.replace(pair, detail="") for pair in known.degraded()]
        return JsonResponse(Health("ready", ready, degraded or msgspec.UNSET))

    @app.get("/ping")
    @app.post("/ping")
    async def ping() -> Response:
        """`/health` for SageMaker: a body only if it is not 200."""
        answer = await health()
        return Response() if answer.status_code == HTTPStatus.OK else answer

    app.include_router(_probe_routes(membership, draining))

    @app.get(LOAD_PATH)
    async def load() -> Response:
        """Requests under way, at all workers."""
        running = metrics.running
        if siblings is not None:
            for body in (await siblings.answers(LOAD_PATH)).values():
                running += _load.decode(body).server_load
        return JsonResponse(Load(running))

    @app.get("/version")
    async def version() -> Response:
        return JsonResponse(Version(memserve.__version__))

    app.include_router(page_routes())
    app.include_router(_observing_routes(metrics, decisions, siblings))
    app.include_router(cluster_routes(membership, peers, siblings, known.degraded))

    @app.get(FEEDS_PATH)
    async def feeds() -> Response:
        """The state of each member's KV event feed at this worker."""
        return JsonResponse(list(known.feeds()))

    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _parameter_error)
    app.openapi = _with_openai(app.openapi)  # type: ignore[method-assign]
    return app


def _probe_routes(membership: Membership, draining: Callable[[], bool]) -> APIRouter:
    """Return the endpoints for a supervisor's probes. Neither fails because instances are lost:
    requests wait for an instance that comes back, and a restart of gateways would bring none."""
    routes = APIRouter()
    met = False  # an instance has been ready

    def meet(change: MemberChange) -> None:
        nonlocal met
        met = met or change.state is InstanceState.READY

    membership.on_change(meet)

    @routes.get("/live")
    async def live() -> Response:
        """200 while the gateway answers at all, also while it drains."""
        return JsonResponse(Status("live"))

    @routes.get("/ready")
    async def ready() -> Response:
        """503 while the gateway drains, and until a first instance is ready."""
        if draining():
            return JsonResponse(Status("draining"), 503)
        return JsonResponse(Status("ready")) if met else JsonResponse(Status("no instance"), 503)

    return routes


def _observing_routes(
    metrics: GatewayMetrics, decisions: Decisions, siblings: Siblings | None
) -> APIRouter:
    routes = APIRouter()

    @routes.get(METRICS_PATH)
    async def prometheus(instances: bool = True) -> Response:
        """The gateway's figures, and those of all instances as they were last polled. Without
        `instances`, 37 KB less for each: for scrapers that ask instances themselves."""
        own = await metrics.own()
        if siblings is not None:
            own = merged({siblings.index: own, **await siblings.answers(OWN_METRICS_PATH)})
        others = await metrics.instances() if instances else b""
        return Response(own + others, media_type=CONTENT_TYPE)

    @routes.get(OWN_METRICS_PATH, include_in_schema=False)
    async def own_metrics() -> Response:
        return Response(await metrics.own(), media_type=CONTENT_TYPE)

    @routes.get(DECISIONS_PATH)
    async def last_decisions(
        n: Annotated[int, Query(ge=0, le=MAX_DECISIONS)] = SHOWN_DECISIONS,
    ) -> Response:
        """The last scheduling decisions, newest first, with all candidates."""
        # On a thread: a thousand decisions take 0.1 s to format. They never change.
        body = await asyncio.to_thread(_explained, decisions(n))
        if siblings is not None:
            others = await siblings.answers(f"{DECISIONS_PATH}?n={n}")
            body = await asyncio.to_thread(_newest, n, (body, *others.values()))
        return JsonResponse(body)

    return routes


def _explained(decisions: Sequence[Decision]) -> bytes:
    return _encode([decision.view() for decision in decisions])


def _newest(n: int, lists: Sequence[bytes]) -> bytes:
    """Return the last `n` of several workers' decisions, newest first: workers share the
    machine's clock."""
    found = [decision for body in lists for decision in _decisions.decode(body)]
    found.sort(key=lambda decision: decision.at, reverse=True)
    return _encode(found[:n])


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return JsonResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Return Starlette's own errors in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == HTTPStatus.NOT_FOUND:
        return await _api_error(request, path_not_found(path))
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allow = (error.headers or {}).get("Allow")
        return await _api_error(request, method_not_allowed(request.method, path, allow))
    return await _api_error(request, ApiError(HTTPStatus(error.status_code), str(error.detail)))


async def _parameter_error(request: Request, error: Exception) -> Response:
    """Return FastAPI's own validation errors in OpenAI's shape."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return await _api_error(request, invalid(f"'{name}': {first['msg']}.", name))


def _with_openai(base: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Return the schema function, extended by the endpoints that bypass FastAPI."""
    endpoints = {
        CHAT_PATH: (ChatRequest, ChatCompletion),
        COMPLETIONS_PATH: (CompletionRequest, Completion),
        ForwardPath.RESPONSES.value: (ResponsesRequest, ClientResponse),
        INPUT_TOKENS_PATH: (ResponsesRequest, InputTokens),
        ForwardPath.TOKENIZE.value: (TokenizeRequest, Tokens),
        ForwardPath.DETOKENIZE.value: (DetokenizeRequest, Text),
    }

    def schema() -> dict[str, Any]:
        document = base()
        types = [ErrorBody, *(kind for pair in endpoints.values() for kind in pair)]
        _, components = msgspec.json.schema_components(
            types,
            ref_template=_COMPONENTS + "{name}",
            schema_hook=lambda kind: {"description": "any JSON value"},  # of fields: object
        )

        def content(kind: type) -> dict[str, Any]:
            reference = {"$ref": _COMPONENTS + kind.__name__}
            return {"content": {"application/json": {"schema": reference}}}

        for path, (asked, answer) in endpoints.items():
            document["paths"][path] = {
                "post": {
                    "summary": asked.__name__,
                    "requestBody": {"required": True, **content(asked)},
                    "responses": {
                        "200": {"description": "The answer", **content(answer)},
                        "default": {"description": "An error", **content(ErrorBody)},
                    },
                }
            }
        document.setdefault("components", {}).setdefault("schemas", {}).update(components)
        return document

    return schema
