"""The gateway process: wires up its parts, serves, drains and ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import Callable, Sequence
from functools import partial

import uvloop

from memserve.api.api_keys import load_keys
from memserve.api.control import MAX_CONTROL_BYTES
from memserve.api.http_limits import HttpCounters
from memserve.api.http_server import HttpServer
from memserve.api.peer_client import PeerClient
from memserve.api.serving import (
    BACKLOG,
    CLOSE_SECONDS,
    Shutdown,
    announce,
    bind,
    on_reload,
    serve_http,
    url_of,
)
from memserve.api.signatures import Signer
from memserve.api.status import MemberKind
from memserve.api.tls import client_tls, server_tls
from memserve.api.trace_metrics import TraceMetrics
from memserve.clock import Clock, MonotonicClock
from memserve.cluster.member import Member
from memserve.cluster.membership import Change, MemberChange, Membership
from memserve.cluster.poller import Poller
from memserve.config import ClusterConfig, available_cores
from memserve.errors import ClusterError, ConfigError
from memserve.gateway.access import Access
from memserve.gateway.admin import Troubles
from memserve.gateway.app import GatewayApp
from memserve.gateway.call_builder import CallBuilder
from memserve.gateway.forward_builder import ForwardBuilder
from memserve.gateway.global_router import GlobalRouter
from memserve.gateway.handover_proof import HandoverProof
from memserve.gateway.metrics import EdgeMetrics
from memserve.gateway.model_formats import formats_of
from memserve.gateway.planning import PlannerBoard
from memserve.gateway.prefixes import prefix_routes
from memserve.gateway.relay import Relay
from memserve.gateway.response_store import ResponseStore
from memserve.gateway.responses import Responses
from memserve.gateway.siblings import MEET_SECONDS, Siblings
from memserve.gateway.tokenization import Tokenization
from memserve.gateway.upstream import Upstream
from memserve.gateway.workers import LOOPBACK, WorkerPlace
from memserve.hosts import is_loopback
from memserve.models.tokenizer import Tokenizer
from memserve.secrets import cluster_secret, forget_secret, require_secret
from memserve.tracing.settings import open_tracer
from memserve.tracing.span import Tracer
from memserve.vital import Vitals

log = logging.getLogger(__name__)

# For the errors to requests that still run after the drain to reach their clients.
STOP_SECONDS = 2.0


def run_gateway(
    config: ClusterConfig,
    members: Sequence[str],
    tokenizer: Tokenizer,
    *,
    worker: WorkerPlace | None = None,
    reserved: bool = False,
    ready_fd: int | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT; return the process's exit code. This runs one gateway, with
    `worker` one of several on its port; `config.gateway.workers` is for `run_workers`.
    `reserved`: the parent process has reserved the port (`ReservedPort`).

    `members` are the URLs of instances; more may join. The gateway's own URL goes, as one
    line, to `ready_fd` (closed then) or to standard output, as soon as clients can connect.

    Raises ConfigError if other machines can reach the address and no shared secret is set.
    """

    secret = cluster_secret()
    require_secret(secret, config.gateway.host)

    def listen() -> socket.socket:
        shared = reserved or worker is not None
        sock = _bound(config.gateway.host, config.gateway.port, shared=shared)
        if secret.local:
            forget_secret(sock.getsockname()[1])
        announce(url_of(sock, tls=config.security.tls_cert is not None), ready_fd)
        return sock

    try:
        if worker is None:
            sock = listen()  # from here on clients can connect, and wait
            name = url_of(sock).partition("//")[2]
            with open_tracer(config.traces, "memserve-gateway", name) as tracer:
                _begin()
                return uvloop.run(_alone(config, members, tokenizer, sock, tracer))
        sock = _bound(LOOPBACK, worker.port, shared=True)
        with open_tracer(config.traces, "memserve-gateway", f"worker-{worker.index}") as tracer:
            _begin()
            serving = _with_siblings(config, members, tokenizer, worker, sock, listen, tracer)
            return uvloop.run(serving)
    except ClusterError as error:
        log.error("%s", error)
        return 1


def _begin() -> None:
    _spare_the_log()
    _spare_the_collector()


def _bound(host: str, port: int, *, shared: bool) -> socket.socket:
    try:
        return bind(host, port, shared=shared)
    except OSError as error:
        raise ClusterError(f"{host}:{port}: {error.strerror}") from error


