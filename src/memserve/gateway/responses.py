"""The endpoints of `/v1/responses`: answers made from chats, and those that are kept.

A response is kept by the worker that made it. Others ask their siblings, by calls that only
processes with the cluster's secret can make; other gateways are not asked.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import Final, TypeVar
from urllib.parse import parse_qsl

import msgspec

from memserve.api import msgpack
from memserve.api.errors import (
    ApiError,
    invalid,
    method_not_allowed,
    path_not_found,
    unavailable,
)
from memserve.api.forward import ForwardPath
from memserve.api.generate import GenerateCall
from memserve.api.http_message import Reply, Request
from memserve.api.http_server import Handler
from memserve.api.limits import LARGE_BODY_BYTES, MAX_CONVERSATION_BYTES, MAX_NAME_CHARACTERS
from memserve.api.neutral import unsupported
from memserve.api.openai import NotUnderstood
from memserve.api.status import Limits, MemberKind
from memserve.cluster.membership import Membership
from memserve.gateway.access import Access
from memserve.gateway.call_builder import COUNTED_CONTEXTS, CallBuilder
from memserve.gateway.forward_builder import ForwardBuilder
from memserve.gateway.response_store import Owner, ResponseStore, StoredResponse, owner_of
from memserve.gateway.responses_reply import ResponsesReply
from memserve.gateway.responses_request import (
    Asked,
    chat_body,
    decode_items,
    kept_items,
    of_this_request,
    read_input,
    read_request,
)
from memserve.gateway.siblings import Siblings

RESPONSES_PATH: Final = ForwardPath.RESPONSES.value
INPUT_TOKENS_PATH: Final = f"{RESPONSES_PATH}/input_tokens"
_STORED: Final = f"{RESPONSES_PATH}/"
_SIBLINGS: Final = "/cluster/worker/responses/"  # <owner>/<id>, among the workers of a gateway
_DEFAULT_PAGE, _MAX_PAGE = 20, 100  # items of a page; OpenAI's
_MAX_QUERY_BYTES = 2048
_DELETED = b"deleted"
# Read and translated on the event loop: hundreds of short items take a millisecond.
INLINE_BYTES: Final = 8 * 1024

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode
_stored = msgspec.msgpack.Decoder(StoredResponse)


class _Identified(msgspec.Struct, frozen=True):
    id: str


class InputTokens(msgspec.Struct, frozen=True):
    """How many tokens a request's prompt has."""

    input_tokens: int
    object: str = "response.input_tokens"


class ItemList(msgspec.Struct, frozen=True):
    data: Sequence[msgspec.Raw]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


class Deleted(msgspec.Struct, frozen=True):
    id: str
    object: str = "response"
    deleted: bool = True


