"""Costs of a gateway: CPU time per request and per chunk, and delays of chunks.

The gateway stands between a backend that streams fixed chunks and a load generator, each a process
of its own. Two baselines: no gateway, for the limits of backend and generator; and a relay that
passes bytes on without parsing, for the CPU time of the event loop and the kernel. CPU times are
from /proc, of all processes of the gateway. Requests per second are measured with unpaced chunks;
CPU per chunk and gaps with paced chunks, so that each chunk is one read and one write.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import msgspec
import numpy as np
from rich.table import Table

from memserve.bench.gateway_process import MODULE, LoadConfig, LoadSeen
from memserve.config import Policy
from memserve.errors import MemserveError
from memserve.hosts import free_port

READY_SECONDS = 30.0  # until a gateway answers a request
WARM_SECONDS = 0.5  # of load before the measurement
FEW, MANY = 8, 64  # chunks per stream; the difference gives the cost of a chunk
_TICK = 1 / os.sysconf("SC_CLK_TCK")
_ROUTERS = {"vllm-router": (), "sglang-router": ("launch",)}  # and their subcommands
_TEXTS = ("sglang-router",)  # refuses prompts of token ids


class GatewayWorkload(msgspec.Struct, frozen=True):
    """The load through each gateway."""

    streams: int
    prompt_tokens: int  # as token ids; 5 digits each
    gap_seconds: float  # between paced chunks
    seconds: float  # of each run
    repeats: int
    policy: Policy
    workers: int = 1  # processes of memserve's gateway; with more, one is measured, too


class GatewayRun(msgspec.Struct, frozen=True):
    """One load through one gateway."""

    requests: int
    requests_per_second: float
    cpu_us_per_request: float
    gap_p50_ms: float
    gap_p99_ms: float


class GatewayStats(msgspec.Struct, frozen=True):
    """Medians over the repeats."""

    name: str
    requests_per_second: float  # 8 chunks per stream, not paced
    cpu_us_per_request: float  # in these runs
    paced_cpu_us_per_request: float  # 8 chunks per stream, paced
    cpu_us_per_chunk: float  # slope between 8 and 64 chunks per stream, paced
    gap_p50_ms: float  # paced
    gap_p99_ms: float


class GatewayBenchReport(msgspec.Struct, frozen=True):
    figures: tuple[GatewayStats, ...]
    skipped: dict[str, str]  # name of a router: why it was not measured


class _Target(msgspec.Struct, frozen=True):
    name: str
    texts: bool  # refuses token ids: prompts are texts of the same size in bytes
    command: tuple[str, ...] | None  # with {url}, {port} and {metrics}; None: no gateway
    prints_url: bool = False  # the gateway chooses its port itself


def run_gateway_bench(
    workload: GatewayWorkload, progress: Callable[[str], None]
) -> GatewayBenchReport:
    """Measure memserve's gateway, the baselines and installed routers, in turns. Raises
    MemserveError if one of the first two fails; a router that fails is skipped."""
    targets = [
        _Target("none", False, None),
        _Target(
            "bytes passed on",
            False,
            (sys.executable, "-m", MODULE, "relay", "{url}"),
            prints_url=True,
        ),
        _ours("memserve", workload.policy, 1),
    ]
    if workload.workers > 1:
        name = f"memserve, {workload.workers} workers"
        targets.append(_ours(name, workload.policy, workload.workers))
    skipped = {}
    for name in _ROUTERS:
        command = _installed(name)
        if command is None:
            skipped[name] = f"no command '{name}' beside this Python or on the PATH"
        else:
            targets.append(_Target(name, name in _TEXTS, command))
    runs: dict[str, list[tuple[GatewayRun, GatewayRun, GatewayRun]]] = {t.name: [] for t in targets}
    for repeat in range(workload.repeats):
        for target in targets:
            if target.name in skipped:
                continue
            progress(f"{target.name}, run {repeat + 1} of {workload.repeats}")
            try:
                runs[target.name].append(_measure(target, workload))
            except MemserveError as error:
                if target.name not in _ROUTERS:
                    raise
                skipped[target.name] = str(error)
    figures = tuple(_figures(name, made) for name, made in runs.items() if made)
    return GatewayBenchReport(figures, skipped)


def gateway_bench_table(report: GatewayBenchReport) -> Table:
    notes = [f"{name}: skipped, {why}" for name, why in report.skipped.items()]
    notes += [f"{f.name}: prompts are text" for f in report.figures if f.name in _TEXTS]
    table = Table(caption="\n".join(notes))
    for column in (
        "gateway",
        "requests/s",
        "CPU us/request",
        "paced: CPU us/request",
        "CPU us/chunk",
        "gap P50 ms",
        "gap P99 ms",
    ):
        table.add_column(column, justify="left" if column == "gateway" else "right")
    for f in report.figures:
        table.add_row(
            f.name,
            f"{f.requests_per_second:.0f}",
            f"{f.cpu_us_per_request:.1f}",
            f"{f.paced_cpu_us_per_request:.1f}",
            f"{f.cpu_us_per_chunk:.2f}",
            f"{f.gap_p50_ms:.2f}",
            f"{f.gap_p99_ms:.2f}",
        )
    return table


def _figures(name: str, runs: Sequence[tuple[GatewayRun, GatewayRun, GatewayRun]]) -> GatewayStats:
    def middle(of: Callable[[tuple[GatewayRun, GatewayRun, GatewayRun]], float]) -> float:
        return median(map(of, runs))

    return GatewayStats(
        name,
        middle(lambda run: run[0].requests_per_second),
        middle(lambda run: run[0].cpu_us_per_request),
        middle(lambda run: run[1].cpu_us_per_request),
        middle(lambda run: (run[2].cpu_us_per_request - run[1].cpu_us_per_request) / (MANY - FEW)),
        middle(lambda run: run[2].gap_p50_ms),
        middle(lambda run: run[2].gap_p99_ms),
    )


def _measure(
    target: _Target, workload: GatewayWorkload
) -> tuple[GatewayRun, GatewayRun, GatewayRun]:
    """Return three runs: unpaced with FEW chunks, paced with FEW, paced with MANY."""
    runs = []
    for gap, loads in ((0.0, (FEW,)), (workload.gap_seconds, (FEW, MANY))):
        with ExitStack() as stack:
            backend = stack.enter_context(_serving("backend", str(gap)))
            url, pid = backend, None
            if target.command is not None:
                url, pid = stack.enter_context(_gateway(target, backend))
            _load(url, workload, FEW, WARM_SECONDS, target.texts)
            runs += [_run(url, pid, workload, chunks, target.texts) for chunks in loads]
    return runs[0], runs[1], runs[2]


def _run(
    url: str, pid: int | None, workload: GatewayWorkload, chunks: int, texts: bool
) -> GatewayRun:
    before = _cpu_seconds(pid)
    seen = _load(url, workload, chunks, workload.seconds, texts)
    used = _cpu_seconds(pid) - before
    p50, p99 = np.percentile(seen.gaps or [0.0], [50, 99]) * 1000
    return GatewayRun(
        seen.requests,
        seen.requests / seen.seconds,
        used / seen.requests * 1e6,
        float(p50),
        float(p99),
    )


def _load(
    url: str, workload: GatewayWorkload, chunks: int, seconds: float, texts: bool
) -> LoadSeen:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    config = LoadConfig(
        parts.hostname,
        parts.port,
        workload.streams,
        chunks,
        seconds,
        workload.prompt_tokens,
        texts,
    )
    done = subprocess.run(
        [sys.executable, "-m", MODULE, "load", msgspec.json.encode(config).decode()],
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        raise MemserveError(f"the load generator at {url} ended with {done.returncode}")
    seen = msgspec.json.decode(done.stdout, type=LoadSeen)
    if seen.failed or not seen.requests:
        raise MemserveError(f"{seen.failed} of {seen.requests} requests to {url} failed")
    return seen


def _cpu_seconds(pid: int | None) -> float:
    """Return user and system seconds of a process and its children, with ended ones."""
    if pid is None:
        return 0.0
    process = Path(f"/proc/{pid}")
    fields = (process / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
    children = [
        int(child)
        for task in (process / "task").iterdir()
        for child in (task / "children").read_text(encoding="ascii").split()
    ]
    return sum(map(int, fields[11:15])) * _TICK + sum(map(_cpu_seconds, children))


@contextmanager
def _serving(*arguments: str) -> Iterator[str]:
    """Run a process of `gateway_process`; yield the URL that it prints."""
    with _process((sys.executable, "-m", MODULE, *arguments)) as process:
        assert process.stdout is not None
        yield process.stdout.readline().decode().strip()


@contextmanager
def _gateway(target: _Target, backend: str) -> Iterator[tuple[str, int]]:
    """Run a gateway; yield its URL and pid when it is ready."""
    assert target.command is not None
    port, metrics = free_port(), free_port()
    command = [part.format(url=backend, port=port, metrics=metrics) for part in target.command]
    with _process(command) as process:
        url = f"http://127.0.0.1:{port}"
        if target.prints_url:
            assert process.stdout is not None
            url = process.stdout.readline().decode().strip()
        _until_ready(target, url, process)
        yield url, process.pid


@contextmanager
def _process(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _until_ready(target: _Target, url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a request is answered."""
    parts = urlsplit(url)
    prompt = b'"a b"' if target.texts else b"[1,2]"
    body = b'{"model":"echo","prompt":%b,"max_tokens":1,"stream":true}' % prompt
    request = (
        b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    )
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with socket.create_connection((parts.hostname or "", parts.port or 0), 1.0) as client:
                client.sendall(request)
                if client.recv(64).split(b" ", 2)[1:2] == [b"200"]:
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise MemserveError(f"{target.name} did not answer a request within {READY_SECONDS:.0f} s")


def _ours(name: str, policy: Policy, workers: int) -> _Target:
    command = (sys.executable, "-m", MODULE, "gateway", policy, str(workers), "{url}")
    return _Target(name, False, command, prints_url=True)


def _installed(name: str) -> tuple[str, ...] | None:
    beside = Path(sys.executable).with_name(name)
    program = str(beside) if beside.exists() else shutil.which(name)
    if program is None:
        return None
    return (
        *(program, *_ROUTERS[name], "--host", "127.0.0.1", "--port", "{port}"),
        *("--worker-urls", "{url}", "--policy", "cache_aware"),
        *("--prometheus-port", "{metrics}", "--log-level", "error"),
    )
