"""Server for the pool inside a vLLM server: answers the instance beside it on a Unix socket.

Only the instance names peers that get KV. A request at the vLLM server can name an order of the
instance and nothing else, so clients of vLLM cannot send KV anywhere. The server runs on a thread
of its own; vLLM's scheduling thread only calls `ready`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from memserve.api.handoff import PoolPeer
from memserve.errors import ConfigError, PoolError, TransferError
from memserve.hosts import bracketed, reachable_endpoint
from memserve.transfer.kv_link import PoolLink, Pushed, totals_of
from memserve.transfer.mempool import MemPool
from memserve.types import SHARED, InstanceId, Namespace, TokenArray
from memserve.vllm import pool_messages as m
from memserve.vllm.connector.sequence import Spaces, beside

log = logging.getLogger(__name__)

# Concurrent pushes of unfinished prompts: more would delay pushes that a request waits for.
MAX_EARLY_PUSHES = 4


@dataclass(slots=True)
class _Order:
    """An instance's order to push a prompt's KV to a peer while it is computed. `source`, `target`:
    salts here and at the peer."""

    peer: PoolPeer
    tokens: TokenArray
    source: str
    target: str
    ready: int = 0  # leading tokens that the index has
    space: Namespace = SHARED  # of these tokens in the index
    sent: int = 0  # blocks
    sending: asyncio.Task[None] | None = None
    begun: bool = False  # the task is past the semaphore


@dataclass(slots=True, eq=False)
class _Caller:
    """One connection, with its open orders and its unanswered calls by number."""

    writer: asyncio.StreamWriter
    orders: set[int] = field(default_factory=set)
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)


class PoolServer:
    """Serves the pool from `start` to `close`. The caller owns the pool."""

    def __init__(self, pool: MemPool, spaces: Spaces, path: Path) -> None:
        """`spaces`: the pool's namespaces. `path`: the socket's, in a directory that only this user
        can enter. Raises ConfigError if the socket cannot be bound, as for too long a path."""
        self._pool = pool
        self._spaces = spaces
        self._link: PoolLink | None = None
        self._endpoint = ""
        self._orders: dict[int, _Order] = {}
        self._callers: set[_Caller] = set()
        self._early = asyncio.Semaphore(MAX_EARLY_PUSHES)
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(str(path))
        except OSError as error:
            self._listener.close()
            raise ConfigError(f"{path} can be no socket ({error}); set TMPDIR") from error
        self._listener.listen()
        self._ending = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="pool-server", daemon=True)

    def start(self) -> None:
        """Accept callers. If the pool's thread for peers fails, the server ends and closes all
        connections."""
        self._thread.start()
        self._pool.on_failure(lambda error: self._soon(self._ending.set))

    def close(self) -> None:
        self._soon(self._ending.set)
        if self._thread.ident is not None:
            self._thread.join()

    def ready(self, order: int, tokens: TokenArray, namespace: Namespace) -> None:
        """Report that the pool's index has these leading tokens of a request that names the order.
        Called on vLLM's scheduling thread; ignored for an unknown order, or other tokens."""
        known = self._orders.get(order)
        if known is None or self._spaces.salt(namespace) != known.source:
            return
        size = min(len(tokens), len(known.tokens))
        if np.array_equal(tokens[:size], known.tokens[:size]):
            self._soon(lambda: self._go_on(order, size, namespace))

    def _soon(self, call: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(call)

    def _main(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._listener.close()
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_unix_server(self._connected, sock=self._listener)
        await self._ending.wait()
        server.close()
        for caller in self._callers:
            caller.writer.close()  # its reader then sees the end of the stream
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._link is not None:
            self._link.close()

    # --- calls ----------------------------------------------------------------------------

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caller = _Caller(writer)
        self._callers.add(caller)
        try:
            m.require_own(writer.get_extra_info("socket"))
            while True:
                size = m.body_bytes(await reader.readexactly(m.HEAD_BYTES))
                call = m.decode_call(await reader.readexactly(size))
                self._pool.vouch()  # the instance's event loop runs
                self._take(caller, call)
        except (OSError, EOFError, TransferError, msgspec.MsgspecError) as error:
            log.info("the instance has left the pool: %s", error or "it hung up")
        finally:
            self._callers.discard(caller)
            for task in caller.tasks.values():
                task.cancel()
            for order in caller.orders:
                self._withdraw(order)
            writer.close()

    def _take(self, caller: _Caller, call: m.Call) -> None:
        if isinstance(call.said, m.Cancel):
            task = caller.tasks.pop(call.said.number, None)
            if task is not None:
                task.cancel()
            return
        task = asyncio.ensure_future(self._answer(caller, call))
        caller.tasks[call.number] = task
        task.add_done_callback(lambda _: caller.tasks.pop(call.number, None))

    async def _answer(self, caller: _Caller, call: m.Call) -> None:
        heard: m.Heard
        try:
            heard = await self._do(caller, call.said)
        except PoolError as error:
            heard = m.Failed(str(error), of_pool=True)
        except (TransferError, ConfigError) as error:
            heard = m.Failed(str(error), of_pool=False)
        except Exception as error:
            log.exception("%s failed", type(call.said).__name__)
            heard = m.Failed(f"{type(error).__name__}: {error}", of_pool=False)
        caller.writer.write(m.frame(m.Reply(call.number, heard)))
        with suppress(ConnectionError):  # the caller has left
            await caller.writer.drain()

    async def _do(self, caller: _Caller, said: m.Said) -> m.Heard:
        match said:
            case m.Serve():
                return await asyncio.to_thread(self._serve_pool, said)
            case m.Count(tokens, namespace):
                space = self._spaces.of(namespace)
                return m.Counted(await self._served.cached(tokens, space))
            case m.Meet(peer):
                await self._served.meet(peer)
            case m.Reach(peer):
                return m.Reached(await self._served.transport(peer))
            case m.Watch(peer):
                return m.Lost(await self._served.until_lost(peer))
            case m.Push():
                pushed = await self._push(caller, said)
                return m.PushDone(pushed.sent, pushed.already_present)
            case m.Order(order, peer, tokens, source, target):
                await self._served.meet(peer)
                caller.orders.add(order)
                self._orders[order] = _Order(peer, tokens, source, target)
            case m.Withdraw(order):
                caller.orders.discard(order)
                self._withdraw(order)
            case m.Forget(namespace):
                self._served.forget(self._spaces.of(namespace))
            case m.ReadTotals():
                return m.Totals(await asyncio.to_thread(totals_of, self._pool))
        return m.Done()

    @property
    def _served(self) -> PoolLink:
        if self._link is None:
            raise TransferError("the pool is not served yet")
        return self._link

    def _serve_pool(self, said: m.Serve) -> m.Served:
        if self._link is None:
            endpoint = self._pool.serve(f"tcp://{bracketed(said.host)}:0", said.secret)
            self._endpoint = reachable_endpoint(endpoint)
            owner = InstanceId(self._pool.owner.instance)
            own = PoolPeer(owner, self._endpoint)
            self._link = PoolLink(self._pool, own, said.caching, said.mode)
        link = self._link
        instance = link.address.id
        return m.Served(instance, self._endpoint, link.kv, link.block_bytes, link.block_tokens)

    # --- pushes ---------------------------------------------------------------------------

    async def _push(self, caller: _Caller, said: m.Push) -> Pushed:
        caller.orders.discard(said.order)
        order = self._orders.pop(said.order, None)
        before = 0
        if order is not None:
            await _let_send(order)
            before = order.sent
        source = self._spaces.of(said.source)
        target = beside(source, said.target)
        pushed = await self._served.push(said.peer, said.tokens, source, target)
        return Pushed(before + pushed.sent, max(0, pushed.already_present - before))

    def _go_on(self, number: int, ready: int, space: Namespace) -> None:
        order = self._orders.get(number)
        if order is None:
            return
        order.ready, order.space = ready, space
        if order.sending is None or order.sending.done():
            order.begun = False
            order.sending = asyncio.ensure_future(self._send(order))

    async def _send(self, order: _Order) -> None:
        done = 0
        while order.ready > done:
            async with self._early:
                order.begun = True
                ready, space = order.ready, order.space
                target = beside(space, order.target)
                try:
                    pushed = await self._served.push(
                        order.peer, order.tokens[:ready], space, target
                    )
                except (TransferError, PoolError) as error:
                    # The final `Push` tries again, and reports the error.
                    log.info("KV did not reach %s early: %s", order.peer.id, error)
                    return
            order.sent += pushed.sent
            done, order.begun = ready, False

    def _withdraw(self, number: int) -> None:
        order = self._orders.pop(number, None)
        if order is not None and order.sending is not None:
            order.sending.cancel()


async def _let_send(order: _Order) -> None:
    """Wait for an order's running push; cancel one that still waits for the semaphore."""
    if order.sending is None:
        return
    if not order.begun:
        order.sending.cancel()
    try:
        await asyncio.wait((order.sending,))
    except asyncio.CancelledError:
        order.sending.cancel()
        raise


Ready = Callable[[int, TokenArray, Namespace], None]  # see `PoolServer.ready`


def tell_nobody(order: int, tokens: TokenArray, namespace: Namespace) -> None:
    """Do nothing: a `Ready` where no instance gives orders."""
