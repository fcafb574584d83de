"""The transfer thread of a pool: owns its sockets, transports and sessions. Errors of single
messages and tasks are counted and logged; an error that ends the thread goes to `on_failure`."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from time import sleep
from typing import TypeVar

from memserve.clock import Clock
from memserve.errors import TransferError, TransferTimeout
from memserve.transfer.base import Transport, TransportCounters
from memserve.transfer.handshake import Counters, Dialled
from memserve.transfer.messages import Failure
from memserve.transfer.peer_endpoint import PeerEndpoint
from memserve.transfer.peers import PeerSession
from memserve.transfer.regions import PathName
from memserve.transfer.secret import ClusterKeys
from memserve.transfer.session import HEARTBEAT, LEASE, RETRY_FIRST, Lease
from memserve.transfer.shared_pool import SharedPool
from memserve.transfer.sockets import PoolSockets
from memserve.transfer.wire import Bye
from memserve.types import InstanceId, Owner

log = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds. TICK: interval of timer checks, a fifth of the shortest retry. CONNECT_TIMEOUT: for the
# first answer of a dialled peer, one LEASE as for any silent peer. CALL_TIMEOUT: for an answer of
# the transfer thread to another thread; longer than a LEASE, so that the caller of a silent peer
# gets PeerLost first. CLOSE_TIMEOUT: for cancelled writes to drain in `close`.
TICK = RETRY_FIRST / 5
CONNECT_TIMEOUT = LEASE
CALL_TIMEOUT = 2 * LEASE
CLOSE_TIMEOUT = 2.0


class Service:
    """Runs a `PeerEndpoint`. Methods may be called from any thread."""

    def __init__(
        self,
        pool: SharedPool,
        transports: list[Transport],
        path: PathName,
        keys: ClusterKeys | None,
        clock: Clock,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """`on_failure`: called on the transfer thread with the error that ends it."""
        self._pool = pool
        self._on_failure = on_failure
        self._now = clock.now
        # `path="nixl"` also disables the Unix socket.
        self._sockets = PoolSockets(keys, unix=path != "nixl")
        self._endpoint = PeerEndpoint(pool, self._sockets, transports, path)
        self._transports = transports
        self._tasks: deque[Callable[[], None]] = deque()
        # Held by the thread that runs the endpoint; free while the transfer thread waits for
        # messages.
        self._endpoint_lock = threading.Lock()
        self._running = True
        self._thread = threading.Thread(
            target=self._run, name=f"memserve-transfer-{pool.owner.instance}", daemon=True
        )
        self._thread.start()

    @property
    def thread(self) -> threading.Thread:
        """The transfer thread; it runs until `close`, unless it fails."""
        return self._thread

    @property
    def counters(self) -> Counters:
        return self._endpoint.counters

    @property
    def quarantined_blocks(self) -> int:
        """Number of blocks that are not reused, because a peer may still write to them."""
        return self._endpoint.receiver.quarantined_blocks

    def link_counters(self) -> dict[str, TransportCounters]:
        """Return the counters of each transport, by name; the transfer thread changes them."""
        return {transport.name: transport.counters for transport in tuple(self._transports)}

    def life(self, instance: InstanceId) -> PeerSession:
        """Return the current life of a peer. Raises UnknownPeer."""
        return self._endpoint.peers.current(instance)

    def heard_life(self, instance: InstanceId) -> Owner | None:
        """Return the life of a peer that is connected, was heard within a LEASE and is not
        stalled; else None."""
        peer = self._endpoint.peers.get(instance)
        life = None if peer is None else peer.life
        return None if life is None or life.lost else life.owner

    def lease(self, owner: Owner) -> Lease:
        return self._endpoint.table.lease(owner, self._now())

    # --- calls ----------------------------------------------------------------------------

    def submit(self, task: Callable[[PeerEndpoint, float], None]) -> None:
        """Queue `task` for the transfer thread. Raises TransferError if that thread has ended."""
        if not self._running:
            raise TransferError(f"the transfer thread of {self._pool.owner.instance!r} has ended")
        self._tasks.append(lambda: task(self._endpoint, self._now()))
        self._sockets.wake()

    def run(self, task: Callable[[PeerEndpoint, float], None]) -> None:
        """Run `task` on the calling thread if the transfer thread is waiting for messages (to wake
        it takes longer than the task), otherwise as `submit`. Only for tasks that neither post
        writes nor answer messages: the transfer thread may sleep until the next heartbeat."""
        if self._endpoint_lock.acquire(blocking=False):
            try:
                if self._running and not self._tasks:  # tasks run in the order of the calls
                    task(self._endpoint, self._now())
                    return
            finally:
                self._endpoint_lock.release()
        self.submit(task)

    def ask(self, question: Callable[[PeerEndpoint, float], T]) -> T:
        """Run `question` on the transfer thread; return its result, or raise its error."""
        answer: Future[T] = Future()

        def task(endpoint: PeerEndpoint, now: float) -> None:
            try:
                answer.set_result(question(endpoint, now))
            except Exception as error:  # noqa: BLE001 - the asking thread raises it
                answer.set_exception(error)

        self.submit(task)
        return self.wait(answer)

    def wait(self, answer: Future[T]) -> T:
        """Return the result of `answer`. Raises its error; TransferTimeout after CALL_TIMEOUT."""
        try:
            return answer.result(CALL_TIMEOUT)
        except TimeoutError as error:
            if answer.done():
                raise
            raise TransferTimeout(f"no answer within {CALL_TIMEOUT:g} s") from error

    def listen(self, address: str) -> str:
        return self.ask(lambda endpoint, now: self._sockets.listen(address))

    def connect(self, instance: InstanceId, address: str) -> Owner:
        """Connect to a peer; return its life. Raises PeerLost, PeerRefused, LayoutMismatch,
        TransferError."""
        outcome: Future[Owner] = Future()

        def task(endpoint: PeerEndpoint, now: float) -> None:
            dealer = self._sockets.dial(address)
            gives_up_at = now + CONNECT_TIMEOUT
            endpoint.handshakes.dialler.begin(Dialled(instance, dealer, outcome, gives_up_at))

        self.ask(task)
        return self.wait(outcome)

    def close(self) -> None:
        """Cancel the transfers, say Bye to the peers, and end the thread."""
        if self._running:
            self.submit(lambda endpoint, now: self._stop())
        self._thread.join()

    # --- the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            try:
                self._serve()
            finally:
                with self._endpoint_lock:
                    self._running = False
                    self._tear_down()
        except BaseException as error:  # `on_failure` must hear of every end, also SystemExit
            name = self._pool.owner.instance
            log.critical("the transfer thread of %r has failed", name, exc_info=True)
            self._on_failure(error)

    def _serve(self) -> None:
        beat_at = tick_at = self._now()
        endpoint = self._endpoint
        self._sockets.adopt()
        while self._running:
            arrivals = self._sockets.poll(self._pause(beat_at, tick_at))
            with self._endpoint_lock:
                for arrival in arrivals:
                    endpoint.on_arrival(arrival, self._now())
                while self._tasks:
                    self._carry_out(self._tasks.popleft())
                now = self._now()
                endpoint.poll_transports(now)
                if now >= tick_at:
                    endpoint.on_tick(now)
                    tick_at = now + TICK
                if now >= beat_at:
                    endpoint.on_beat(now)
                    beat_at = now + HEARTBEAT
        with self._endpoint_lock:
            self._farewell()

    def _carry_out(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception:  # noqa: BLE001 - the task's caller times out; other transfers continue
            self._endpoint.report("a local call failed on the transfer thread")

    def _pause(self, beat_at: float, tick_at: float) -> float:
        """Return the seconds to wait for messages; 0 while writes are in flight."""
        endpoint = self._endpoint
        interval = endpoint.peers.poll_interval
        if interval is not None:
            if interval and not self._tasks:
                sleep(min(interval, TICK))
            return 0.0
        until = min(beat_at, tick_at) if endpoint.busy else beat_at
        return max(0.0, until - self._now())

    def _tear_down(self) -> None:
        endpoint = self._endpoint
        for outgoing in endpoint.sender.all:
            if not outgoing.handle.done:
                outgoing.handle.fail(TransferError("the pool was closed"))
            endpoint.sender.release(outgoing.session)
        endpoint.handshakes.dialler.abandon()
        self._sockets.close()
        for transport in self._transports:
            transport.close()

    def _stop(self) -> None:
        self._running = False

    def _farewell(self) -> None:
        """Abort outgoing transfers, wait up to CLOSE_TIMEOUT for their writes to drain, and say
        Bye if they did: peers may then free every block that this pool could write to."""
        endpoint = self._endpoint
        end = self._now() + CLOSE_TIMEOUT
        for outgoing in endpoint.sender.all:
            failure = Failure("TransferCancelled", "the pool was closed")
            endpoint.act(outgoing, outgoing.session.fail(failure, self._now()), self._now())
        while endpoint.peers.poll_interval is not None and self._now() < end:
            endpoint.poll_transports(self._now())
        if endpoint.peers.poll_interval is None:
            endpoint.say_to_all(Bye())
