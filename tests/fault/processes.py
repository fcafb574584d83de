"""Instances and gateways as processes that are killed and stopped, and clients that keep time."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from memserve.api.kv_events import SNAPSHOT_PATH, KVSnapshot
from memserve.config import (
    CacheConfig,
    ClusterConfig,
    GatewayConfig,
    InstanceConfig,
    ModelConfig,
    Policy,
    TransferMode,
)
from memserve.pool.segment import sweep
from memserve.radix import block_digests
from memserve.scheduler.prompt_tree import Prefix
from memserve.types import Role
from tests.fault.served import GatewayProcess, InstanceProcess, Machine, State, serve, set_network
from tests.faulty_transport import Fault
from tests.insider import ask

# Much longer than anything takes, leases included: a test that gets there has failed.
PATIENCE = 60.0
_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(["tests.fault.served", "tests.fault.preloaded"])
_snapshots = msgspec.msgpack.Decoder(KVSnapshot)


def until(condition: Callable[[], bool], what: str) -> float:
    """Wait for it; the seconds that took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + PATIENCE, f"never came: {what}"
        time.sleep(0.01)
    return time.monotonic() - begin


def get(url: str) -> Any:
    """What a gateway or an instance tells those who have the secret."""
    parts = urlsplit(url)
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    answer = ask(f"http://{parts.netloc}", path)
    assert answer.status == 200, answer.text
    return answer.json


