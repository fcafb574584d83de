"""A gateway and three instances with a model, each a process of its own: what becomes of KV."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from memserve.api.control import InstanceChange, WantedState
from memserve.api.status import InstanceState
from memserve.cluster.client import ClusterClient
from memserve.errors import ClusterError, ConfigError
from memserve.pool.segment import SHM_DIRECTORY
from memserve.types import MAX_BLOCKS, Role
from tests.fault.campaign import WHOLE_SECONDS, Broken
from tests.fault.conftest import Expected
from tests.fault.garbage import listening, sip, throw
from tests.fault.load import Question
from tests.fault.processes import Client, Processes, Served
from tests.handoff_harness import prompt_of

T = TypeVar("T")
ROLES = {"prefill-0": Role.PREFILL, "decode-1": Role.DECODE, "colocated-2": Role.COLOCATED}
# Less than what is asked for: blocks go to DRAM and for good; a step is slow enough to be met.
SMALL: dict[str, Any] = {"hbm_blocks": 64, "dram_blocks": 24, "step_seconds": 0.003}
SHARED = prompt_of(64, seed=900)
TOKENS = 16
# A pool of 200 GB, which a smaller /dev/shm refuses before it allocates anything.
TOO_MANY_BLOCKS = MAX_BLOCKS - 1
BLOCK_BYTES = 12 * 1024  # of the tiny model


def ask(url: str, work: Callable[[ClusterClient], Awaitable[T]]) -> T:
    """Something of the gateway's `/cluster`. Raises ClusterError."""

    async def run() -> T:
        async with ClusterClient(url) as client:
            return await work(client)

    return asyncio.run(run())


def ready_members(url: str) -> dict[str, int | None]:
    """Pids of instances that the gateway finds ready; none where no gateway answers."""
    try:
        view = ask(url, lambda client: client.view())
    except (ClusterError, ConfigError):
        return {}
    return {str(m.id): m.pid for m in view.instances if m.state is InstanceState.READY}


