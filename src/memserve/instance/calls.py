"""Decoding of the calls to an instance; malformed bytes raise ApiError (400)."""

from __future__ import annotations

import asyncio
from typing import Final, Generic, TypeVar

import msgspec

from memserve.api import msgpack
from memserve.api.control import MAX_CONTROL_BYTES, RoleCall, ShutdownCall
from memserve.api.errors import invalid, queue_full
from memserve.api.generate import GenerateCall
from memserve.api.handoff import MeetCall, PrefillCall, PushCall
from memserve.api.http_message import JSON_MEDIA
from memserve.api.limits import (
    LARGE_BODIES_WAITING,
    LARGE_BODY_BYTES,
    MAX_ECHO_CHARACTERS,
    MAX_SEQUENCES,
)
from memserve.api.peer_client import DECODE_ERRORS

# A call consists mostly of tokens of 4 bytes: room for contexts of millions of tokens.
MAX_CALL_BYTES = 64 * 1024 * 1024
LARGE_RETRY_SECONDS = 1

_Call = TypeVar("_Call")
_objects = msgspec.json.Decoder(dict[str, msgspec.Raw])


class CallReader(Generic[_Call]):
    """Decoder of one type of call in one format."""

    def __init__(
        self, kind: type[_Call], media: str = msgpack.MEDIA, max_bytes: int = MAX_CALL_BYTES
    ) -> None:
        """`media`: the format's content type, msgpack's or JSON's."""
        self.media = media
        self.max_bytes = max_bytes
        self._decoder = (
            msgspec.msgpack.Decoder(kind) if media == msgpack.MEDIA else msgspec.json.Decoder(kind)
        )

    def read(self, body: bytes) -> _Call:
        """Decode and check a call. Raises ApiError (400)."""
        try:
            call = self._decoder.decode(body)
            if isinstance(call, GenerateCall) and call.forward is not None:
                _objects.decode(call.forward.body)
        except DECODE_ERRORS as error:
            raise invalid(f"malformed call: {str(error)[:MAX_ECHO_CHARACTERS]}") from error
        if isinstance(call, GenerateCall):
            _check_sequences(call)
        return call


class LargeCalls:
    """Decodes large calls in a thread, one at a time: decoding may take ten times a call's size
    in memory. Used on the event loop."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def read(self, reader: CallReader[_Call], body: bytes) -> _Call:
        """Decode a call of any size. Raises ApiError (400, or queue_full if too many large calls
        wait)."""
        if len(body) <= LARGE_BODY_BYTES:
            return reader.read(body)
        if self._waiting >= LARGE_BODIES_WAITING:
            raise queue_full(f"{self._waiting} large calls are waiting", LARGE_RETRY_SECONDS)
        self._waiting += 1
        try:
            async with self._turn:
                return await asyncio.to_thread(reader.read, body)
        finally:
            self._waiting -= 1


GENERATE: Final = CallReader(GenerateCall)
PREFILL: Final = CallReader(PrefillCall)
PUSH: Final = CallReader(PushCall)
MEET: Final = CallReader(MeetCall, max_bytes=MAX_CONTROL_BYTES)
ROLE: Final = CallReader(RoleCall, JSON_MEDIA, MAX_CONTROL_BYTES)
SHUTDOWN: Final = CallReader(ShutdownCall, JSON_MEDIA, MAX_CONTROL_BYTES)


def _check_sequences(call: GenerateCall) -> None:
    sequences = len(call.prompts) * call.n
    if sequences > MAX_SEQUENCES:
        raise invalid(f"{sequences} sequences in one call, and at most {MAX_SEQUENCES}", "n")
    if not all(map(len, call.prompts)):
        raise invalid("a prompt has no tokens", "prompt")
    if call.resumed and len(call.resumed) != sequences:
        raise invalid(f"{sequences} choices, but tokens for {len(call.resumed)}", "resumed")