class Served:
    """A process that serves. Owned by `Processes`."""

    def __init__(self, what: InstanceProcess | GatewayProcess, log_file: Path) -> None:
        self.name = what.name
        self.log_file = log_file
        self._answers, theirs = _forking.Pipe()
        self._process: BaseProcess = _forking.Process(target=serve, args=(what, log_file, theirs))
        self._process.start()
        theirs.close()

    def begun(self) -> Served:
        """Waits until it listens."""
        self.url: str = _answer(self._answers)
        assert self._process.pid is not None
        self.pid = self._process.pid
        return self

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)
        if number is signal.SIGKILL:
            self._process.join(PATIENCE)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(PATIENCE)
        self._answers.close()

    @property
    def state(self) -> State:
        """Of an instance."""
        state: State = self._ask()
        return state

    @property
    def quiet(self) -> bool:
        return self.state.quiet

    @property
    def trees(self) -> dict[str, set[Prefix]]:
        """What a gateway's trees have."""
        held: dict[str, set[Prefix]] = self._ask()
        return held

    @property
    def stats(self) -> Any:
        return get(f"{self.url}/stats")

    @property
    def life(self) -> tuple[int, int]:
        """Process and epoch of an instance."""
        info = get(f"{self.url}/info")
        return info["pid"], info["epoch"]

    @property
    def indexed(self) -> set[Prefix]:
        """What an instance's index has, by its own word."""
        snapshot = _snapshots.decode(ask(self.url, SNAPSHOT_PATH).text)
        found: set[Prefix] = set()
        digests: dict[int | None, bytes] = {None: b""}
        for run in snapshot.blocks:
            chain = block_digests(run.tokens, 4 * snapshot.block_tokens, digests[run.parent])
            digests.update(zip([int(each) for each in run.hashes], chain, strict=True))
            found.update((run.namespace, digest) for digest in chain)
        return found

    def _ask(self) -> Any:
        self._answers.send(None)
        answer = _answer(self._answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _answer(answers: Connection) -> Any:
    assert answers.poll(PATIENCE), "the process does not answer"
    return answers.recv()


@dataclass
class Processes:
    """Everything is ended with the test."""

    model: Path
    directory: Path  # of logs
    running: list[Served] = field(default_factory=list)

    def instance(
        self,
        role: Role,
        name: str,
        *faults: Fault | None,
        mode: TransferMode = "by-request-agg",
        step_seconds: float = 0.0,
        join: Sequence[str] = (),
        environment: tuple[tuple[str, str], ...] = (),
        machine: Machine | None = None,
        **settings: Any,
    ) -> Served:
        """Begins to start; `gateway` waits for it. `settings`: of `InstanceConfig`."""
        sizes = {"threads": 1, "hbm_blocks": 160, "dram_blocks": 16, "profile": "off"}
        config = self._config(CacheConfig(mode=mode))
        own = InstanceConfig(role=role, **{**sizes, **settings})
        return self._start(
            InstanceProcess(
                name, config, own, faults, step_seconds, tuple(join), environment, machine
            )
        )

    def gateway(
        self,
        *instances: Served,
        policy: Policy = "round-robin",
        port: int = 0,
        host: str = "127.0.0.1",
        machine: Machine | None = None,
        instance_wait: float = 30.0,
    ) -> Served:
        """In front of these instances, or of any that join."""
        urls = tuple(each.begun().url for each in instances)
        own = GatewayConfig(
            host=host,
            port=port,
            policy=policy,
            instance_wait_seconds=instance_wait,
            prove_handover=False,  # hand-overs are counted
        )
        config = self._config(gateway=own)
        return self._start(GatewayProcess("gateway", config, urls, machine)).begun()

    def end(self) -> None:
        for served in self.running:
            served.kill()
        sweep()

    def _config(
        self, cache: CacheConfig | None = None, gateway: GatewayConfig | None = None
    ) -> ClusterConfig:
        model = ModelConfig(path=str(self.model), served_name="tiny", dtype="float32", device="cpu")
        return ClusterConfig(
            model=model, cache=cache or CacheConfig(), gateway=gateway or GatewayConfig()
        )

    def _start(self, what: InstanceProcess | GatewayProcess) -> Served:
        served = Served(what, self.directory / f"{len(self.running)}-{what.name}.log")
        self.running.append(served)
        return served


@contextmanager
def entered(machine: Machine) -> Iterator[None]:
    """What this thread, and threads that it starts, connect to is seen from there."""
    with Path("/proc/thread-self/ns/net").open("rb") as home:
        machine.enter_network()
        try:
            yield
        finally:
            set_network(home.fileno())


def ready(gateway: Served) -> list[str]:
    """Names of the instances that the gateway finds ready."""
    members = get(f"{gateway.url}/cluster")["instances"]
    return sorted(member["id"] for member in members if member["state"] == "ready")


def until_ready(gateway: Served, *names: str) -> float:
    """Until these instances are ready, and no others; the seconds that took."""
    wanted = sorted(names)
    return until(lambda: ready(gateway) == wanted, f"ready: {wanted}")


class Client:
    """Asks, and reads the answer's stream on a thread of its own; keeps the time of each event."""

    def __init__(self, gateway: Served, prompt: list[int], tokens: int, **fields: Any) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []  # of events with tokens
        self.error: str | None = None  # what the stream ended with, if not in order
        self.refused = False  # there was no gateway, or no instance
        self.usage: Any = None
        self._asked = time.monotonic()
        self._address = urlsplit(gateway.url)
        self._body = json.dumps(
            {
                "model": "tiny",
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                **fields,
            }
        )
        self._connection: http.client.HTTPConnection | None = None
        self._left = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the answer never ended"

    def result(self) -> list[int]:
        """All tokens. The stream must have ended in order."""
        self.join()
        assert self.error is None, self.error
        return self.tokens

    def wait(self, events: int) -> None:
        until(lambda: len(self.times) >= events or self.error is not None, "tokens")

    def leave(self) -> None:
        """Hang up."""
        self._left = True
        assert self._connection is not None
        assert self._connection.sock is not None
        self._connection.sock.shutdown(2)
        self._thread.join(PATIENCE)

    def pause(self, fault: float) -> float | None:
        """The longest time without a token, in seconds, that ends behind a fault: some tokens may
        still have been on their way. Before the first token, from the fault on. None: it was over,
        or this client left."""
        after = [at for at in self.times if at > fault]
        if not after or self._left:
            return None
        before = [at for at in self.times if at <= fault]
        return max(b - a for a, b in pairwise([*(before[-1:] or [fault]), *after]))

    def _run(self) -> None:
        try:
            self._read()
        except ConnectionRefusedError as error:
            self.error, self.refused = repr(error), True
        except (OSError, http.client.HTTPException) as error:
            self.error = None if self._left else repr(error)

    def _read(self) -> None:
        host, port = self._address.hostname, self._address.port
        assert host is not None
        self._connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
        self._connection.request("POST", "/v1/completions", self._body)
        answer = self._connection.getresponse()
        if answer.status != 200:
            self.error = f"{answer.status} {answer.read().decode()}"
            self.refused = answer.status == 503
            return
        for line in answer:
            if not line.startswith(b"data: "):
                continue
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                self.error = event["error"]["code"]
                return
            self.usage = event.get("usage") or self.usage
            for choice in event["choices"]:
                self.tokens += choice["token_ids"]
                self.times.append(time.monotonic())
        if not self._left:
            self.error = "cut off"
