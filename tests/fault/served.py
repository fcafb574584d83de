"""What runs in the processes that these tests kill: an instance, or a gateway, as `memserve` runs
it, and beside it a thread that tells the test what no endpoint does.

Processes are forked from one that has imported everything, which takes a second and not ten.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from memserve.clock import MonotonicClock
from memserve.config import ClusterConfig, InstanceConfig
from memserve.engine.batch import StepPlan
from memserve.engine.runner import Runner
from memserve.engine.sampler import Sample
from memserve.gateway import run as gateway_run
from memserve.gateway.global_router import GlobalRouter
from memserve.instance import build
from memserve.instance.parts import Identity, Parts
from memserve.instance.run import run_instance
from memserve.models.tokenizer import Tokenizer
from memserve.pool.layout import KVLayout
from memserve.scheduler.prompt_tree import Prefix
from memserve.transfer.base import Transport
from memserve.transfer.mempool import MemPool
from memserve.transfer.shm import ShmTransport
from memserve.types import InstanceId, Owner, RequestId
from tests.faulty_transport import Fault, FaultyTransport, listed

CLONE_NEWNET, CLONE_NEWNS = 0x40000000, 0x00020000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
PATIENCE = 60.0
PEERS = ("prefill", "decode")  # names that a test asks for in `State.peers`
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Machine:
    """A network namespace to run in, with a /dev/shm that nobody else has."""

    namespace: str

    def enter(self) -> None:
        """Only before the process has threads that matter."""
        self.enter_network()
        _check(_libc.unshare(CLONE_NEWNS))
        _check(_libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
        _check(_libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=256m"))
        # Which devices there are, UCX reads there.
        _check(_libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None))

    def enter_network(self) -> None:
        """With this thread alone."""
        handle = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY)
        try:
            set_network(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True, slots=True)
class State:
    """An instance at one moment; its pool's integrity has been checked."""

    running: int
    waiting: int
    steps: int
    held: int  # blocks: active, pinned, detached
    matches: int
    outgoing: int  # transfers
    quarantined: int  # blocks
    granted: int
    blocks: int  # free and cached
    cached: int
    posted: int  # writes, by the transport that misbehaves
    peers: frozenset[str]  # whose pools are connected and heard

    @property
    def quiet(self) -> bool:
        """Nothing runs, and nobody holds a block."""
        work = self.running + self.waiting + self.matches + self.held
        return not work + self.outgoing + self.quarantined + self.granted


@dataclass(frozen=True, slots=True)
class InstanceProcess:
    """What an instance runs with. `faults`: of its first writes, one after the other."""

    name: str
    config: ClusterConfig
    settings: InstanceConfig
    faults: tuple[Fault | None, ...] = ()
    step_seconds: float = 0.0  # that a step of the engine takes longer
    join: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    machine: Machine | None = None


@dataclass(frozen=True, slots=True)
class GatewayProcess:
    name: str
    config: ClusterConfig
    members: tuple[str, ...] = ()
    machine: Machine | None = None


def serve(what: InstanceProcess | GatewayProcess, log_file: Path, answers: Connection) -> None:
    """The process. Says its URL through `answers`, and then what it is asked."""
    os.setsid()  # an interrupted test's signals are the test's
    output = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    form = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S", force=True)
    if what.machine is not None:
        what.machine.enter()
    url, ready_fd = os.pipe()
    if isinstance(what, InstanceProcess):
        answer, run = _instance(what, ready_fd)
    else:
        answer, run = _gateway(what, ready_fd)
    threading.Thread(target=_talk, args=(url, answers, answer), daemon=True).start()
    os._exit(run())


def _talk(url: int, answers: Connection, answer: Callable[[], Any]) -> None:
    with os.fdopen(url) as pipe:
        answers.send(pipe.readline().strip())
    while True:
        try:
            answers.recv()
        except EOFError:  # the test's process has ended
            os._exit(1)
        try:
            answers.send(answer())
        except AssertionError as error:
            answers.send(error)


def _instance(what: InstanceProcess, ready_fd: int) -> tuple[Callable[[], Any], Callable[[], int]]:
    os.environ.update(what.environment)
    if what.step_seconds:
        _slow_down(what.step_seconds)
    made: list[tuple[Parts, MemPool]] = []
    faulty: list[_Counted] = []

    def transports(owner: Owner, layout: KVLayout) -> Sequence[Transport]:
        faulty.append(_Counted(layout, what.faults))
        return faulty

    def build_parts(config: ClusterConfig, own: InstanceConfig, identity: Identity) -> Parts:
        with pytest.MonkeyPatch.context() as patch:
            if what.faults:
                patch.setattr(build, "MemPool", partial(MemPool, transports=transports))
            parts = build.build_parts(config, own, identity)
        pool = parts.engine.pool  # type: ignore[attr-defined]
        made.append((parts, pool))
        return parts

    def answer() -> State:
        ((parts, pool),) = made
        pool.check_integrity()
        engine, stats, peers = parts.engine.stats(), pool.stats(), pool.peer_stats()
        media = (stats.hbm, stats.dram)
        return State(
            running=engine.running,
            waiting=engine.waiting,
            steps=engine.steps,
            held=sum(medium.active + medium.pinned + medium.detached for medium in media),
            matches=stats.matches,
            outgoing=peers.outgoing,
            quarantined=peers.quarantined,
            granted=peers.granted,
            blocks=sum(medium.free + medium.cached for medium in media),
            cached=sum(medium.cached for medium in media),
            posted=sum(each.posts for each in faulty),
            peers=frozenset(filter(pool.hears, PEERS)),
        )

    def run() -> int:
        return run_instance(
            what.config,
            what.settings,
            InstanceId(what.name),
            join=what.join,
            ready_fd=ready_fd,
            build=build_parts,
        )

    return answer, run


def _slow_down(seconds: float) -> None:
    """For good: the process has one engine."""
    run = Runner.run

    def slowly(self: Runner, plan: StepPlan) -> dict[RequestId, Sample]:
        time.sleep(seconds)
        return run(self, plan)

    Runner.run = slowly  # type: ignore[method-assign]


class _Counted(FaultyTransport):
    def __init__(self, layout: KVLayout, faults: Sequence[Fault | None]) -> None:
        self.posts = 0

        def plan(number: int) -> Fault | None:
            self.posts = number + 1
            return listed(*faults)(number)

        super().__init__(ShmTransport(layout), plan, MonotonicClock())


def _gateway(what: GatewayProcess, ready_fd: int) -> tuple[Callable[[], Any], Callable[[], int]]:
    routers: list[_Watched] = []

    class _Watched(GlobalRouter):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.loop = asyncio.get_running_loop()
            routers.append(self)

        async def held(self) -> dict[str, set[Prefix]]:
            return {str(each): self.tree.held(each) for each in self.tree.instances}

    def answer() -> dict[str, set[Prefix]]:
        (router,) = routers
        return asyncio.run_coroutine_threadsafe(router.held(), router.loop).result(PATIENCE)

    def run() -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gateway_run, "GlobalRouter", _Watched)
            tokenizer = Tokenizer.load(Path(what.config.model.path))
            return gateway_run.run_gateway(what.config, what.members, tokenizer, ready_fd=ready_fd)

    return answer, run


def set_network(handle: int) -> None:
    """Move this thread into a network namespace."""
    _check(_libc.setns(handle, CLONE_NEWNET))


def _check(code: int) -> None:
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
