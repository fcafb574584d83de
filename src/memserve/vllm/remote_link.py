"""`KVLink` of an instance whose pool is inside its vLLM server (`memserve.instance.link`).

Calls go to the pool's Unix socket. They name namespaces by vLLM's `cache_salt`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from memserve.api.handoff import PoolPeer
from memserve.api.namespaces import cache_salt_of
from memserve.api.status import PoolTotals
from memserve.config import Caching, TransferMode
from memserve.errors import EngineStopped, PoolError, TransferError, TransferTimeout
from memserve.secrets import Secret
from memserve.transfer.kv_link import Pushed
from memserve.transfer.session import DEADLINE, HEARTBEAT
from memserve.types import SHARED, InstanceId, Namespace, RefArray, TokenArray
from memserve.vllm import pool_messages as m

log = logging.getLogger(__name__)

ASK_SECONDS = 10.0  # timeout of the first call, `Serve`
# Timeouts of answers: longer than the pool takes to find that a peer cannot be reached, or that a
# transfer does not end, so that the answer gives the reason.
CALL_SECONDS = 15.0
PUSH_SECONDS = 2 * DEADLINE

_Heard = TypeVar("_Heard", m.Served, m.Counted, m.PushDone, m.Totals, m.Reached, m.Lost, m.Done)


class PushOrder:
    """A `PrefillStream`: the pool sends a prompt's KV to a peer while the vLLM server computes the
    request that names this order's `number`."""

    def __init__(
        self,
        link: RemoteLink,
        number: int,
        peer: PoolPeer,
        tokens: TokenArray,
        source: Namespace,
        target: Namespace,
    ) -> None:
        self.number = number
        self._link = link
        self._peer = peer
        self._tokens = tokens
        self._namespaces = source, target
        self._delivered = False

    def begin(self, refs: RefArray) -> None:
        """Do nothing: the connector's scheduler reports ready blocks to the pool."""

    async def deliver(self) -> Pushed:
        """Send the rest when all tokens are computed, and publish the KV at the peer. Raises as
        `RemoteLink.push`."""
        self._delivered = True
        return await self._link.push(self._peer, self._tokens, *self._namespaces, self.number)

    def close(self) -> None:
        """Withdraw the order, unless `deliver` was called. Idempotent."""
        if not self._delivered:
            self._delivered = True
            self._link.withdraw(self.number)