class MembersWorld:
    """See `campaign.World`."""

    name = "members"
    cutting = frozenset({"gateway killed", "gateway and instance killed"})

    def __init__(self, make: Callable[[], Processes], expected: Expected) -> None:
        self._make = make
        self._expected = expected
        self.kinds: dict[str, Callable[[random.Random], str]] = {
            "instance killed": self._kill_instance,
            "instance stopped": self._stop_instance,
            "role changed": self._change_role,
            "drained": self._drain,
            "gateway killed": self._kill_gateway,
            "gateway stopped": self._stop_gateway,
            "gateway and instance killed": self._kill_both,
            "hang-ups": self._hang_up,
            "slow readers": self._sip,
            "garbage at every port": self._throw,
        }
        room = os.statvfs(SHM_DIRECTORY)
        if room.f_blocks * room.f_frsize < TOO_MANY_BLOCKS * BLOCK_BYTES:
            self.kinds["no room in /dev/shm"] = self._no_room

    @property
    def url(self) -> str:
        return self._gateway.url

    def start(self) -> None:
        self._running = self._make()
        self._gateway = self._running.gateway(policy="prompt-tree")
        self._port = urlsplit(self._gateway.url).port
        started = {name: self._instance(name) for name in ROLES}
        self._instances = {name: each.begun() for name, each in started.items()}

    def end(self, *, kill: bool = False) -> None:
        self._running.end()  # by SIGKILL in any case

    def questions(self) -> Sequence[Question]:
        """Prompts of several lengths, half of them with a common prefix."""
        prompts = [
            (SHARED if number % 2 else []) + prompt_of(20 + 17 * number, seed=number)
            for number in range(12)
        ]
        return [Question(prompt, self._expected(prompt, TOKENS)) for prompt in prompts]

    def processes(self) -> dict[str, int]:
        return {each.name: each.pid for each in (self._gateway, *self._instances.values())}

    def until_whole(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        wanted = {name: each.pid for name, each in self._instances.items()}
        while (found := ready_members(self.url)) != wanted:
            if time.monotonic() > end:
                raise Broken(f"ready after {seconds:g} s: {found}, and not {wanted}")
            time.sleep(0.02)

    def leaks(self, seconds: float) -> dict[str, int]:
        """Blocks, and sequences; the pools' integrity is checked."""
        end = time.monotonic() + seconds
        found: dict[str, int] = {}
        for name, each in self._instances.items():
            while True:
                try:
                    state = each.state
                except AssertionError as error:
                    raise Broken(f"{name}: {error}") from error
                if state.quiet or time.monotonic() > end:
                    break
                time.sleep(0.02)
            found[name] = 0 if state.quiet else max(1, state.held + state.quarantined)
        return found

    def _instance(self, name: str, **settings: Any) -> Served:
        return self._running.instance(
            ROLES[name], name, join=[self._gateway.url], **{**SMALL, **settings}
        )

    def _replace(self, name: str) -> None:
        old = self._instances[name]
        old.kill()
        self._running.running.remove(old)
        self._instances[name] = self._instance(name)

    def _kill_instance(self, source: random.Random) -> str:
        name = source.choice(sorted(ROLES))
        self._replace(name)
        self._instances[name].begun()
        return f"SIGKILL of {name}"

    def _stop_instance(self, source: random.Random) -> str:
        name = source.choice(sorted(ROLES))
        seconds = round(source.choice((0.05, 0.5, source.uniform(1, 8))), 2)
        self._stop(self._instances[name], seconds)
        return f"SIGSTOP of {name} for {seconds:g} s"

    def _change_role(self, source: random.Random) -> str:
        name = source.choice(sorted(ROLES))
        role = source.choice([each for each in Role if each is not ROLES[name]])
        self._change(name, InstanceChange(role=role))
        time.sleep(source.uniform(0.1, 1.0))
        self._change(name, InstanceChange(role=ROLES[name]))
        return f"{name} was {role} for a while"

    def _drain(self, source: random.Random) -> str:
        name = source.choice(sorted(ROLES))
        self._change(name, InstanceChange(state=WantedState.DRAINING))
        time.sleep(source.uniform(0.1, 1.0))
        self._change(name, InstanceChange(state=WantedState.READY))
        return f"{name} drained for a while"

    def _kill_gateway(self, source: random.Random) -> str:
        time.sleep(source.uniform(0, 0.2))
        self._gateway.kill()
        self._running.running.remove(self._gateway)
        time.sleep(source.choice((0.0, 1.0)))
        assert self._port is not None
        self._gateway = self._running.gateway(policy="prompt-tree", port=self._port)
        return "SIGKILL of the gateway"

    def _stop_gateway(self, source: random.Random) -> str:
        seconds = round(source.uniform(0.1, 4.0), 2)
        self._stop(self._gateway, seconds)
        return f"SIGSTOP of the gateway for {seconds:g} s"

    def _kill_both(self, source: random.Random) -> str:
        name = source.choice(sorted(ROLES))
        self._instances[name].kill()
        self._kill_gateway(source)
        self._running.running.remove(self._instances[name])
        self._instances[name] = self._instance(name).begun()
        return f"SIGKILL of the gateway and {name}"

    def _hang_up(self, source: random.Random) -> str:
        clients = [Client(self._gateway, SHARED + prompt_of(40, seed=n), 60) for n in range(12)]
        for client in clients:
            client.wait(source.randrange(0, 20))
            if client.error is None:
                client.leave()
        return "12 clients left their streams"

    def _sip(self, source: random.Random) -> str:
        sip(self.url, SHARED, readers=8, seconds=source.uniform(0.5, 2))
        return "8 clients hardly read, and left"

    def _throw(self, source: random.Random) -> str:
        ports = [port for pid in self.processes().values() for port in listening(pid)]
        throw(ports, source)
        return f"garbage at {len(ports)} ports"

    def _no_room(self, source: random.Random) -> str:
        """An instance whose pool does not fit ends by itself, and nothing else does."""
        late = self._running.instance(
            Role.COLOCATED, "late", join=[self.url], hbm_blocks=TOO_MANY_BLOCKS
        )
        late._process.join(WHOLE_SECONDS)
        if late._process.exitcode is None:
            raise Broken("an instance that has no room for its pool does not end")
        said = late.log_file.read_text()
        if "shared memory" not in said:
            raise Broken(f"an instance that has no room does not say so: {said[-300:]}")
        late.kill()
        self._running.running.remove(late)
        return f"an instance of {TOO_MANY_BLOCKS} blocks was started, and ended"

    def _stop(self, served: Served, seconds: float) -> None:
        served.signal(signal.SIGSTOP)
        time.sleep(seconds)
        served.signal(signal.SIGCONT)

    def _change(self, name: str, wanted: InstanceChange) -> None:
        try:
            ask(self.url, lambda client: client.change(name, wanted))
        except ClusterError as error:
            raise Broken(f"{name} does not change: {error}") from error