def _spare_the_log() -> None:
    """Turn off the logging module's look-ups of the caller's source line and of process, thread
    and task names, which no log format here shows. They are half of the cost of a request's line
    (Python's "Logging HOWTO", Optimization)."""
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def _spare_the_collector() -> None:
    """Exempt present objects from garbage collection, and collect less often: requests make
    hardly any cycles. At the default thresholds, collections would take a tenth of the CPU, in
    pauses as long as the gap between chunks."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


async def _alone(
    config: ClusterConfig,
    members: Sequence[str],
    tokenizer: Tokenizer,
    sock: socket.socket,
    tracer: Tracer | None,
) -> int:
    shutdown = Shutdown()
    shutdown.on_signals()
    async with Gateway(config, tokenizer, tracer=tracer) as gateway:
        gateway.reload_on_signal()
        for address in members:
            gateway.membership.join(address)
        return await gateway.serve(sock, shutdown)


async def _with_siblings(
    config: ClusterConfig,
    members: Sequence[str],
    tokenizer: Tokenizer,
    worker: WorkerPlace,
    private: socket.socket,
    listen: Callable[[], socket.socket],
    tracer: Tracer | None,
) -> int:
    shutdown = Shutdown()
    shutdown.on_signals()
    async with Gateway(config, tokenizer, worker, tracer) as gateway:
        gateway.reload_on_signal()
        for address in members:
            gateway.membership.join(address)
        await gateway.hear_siblings(private)
        await shutdown.wait_for(gateway.meet_members(), MEET_SECONDS)
        if shutdown.requested.is_set():
            return 0
        return await gateway.serve(listen(), shutdown)


class Gateway:
    """A gateway, with its connections to instances and its background tasks."""

    def __init__(
        self,
        config: ClusterConfig,
        tokenizer: Tokenizer,
        worker: WorkerPlace | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """`worker`: set if the gateway is one of several workers on the port. `tracer`: None
        unless requests are traced."""
        clock = MonotonicClock()
        self.vitals = Vitals()
        self.membership = Membership(self._lost)
        self._config = config.gateway
        secret = cluster_secret()
        keys = load_keys(config.gateway.api_keys, config.gateway.api_keys_file)
        if not keys.wanted and not is_loopback(config.gateway.host):
            log.warning("anybody who reaches %s may ask: no API keys", config.gateway.host)
        self._access = Access(
            keys,
            secret,
            config.gateway.cors_origins,
            config.gateway.metrics_secret,
            config.gateway.advertise,
        )
        self._tls = server_tls(config.security.tls_cert, config.security.tls_key)
        authorities = client_tls(config.security.tls_ca)
        signer = Signer(secret)
        self._peers = PeerClient(signer, authorities)
        self._upstream = Upstream(signer, authorities)
        self._counters = HttpCounters()
        self._max_body_bytes = config.gateway.max_body_bytes
        wait = config.gateway.instance_wait_seconds
        self._router = GlobalRouter(
            self.membership, self._peers, clock, config.gateway.policy, wait, self.vitals
        )
        self._relay = Relay(self._upstream, self.membership, self._router.plan, clock, wait)
        model = config.model.served_name or config.model.path
        formats = formats_of(config.model, tokenizer)
        self._calls = CallBuilder(tokenizer, model, available_cores(), formats, self._only_servers)
        self._proof = HandoverProof(self.membership, self._peers, clock, model, self.vitals)
        self._proving: asyncio.Task[None] | None = None
        self._router.queue.grant(self._access.grants())
        self._siblings: Siblings | None = None
        if worker is not None:
            self._siblings = Siblings(self._peers, worker.index, worker.siblings)
        self._private: HttpServer | None = None
        self._app = self._make_app(config, tokenizer, clock, tracer)

    def _make_app(
        self, config: ClusterConfig, tokenizer: Tokenizer, clock: Clock, tracer: Tracer | None
    ) -> GatewayApp:
        forwards = ForwardBuilder(self._calls, tokenizer)
        responses = Responses(
            self._calls,
            forwards,
            self.membership,
            self._access,
            ResponseStore(config.gateway.response_store_bytes),
            self._siblings,
        )
        return GatewayApp(
            self._calls,
            self.membership,
            self._relay,
            clock,
            self._router.queue,
            self._router.decisions,
            (
                self._router.metrics,
                EdgeMetrics(self._counters, self._access, self.vitals),
                self._proof,
                TraceMetrics(None if tracer is None else tracer.counts),
            ),
            config.gateway.instance_wait_seconds,
            self._access,
            self._peers,
            forwards,
            config.gateway.access_log,
            self._siblings,
            Troubles(self._proof.degraded, self._router.feed.members),
            tracer,
            responses=responses,
            tokenization=Tokenization(self._calls, tokenizer),
            planning=PlannerBoard(self._router.load, clock),
            policy=config.gateway.policy,
            max_body_bytes=self._max_body_bytes,
            more=partial(prefix_routes, self._router.tree, clock, tokenizer),
        )

    async def __aenter__(self) -> Gateway:
        self.membership.on_change(self._changed)
        poller = Poller(self.membership, self._peers, self.vitals)
        self._polling = self.vitals.task("poller", poller.run())
        if self._config.prove_handover:
            self._proving = self.vitals.task("hand-over proofs", self._proof.run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self.vitals.close()
        if self._private is not None:
            await self._private.close(CLOSE_SECONDS)
        tasks = [task for task in (self._polling, self._proving) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._calls.close()
        self._upstream.close()
        await self._router.close()
        await self._peers.close()

    async def hear_siblings(self, sock: socket.socket) -> None:
        """Answer the other workers on `sock`, until the gateway ends."""
        self._access.audience.add_socket(sock)
        self._private = HttpServer(self._app.handle_sibling, MAX_CONTROL_BYTES)
        await self._private.start(sock, BACKLOG)

    async def meet_members(self) -> None:
        """Join the members that sibling workers know. Return when those that are ready at a
        sibling are ready here, too."""
        if self._siblings is None:
            return
        ready = set()
        for address, is_ready in await self._siblings.members():
            self.membership.join(address, lasting=False)
            if is_ready:
                ready.add(address)
        changed = asyncio.Event()
        unfollow = self.membership.on_change(lambda change: changed.set())
        try:
            while not ready <= {member.address for member in self.membership.ready()}:
                changed.clear()
                await changed.wait()
        finally:
            unfollow()

    async def serve(self, sock: socket.socket, shutdown: Shutdown) -> int:
        """Serve until the shutdown is requested and running requests have ended. Return the
        process's exit code: 1 if a vital task has failed, else 0."""

        self._access.audience.add_socket(sock)

        async def end_when_failing() -> None:
            await self.vitals.failed.wait()
            if not shutdown.requested.is_set():
                shutdown.request()

        async def drain() -> None:
            log.info("the gateway drains")
            self._app.drain()
            if not await shutdown.wait_for(self._app.idle(), self._config.drain_seconds):
                log.warning("the gateway ends with requests still running")
                self._router.queue.stop()
                self._relay.stop()
                await shutdown.wait_for(self._app.idle(), STOP_SECONDS)

        failing = asyncio.ensure_future(end_when_failing())
        try:
            await serve_http(
                self._app.handle,
                sock,
                shutdown,
                drain,
                self._max_body_bytes,
                tls=self._tls,
                counters=self._counters,
                admit=self._access.turns_away,
            )
        finally:
            failing.cancel()
        return 1 if self.vitals.failed.is_set() else 0

    def reload_on_signal(self) -> None:
        """Reload the API keys on SIGHUP from now on. Only in a process's main thread."""
        on_reload(self._reload_keys)

    def _only_servers(self) -> bool:
        has = self.membership.has
        return has(MemberKind.VLLM) and not has(MemberKind.MEMSERVE)

    def _lost(self, member: Member) -> None:
        self._relay.instance_lost(member)

    def _changed(self, change: MemberChange) -> None:
        if change.change in (Change.LEFT, Change.DIED):
            self._upstream.forget(change.address)

    def _reload_keys(self) -> None:
        """Replace all API keys by those of the configuration; keep them if it cannot be read."""
        try:
            self._access.keys = load_keys(self._config.api_keys, self._config.api_keys_file)
        except ConfigError as error:
            log.error("the API keys stay as they were: %s", error)
        else:
            self._router.queue.grant(self._access.grants())
            log.info("%d API keys", len(self._access.keys))
