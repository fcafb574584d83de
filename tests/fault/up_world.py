"""A whole `memserve up` with two gateway workers: what becomes of processes, and their output."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
import pytest

from evaluation.soak.cluster import RunningUp, running_up
from evaluation.soak.vitals import process_tree
from memserve.api.control import InstanceChange, WantedState
from memserve.api.generate import GENERATE_PATH
from memserve.api.status import (
    EngineTotals,
    InstanceInfo,
    InstanceState,
    InstanceStats,
    Latencies,
    PoolTotals,
)
from memserve.bench.measure import BenchmarkError
from memserve.clock import MonotonicClock
from memserve.cluster.rolling import restart
from memserve.config import ClusterConfig, GatewayConfig, InstanceConfig, ModelConfig
from memserve.errors import ClusterError
from memserve.types import Epoch, InstanceId, Role
from tests.fakes import MODEL
from tests.fault.campaign import WHOLE_SECONDS, Broken
from tests.fault.garbage import listening, sip, throw
from tests.fault.load import Place, Question
from tests.fault.members_world import ask, ready_members
from tests.fault.processes import PATIENCE, Client
from tests.handoff_harness import prompt_of

T = TypeVar("T")
COMMAND = (sys.executable, "-m", "tests.fault.patient_up")
ROLES = {"prefill-0": Role.PREFILL, "decode-1": Role.DECODE, "colocated-2": Role.COLOCATED}
WORKERS = ("worker-0", "worker-1")
ENGINE = {"step_seconds": 0.01}
ANSWER = (2, 3, 4)  # over and over, by `FakeEngine`
TOKENS = 16
LOOKS = 6  # fresh connections, which the kernel spreads over the workers
LONG = 1_200_000  # bytes; more than a line of a child's output may have
LINES = 400  # of log, more than a pipe holds
_SMALL_REQUEST = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 1}


class UpWorld:
    """See `campaign.World`."""

    name = "up"
    cutting = frozenset(
        {"gateway killed", "worker killed", "gateway and instance killed", "worker stopped"}
    )

    def __init__(self, model: Path, directory: Path) -> None:
        self._directory = directory
        self._config = ClusterConfig(
            model=ModelConfig(path=str(model), served_name=MODEL),
            gateway=GatewayConfig(workers=len(WORKERS)),
            instance=tuple(InstanceConfig(role=role) for role in ROLES.values()),
        )
        self._starts = 0
        self.kinds: dict[str, Callable[[random.Random], str]] = {
            "instance killed": self._kill_instance,
            "instance stopped": self._stop_instance,
            "role changed": self._change_role,
            "drained": self._drain,
            "rolling restart": self._roll,
            "gateway killed": self._kill_gateway,
            "worker killed": self._kill_worker,
            "worker stopped": self._stop_worker,
            "gateway and instance killed": self._kill_both,
            "long log lines": self._talk_long,
            "full disk": self._fill_disk,
            "hang-ups": self._hang_up,
            "slow readers": self._sip,
            "garbage at every port": self._throw,
        }

    @property
    def url(self) -> str:
        return self._up.url

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._starts += 1
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("MEMSERVE_FAKE_ENGINE", json.dumps(ENGINE))
            paths = [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
            environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
            self._context: AbstractAsyncContextManager[RunningUp] = running_up(
                self._config, self._directory / f"up-{self._starts}.log", COMMAND, WHOLE_SECONDS
            )
            self._up = self._run(self._context.__aenter__())

    def end(self, *, kill: bool = False) -> None:
        self._limit_output(None)
        for pid in reversed(self.processes().values()) if kill else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._run(self._context.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def questions(self) -> Sequence[Question]:
        answer = [ANSWER[place % len(ANSWER)] for place in range(TOKENS)]
        return [Question(prompt_of(10 + 9 * n, seed=n), answer) for n in range(8)]

    def processes(self) -> dict[str, int]:
        return {life.name: life.pid for life in process_tree(self._up.pid)}

    def until_whole(self, seconds: float) -> None:
        """All processes are there; every worker is healthy and finds every instance ready."""
        end = time.monotonic() + seconds
        while missing := self._missing():
            if time.monotonic() > end:
                raise Broken(f"after {seconds:g} s: {missing}")
            time.sleep(0.05)

    def _missing(self) -> str:
        """What is not as it should be; empty: nothing."""
        try:
            self._up.check()
        except BenchmarkError as error:
            raise Broken(str(error)) from error
        pids = self.processes()
        if gone := {"up", "gateway", *WORKERS, *ROLES} - set(pids):
            return f"not there: {sorted(gone)}"
        port = urlsplit(self.url).port
        if deaf := [name for name in WORKERS if port not in listening(pids[name])]:
            return f"not listening: {deaf}"
        wanted = {name: pids[name] for name in ROLES}
        found = [ready_members(self.url) for _ in range(LOOKS)]
        if any(each != wanted for each in found):
            return f"ready: {found}, and not {wanted}"
        return "" if self._healthy() else "not healthy"

    def leaks(self, seconds: float) -> dict[str, int]:
        """Sequences that are left: these engines have no blocks."""
        end = time.monotonic() + seconds
        while (left := self._sequences()) and time.monotonic() < end:
            time.sleep(0.2)
        return {"sequences": left}

    def _sequences(self) -> int:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
        names = ("memserve_instance_running_sequences{", "memserve_instance_waiting_sequences{")
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith(names))

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _pid(self, name: str) -> int:
        if (pid := self.processes().get(name)) is None:
            raise Broken(f"{name} is not there")
        return pid

    def _kill(self, *names: str) -> str:
        for pid in [self._pid(name) for name in names]:
            os.kill(pid, signal.SIGKILL)
        return f"SIGKILL of {' and '.join(names)}"

    def _stop(self, name: str, seconds: float) -> str:
        pid = self._pid(name)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
        return f"SIGSTOP of {name} for {seconds:g} s"

    def _kill_instance(self, source: random.Random) -> str:
        return self._kill(source.choice(sorted(ROLES)))

    def _stop_instance(self, source: random.Random) -> str:
        seconds = round(source.choice((0.2, source.uniform(1, 8))), 2)
        return self._stop(source.choice(sorted(ROLES)), seconds)

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

    def _roll(self, source: random.Random) -> str:
        names = source.sample(sorted(ROLES), 2)

        def quietly(_: str) -> None: ...

        try:
            ask(
                self.url,
                lambda client: restart(client, names, MonotonicClock(), quietly, WHOLE_SECONDS),
            )
        except ClusterError as error:
            raise Broken(str(error)) from error
        return f"{' and '.join(names)} restarted in turn"

    def _kill_gateway(self, source: random.Random) -> str:
        return self._kill("gateway")

    def _kill_worker(self, source: random.Random) -> str:
        return self._kill(source.choice(WORKERS))

    def _stop_worker(self, source: random.Random) -> str:
        return self._stop(source.choice(WORKERS), round(source.uniform(0.1, 3), 2))

    def _kill_both(self, source: random.Random) -> str:
        return self._kill("gateway", source.choice(sorted(ROLES)))

    def _talk_long(self, source: random.Random) -> str:
        """A member with a long name, and requests with long fields: whatever writes them into a
        log writes a long line."""
        addresses = [m.address for m in ask(self.url, lambda client: client.view()).instances]
        with rogue("x" * LONG) as address:
            try:
                ask(self.url, lambda client: client.add(address))
                time.sleep(1.5)  # it is asked who it is
                ask(self.url, lambda client: client.forget(address))
            except ClusterError:
                pass  # refused: so much the better
        long = "y" * LONG
        for field in ("user", "cache_salt", "model", "no_such_field"):
            _post(f"{self.url}/v1/completions", {**_SMALL_REQUEST, field: long})
        call = {"kind": "completion", "model": MODEL, "created": 1, "prompts": [[5, 6, 7]]}
        _post(source.choice(addresses) + GENERATE_PATH, {"id": long, **call})
        self._write_lines()
        return f"a member's name and requests' fields of {LONG} bytes"

    def _fill_disk(self, source: random.Random) -> str:
        """Where the output of `up` goes, nothing can be written any more; and then again."""
        self._limit_output(self._up.log.stat().st_size)
        self._write_lines()
        killed = self._kill(source.choice(sorted(ROLES))) if source.random() < 0.5 else ""
        time.sleep(0.5)
        self._limit_output(None)
        self._write_lines()
        return f"no room for a byte of output {'and ' if killed else ''}{killed}"

    def _limit_output(self, size: int | None) -> None:
        """A write beyond it fails as on a full disk does."""
        _, hard = resource.prlimit(os.getpid(), resource.RLIMIT_FSIZE)
        try:
            resource.prlimit(
                self._up.pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard)
            )
        except ProcessLookupError:
            return  # it has ended, as the campaign will find

    def _write_lines(self) -> None:
        """Many short requests: a line of log each."""
        failed = threading.Event()

        def post(_: int) -> None:
            if not failed.is_set() and not _post(f"{self.url}/v1/completions", _SMALL_REQUEST):
                failed.set()  # what hangs would hang so many times

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(post, range(LINES)))
        if failed.is_set():
            raise Broken("a short request was not answered")

    def _hang_up(self, source: random.Random) -> str:
        clients = [Client(Place(self.url), prompt_of(40, seed=n), 60) for n in range(12)]  # type: ignore[arg-type]
        for client in clients:
            client.wait(source.randrange(0, 20))
            if client.error is None:
                client.leave()
        return "12 clients left their streams"

    def _sip(self, source: random.Random) -> str:
        sip(self.url, prompt_of(40, seed=1), readers=8, seconds=source.uniform(0.5, 2))
        return "8 clients hardly read, and left"

    def _throw(self, source: random.Random) -> str:
        ports = sorted({port for pid in self.processes().values() for port in listening(pid)})
        throw(ports, source)
        return f"garbage at {len(ports)} ports"

    def _change(self, name: str, wanted: InstanceChange) -> None:
        try:
            ask(self.url, lambda client: client.change(name, wanted))
        except ClusterError as error:
            raise Broken(f"{name} does not change: {error}") from error

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(2 * WHOLE_SECONDS)


def _post(url: str, fields: dict[str, Any]) -> bool:
    """Whether there was an answer, or an error in the API's form."""
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(fields).encode(), head)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return "error" in json.load(error)
    except OSError:
        return False
    return True


@contextmanager
def rogue(name: str) -> Iterator[str]:
    """A server that says of itself that it is an instance, which drains; its address."""
    info = InstanceInfo(
        InstanceId(name), Epoch(1), Role.COLOCATED, InstanceState.DRAINING, 1, MODEL
    )
    stats = InstanceStats(EngineTotals(), PoolTotals(), Latencies())
    answers = {"/info": msgspec.json.encode(info), "/stats": msgspec.json.encode(stats)}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers.get(self.path.partition("?")[0], b"{}")
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