class Responses:
    """Makes, keeps, finds and forgets responses. Belongs to the event loop."""

    def __init__(
        self,
        calls: CallBuilder,
        forwards: ForwardBuilder,
        membership: Membership,
        access: Access,
        store: ResponseStore,
        siblings: Siblings | None = None,
    ) -> None:
        self._calls = calls
        self._forwards = forwards
        self._membership = membership
        self._access = access
        self.store = store
        self._siblings = siblings

    def begin(self, request: Request, reply: Reply) -> Exchange:
        """Return what answers `POST /v1/responses`."""
        return Exchange(self, request, ResponsesReply(reply, request))

    def serves(self, path: str) -> bool:
        """Whether `answer` takes the path: it is a stored response's."""
        return path.startswith(_STORED)

    async def answer(self, request: Request, reply: Reply) -> None:
        """Answer for one stored response. The caller has checked who asks. Raises ApiError."""
        response_id, _, part = request.path.removeprefix(_STORED).partition("/")
        if part == "cancel":
            raise unsupported("background")  # only such a response could be cancelled
        if part not in ("", "input_items") or len(response_id) > MAX_NAME_CHARACTERS:
            raise path_not_found(request.path)
        owner = self.owner(request)
        if request.method == "DELETE" and not part:
            if not await self._delete(owner, response_id):
                raise self._unknown(response_id)
            reply.send(HTTPStatus.OK, _encode(Deleted(response_id)))
            return
        if request.method not in ("GET", "HEAD"):
            allowed = "GET, HEAD" if part else "DELETE, GET, HEAD"
            raise method_not_allowed(request.method, request.path, allowed)
        if len(request.query) > _MAX_QUERY_BYTES:
            raise invalid(f"The query is longer than {_MAX_QUERY_BYTES} bytes.")
        query = dict(parse_qsl(request.query.decode("latin-1")))
        if query.get("stream") == "true":
            raise unsupported("stream")
        stored = await self.find(owner, response_id)
        if stored is None:
            raise self._unknown(response_id)
        body = stored.body
        if part:
            body = await self._aside(stored.size, partial(_page, stored.input, query))
        reply.send(HTTPStatus.OK, body)

    def for_siblings(self, handler: Handler) -> Handler:
        """Return a handler that answers sibling workers, and passes any other request on."""

        async def handle(request: Request, reply: Reply) -> None:
            if not request.path.startswith(_SIBLINGS):
                await handler(request, reply)
                return
            owner, _, response_id = request.path.removeprefix(_SIBLINGS).partition("/")
            stored = self.store.get(Owner(owner), response_id)
            if stored is None:
                reply.send(HTTPStatus.OK, b"")  # told apart from a worker that does not answer
                return
            if request.method == "DELETE":
                self.store.delete(Owner(owner), response_id)
                reply.send(HTTPStatus.OK, _DELETED)
                return
            reply.send(HTTPStatus.OK, msgpack.encode(stored))

        return handle

    async def build(self, body: bytes, limits: Limits, exchange: Exchange) -> GenerateCall:
        """Return the call that answers a request. Raises ApiError."""
        try:
            return await self._build(body, limits, exchange)
        except NotUnderstood as error:
            if not self._membership.has(MemberKind.VLLM):
                raise of_this_request(error) from error
        except ApiError as error:
            raise of_this_request(error) from error
        exchange.reply.pass_through()
        return await self._forwards.build(ForwardPath.RESPONSES, body, limits)

    async def count(self, request: Request, body: bytes, limits: Limits) -> bytes:
        """Return, as JSON, how many tokens the prompt of a request for a response has. Raises
        ApiError."""
        room = msgspec.structs.replace(limits, max_tokens=limits.max_tokens * COUNTED_CONTEXTS)
        try:
            asked = await self._aside(len(body), partial(read_request, body))
            owner = self.owner(request)
            chat, _ = await self._chat_of(asked, owner, len(body), None)
            call = await self._calls.chat(chat, room)
        except ApiError as error:
            raise of_this_request(error) from error
        return _encode(InputTokens(len(call.prompts[0])))

    async def _chat_of(
        self, asked: Asked, owner: Owner, size: int, stem: str | None
    ) -> tuple[bytes, tuple[bytes, ...]]:
        """Return a request's chat and items, as `_translated`; `size`: bytes of the request."""
        before: tuple[bytes, ...] = ()
        if asked.request.previous_response_id is not None:
            before = await self._before(owner, asked.request.previous_response_id)
        size += sum(map(len, before))
        return await self._aside(size, partial(_translated, asked, before, stem))

    async def _build(self, body: bytes, limits: Limits, exchange: Exchange) -> GenerateCall:
        asked = await self._aside(len(body), partial(read_request, body))
        request = asked.request
        store = self._stores(request.store)
        stem = self._calls.new_id("item") if store else None
        chat, given = await self._chat_of(asked, exchange.owner, len(body), stem)
        call = await self._calls.chat(chat, limits)
        # Not to be guessed: without keys, all clients may be one owner.
        response_id = f"resp_{secrets.token_hex(24)}"
        response = await self._aside(
            len(body), partial(asked.response, response_id, self._calls.model, store)
        )
        keep = partial(self._keep, exchange.owner, response_id, given) if store else None
        exchange.reply.begin(response, bool(request.stream), keep, asked.wants_logprobs)
        return call

    async def _aside(self, size: int, work: Callable[[], T]) -> T:
        """Do work on so many bytes: on a thread if it would hold up the event loop."""
        if size > LARGE_BODY_BYTES:
            return await self._calls.threads.apart(work)
        if size > INLINE_BYTES:
            return await self._calls.threads.off_loop(size, work)
        return work()

    def _stores(self, asked: bool | None) -> bool:
        """Return whether to keep the answer; OpenAI's default is yes. Raises ApiError."""
        if asked and not self.store.max_bytes:
            raise invalid(
                "'store' is not supported: this gateway keeps no responses "
                "(response_store_bytes is 0).",
                "store",
                "unsupported_parameter",
            )
        return bool(self.store.max_bytes) and asked is not False

    async def _before(self, owner: Owner, response_id: str) -> tuple[bytes, ...]:
        stored = await self.find(owner, response_id)
        if stored is None:
            error = self._unknown(response_id)
            raise invalid(
                error.detail.message, "previous_response_id", "previous_response_not_found"
            )
        if (size := stored.size) > MAX_CONVERSATION_BYTES:
            raise invalid(
                f"The conversation before takes {size} bytes, and at most "
                f"{MAX_CONVERSATION_BYTES} may be gone on from.",
                "previous_response_id",
            )
        return stored.input + stored.output

    def _keep(
        self,
        owner: Owner,
        response_id: str,
        given: tuple[bytes, ...],
        body: bytes,
        output: Sequence[bytes],
    ) -> None:
        stored = StoredResponse(body, given, tuple(output))
        if stored.size <= MAX_CONVERSATION_BYTES:  # siblings could not pass on a larger one
            self.store.put(owner, response_id, stored)

    def owner(self, request: Request) -> Owner:
        """Return the owner of what a client stores: the API key's tenant. Where the gateway has no
        keys, all who show the same Authorization header, or none."""
        key = self._access.key(request)
        if key is not None:
            return owner_of(b"tenant:" + key.tenant.encode())
        return owner_of(b"shown:" + (request.header(b"authorization") or b""))

    async def find(self, owner: Owner, response_id: str) -> StoredResponse | None:
        """Return a response of this worker's, or of a sibling's; None: it is unknown there."""
        stored = self.store.get(owner, response_id)
        if stored is None and (body := await self._ask("GET", owner, response_id)) is not None:
            try:
                return _stored.decode(body)
            except (msgspec.MsgspecError, ValueError):
                return None
        return stored

    async def _delete(self, owner: Owner, response_id: str) -> bool:
        if self.store.delete(owner, response_id):
            return True
        return await self._ask("DELETE", owner, response_id) is not None

    async def _ask(self, method: str, owner: Owner, response_id: str) -> bytes | None:
        """Return the answer of the sibling that has a response; None: none has it. Raises ApiError
        (503) if that is not certain."""
        if self._siblings is None or not _is_id(response_id):
            return None
        path = f"{_SIBLINGS}{owner}/{response_id}"
        answers = await self._siblings.answers(path, method)
        found = next((body for body in answers.values() if body), None)
        if found is None and len(answers) < self._siblings.count:
            raise unavailable(
                "A worker of this gateway did not answer; it may have this response.",
                "worker_unavailable",
            )
        return found

    def _unknown(self, response_id: str) -> ApiError:
        if not self.store.max_bytes:
            why = "This gateway keeps no responses (response_store_bytes is 0)."
        else:
            why = (
                "A gateway keeps in memory what it has made itself, until the memory is needed "
                "or it ends."
            )
        message = f"Response '{response_id[:64]}' not found. {why}"
        return ApiError(HTTPStatus.NOT_FOUND, message, code="response_not_found")