class RemoteLink:
    """Calls the pool of a vLLM server. Belongs to one event loop, from its first call to
    `close`."""

    def __init__(
        self,
        path: Path,
        instance: InstanceId,
        host: str,
        secret: Secret,
        caching: Caching,
        mode: TransferMode,
    ) -> None:
        """Have the pool behind the socket at `path` served on `host`. Blocks for up to ASK_SECONDS
        per socket operation. Raises EngineStopped. May run on any thread."""
        self._numbers = itertools.count(1)
        self._caching: Caching = caching
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(ASK_SECONDS)
            self._socket.connect(str(path))
            m.require_own(self._socket)  # before the secret is sent
            said = m.Serve(host, None if secret.local else str(secret), caching, mode)
            self._socket.sendall(m.frame(m.Call(0, said)))
            with self._socket.makefile("rb") as file:
                heard = m.decode_reply(file.read(m.body_bytes(file.read(m.HEAD_BYTES)))).heard
        except (OSError, TransferError, msgspec.MsgspecError) as error:
            self._socket.close()
            raise EngineStopped(f"the vLLM server's pool cannot be talked to: {error}") from error
        if not isinstance(heard, m.Served):
            self._socket.close()
            raise EngineStopped(f"the vLLM server's pool is not served: {heard}")
        if heard.instance != instance:
            self._socket.close()
            raise EngineStopped(f"the vLLM server's pool is {heard.instance!r}, not {instance!r}")
        self._served = heard
        self._address = PoolPeer(instance, heard.address)
        self._waiting: dict[int, asyncio.Future[m.Heard]] = {}
        self._opening: asyncio.Task[asyncio.StreamWriter] | None = None
        self._background: set[asyncio.Task[object]] = set()
        self._ended = asyncio.Event()
        self._lost = ""  # why the connection has ended; empty: it has not
        self._totals = PoolTotals()
        self._reading_totals = False

    @property
    def address(self) -> PoolPeer:
        return self._address

    @property
    def caching(self) -> Caching:
        return self._caching

    @property
    def block_bytes(self) -> int:
        return self._served.block_bytes

    @property
    def block_tokens(self) -> int:
        return self._served.block_tokens

    @property
    def kv(self) -> str:
        return self._served.kv

    @property
    def totals(self) -> PoolTotals:
        """The pool's totals as of the last reading. Starts another reading in the background."""
        if not self._reading_totals:
            self._reading_totals = True
            self._in_background(self._read_totals())
        return self._totals

    async def cached(self, tokens: TokenArray, namespace: Namespace) -> int:
        said = m.Count(tokens, _theirs(namespace))
        return (await self._call(said, m.Counted)).tokens

    async def push(
        self,
        peer: PoolPeer,
        tokens: TokenArray,
        source: Namespace,
        target: Namespace,
        order: int = 0,
    ) -> Pushed:
        """See `KVLink`. `order`: number of an order that has sent some of the blocks already."""
        said = m.Push(peer, tokens, _theirs(source), _theirs(target), order)
        done = await self._call(said, m.PushDone)
        return Pushed(done.sent, done.already_present)

    async def stream(
        self, peer: PoolPeer, tokens: TokenArray, source: Namespace, target: Namespace
    ) -> PushOrder:
        number = int.from_bytes(os.urandom(7))  # random, so that other clients cannot name it
        names = _theirs(source), _theirs(target)
        try:
            await self._call(m.Order(number, peer, tokens, *names), m.Done)
        except asyncio.CancelledError:  # the pool may have the order already
            self.withdraw(number)
            raise
        return PushOrder(self, number, peer, tokens, source, target)

    async def meet(self, peer: PoolPeer) -> None:
        await self._call(m.Meet(peer), m.Done)

    async def transport(self, peer: PoolPeer) -> str:
        return (await self._call(m.Reach(peer), m.Reached)).transport

    def forget(self, namespace: Namespace) -> None:
        self._in_background(self._say(m.Forget(_theirs(namespace))))

    def withdraw(self, order: int) -> None:
        self._in_background(self._say(m.Withdraw(order)))

    async def until_lost(self, peer: PoolPeer) -> str:
        try:
            return (await self._call(m.Watch(peer), m.Lost)).why
        except (TransferError, PoolError) as error:
            return str(error)

    async def run(self) -> None:
        """Return when the connection to the pool has ended. Until then the pool hears from this
        event loop once per HEARTBEAT, and vouches for it."""
        with suppress(TransferError):
            await self._writer()
            while not self._lost:
                await self._read_totals()
                with suppress(TimeoutError):
                    async with asyncio.timeout(HEARTBEAT):
                        await self._ended.wait()

    def close(self) -> None:
        self._end("it is closed")
        for task in self._background:
            task.cancel()
        if self._opening is None:
            self._socket.close()
        elif not self._opening.done():
            self._opening.cancel()
            self._socket.close()
        elif not self._opening.cancelled() and self._opening.exception() is None:
            self._opening.result().close()

    # --- calls ----------------------------------------------------------------------------

    async def _call(self, said: m.Said, expected: type[_Heard]) -> _Heard:
        """Send a call and return its answer. A cancellation also cancels the call at the pool.
        Raises TransferError, PoolError."""
        number = next(self._numbers)
        writer = await self._writer()
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        seconds = PUSH_SECONDS if isinstance(said, m.Push) else CALL_SECONDS
        try:
            writer.write(m.frame(m.Call(number, said)))
            async with asyncio.timeout(seconds):
                heard = await answer
        except TimeoutError as error:
            self._give_up(writer, number)
            text = f"the vLLM server's pool has not answered within {seconds:g} s"
            raise TransferTimeout(text) from error
        except asyncio.CancelledError:
            self._give_up(writer, number)
            raise
        finally:
            self._waiting.pop(number, None)
        if isinstance(heard, m.Failed):
            raise PoolError(heard.text) if heard.of_pool else TransferError(heard.text)
        if not isinstance(heard, expected):
            raise TransferError(f"the vLLM server's pool answers {type(heard).__name__}")
        return heard

    def _give_up(self, writer: asyncio.StreamWriter, number: int) -> None:
        if not self._lost:
            writer.write(m.frame(m.Call(next(self._numbers), m.Cancel(number))))

    async def _writer(self) -> asyncio.StreamWriter:
        if self._lost:
            raise TransferError(self._lost)
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._open())
        return await asyncio.shield(self._opening)

    async def _open(self) -> asyncio.StreamWriter:
        self._socket.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=self._socket)
        self._in_background(self._read(reader))
        return writer

    async def _read(self, reader: asyncio.StreamReader) -> None:
        why = "it is closed"
        try:
            while True:
                size = m.body_bytes(await reader.readexactly(m.HEAD_BYTES))
                reply = m.decode_reply(await reader.readexactly(size))
                answer = self._waiting.get(reply.number)
                if answer is not None and not answer.done():
                    answer.set_result(reply.heard)
        except (OSError, EOFError, TransferError, msgspec.MsgspecError) as error:
            why = str(error)
            log.error("the connection to the vLLM server's pool has ended: %s", why)
        finally:
            self._end(why)

    def _end(self, why: str) -> None:
        """End the connection: waiting and further calls fail with TransferError."""
        self._lost = self._lost or f"the vLLM server's pool is not there any more: {why}"
        self._ended.set()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_result(m.Failed(self._lost, of_pool=False))

    async def _say(self, said: m.Said) -> None:
        with suppress(TransferError, PoolError):  # a lost pool has lost the KV and the order, too
            await self._call(said, m.Done)

    async def _read_totals(self) -> None:
        try:
            self._totals = (await self._call(m.ReadTotals(), m.Totals)).totals
        except (TransferError, PoolError) as error:
            log.debug("no totals: %s", error)
        finally:
            self._reading_totals = False

    def _in_background(self, work: Coroutine[None, None, object]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _theirs(namespace: Namespace) -> Namespace:
    return Namespace(cache_salt_of(namespace) or SHARED)