class Exchange:
    """One request of `POST /v1/responses`, and its reply."""

    def __init__(self, responses: Responses, request: Request, reply: ResponsesReply) -> None:
        self._responses = responses
        self._request: Request | None = request
        self.reply = reply

    @property
    def owner(self) -> Owner:
        assert self._request is not None
        return self._responses.owner(self._request)

    async def build(self, body: bytes, limits: Limits) -> GenerateCall:
        """Return the call. Raises ApiError."""
        call = await self._responses.build(body, limits, self)
        self._request = None  # frees its body
        return call


def _translated(
    asked: Asked, before: tuple[bytes, ...], stem: str | None
) -> tuple[bytes, tuple[bytes, ...]]:
    """Return the body of a request's chat, which also has the items `before`, and the items of
    both, to keep; none without a `stem` for their ids."""
    items = read_input(asked)
    chat = chat_body(asked, (*decode_items(before), *items))
    return chat, () if stem is None else before + kept_items(items, stem)


def _page(items: Sequence[bytes], query: dict[str, str]) -> bytes:
    """Return a page of items, as JSON. Raises ApiError (400)."""
    order, limit = query.get("order", "desc"), query.get("limit", str(_DEFAULT_PAGE))
    if order not in ("asc", "desc"):
        raise invalid("'order' is asc or desc.", "order")
    plain = limit.isascii() and limit.isdigit() and len(limit) <= len(str(_MAX_PAGE))
    if not plain or not 1 <= int(limit) <= _MAX_PAGE:
        raise invalid(f"'limit' is a number from 1 to {_MAX_PAGE}.", "limit")
    ids = [msgspec.json.decode(item, type=_Identified).id for item in items]
    places = list(range(len(items)))
    if order == "desc":
        places.reverse()
    if (after := query.get("after")) is not None:
        if after not in ids:
            raise invalid("'after' is no item of this response.", "after")
        places = places[places.index(ids.index(after)) + 1 :]
    page = places[: int(limit)]
    return _encode(
        ItemList(
            [msgspec.Raw(items[at]) for at in page],
            ids[page[0]] if page else None,
            ids[page[-1]] if page else None,
            len(places) > len(page),
        )
    )


def _is_id(text: str) -> bool:
    """Whether a text may be an id of ours: anything else is not put into a sibling's URL."""
    return text.startswith("resp_") and text.isascii() and text[5:].isalnum()
