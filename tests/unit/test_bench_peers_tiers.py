"""vLLM servers with memory behind them: how they are asked, what stands before a split pair, and
what is said where something is missing."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console

from evaluation.peers import tiers
from evaluation.peers.affinity import pin_back
from evaluation.peers.config import PARTS, QUICK_PARTS
from evaluation.peers.contest_tables import contest_tables
from evaluation.peers.process import PeerFailed
from evaluation.peers.serving import Contest, Loads, PeerRun
from evaluation.peers.split_proxy import application, prompt_request, with_cached
from evaluation.peers.tiers import (
    HOST_NAMES,
    LMCACHE_NAMES,
    SPLIT_NAMES,
    TierSettings,
    beside_lmcache,
    first_prompt,
    host_memory,
    lmcache_flag,
    nixl_flag,
    nixl_variables,
    offloading_flag,
    prefill_and_decode,
    why_no_nixl,
)
from memserve.bench import vllm_engine
from memserve.bench.loadgen import LoadResult, RequestRecord
from memserve.bench.openai_client import OpenAIClient
from memserve.bench.report import summarise
from memserve.bench.vllm_engine import as_vllm, own_instance, vllm_arguments
from memserve.clock import MonotonicClock
from memserve.config import ClusterConfig, InstanceConfig, ModelConfig, check_config
from memserve.errors import ConfigError
from memserve.models.resolve import ModelDirectory
from memserve.types import Role
from memserve.vllm.place import ServerPlace
from memserve.vllm.server import server_command, server_environment

WHERE = {"do_remote_prefill": True, "remote_engine_id": "p", "remote_block_ids": [[1, 2]]}
LOADS = Loads(
    dtype="float32",
    repeats=1,
    seed=0,
    rate=1.0,
    concurrency=1,
    sessions=1,
    max_turns=1,
    max_output_tokens=1,
)
Ask = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Pair:
    """Stands for a vLLM that computes prompts and one that decodes."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.refuses = 0  # a status that the first answers with

    async def prefill(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        if self.refuses:
            error = {"error": {"message": "too long"}}
            return web.json_response(error, status=self.refuses)
        usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
        return web.json_response({"usage": usage, "kv_transfer_params": WHERE})

    async def decode(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        for token in (7, 8):
            chunk = {"choices": [{"text": "a", "token_ids": [token]}], "usage": None}
            await stream.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        usage = {"prompt_tokens": 9, "completion_tokens": 2}
        usage["prompt_tokens_details"] = {"cached_tokens": 8}  # type: ignore[assignment]
        last = json.dumps({"choices": [], "usage": usage}).encode()
        await stream.write(b"data: " + last + b"\n\ndata: [DONE]\n\n")
        return stream


@asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[str]:
    server = TestServer(app)
    await server.start_server()
    try:
        yield str(server.make_url("")).rstrip("/")
    finally:
        await server.close()


@asynccontextmanager
async def proxy_of(pair: Pair) -> AsyncIterator[str]:
    async with (
        served(_server(pair.prefill)) as prefill,
        served(_server(pair.decode)) as decode,
        served(application(prefill, decode)) as url,
    ):
        yield url


def _server(ask: Ask) -> web.Application:
    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "peer"}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", ask)
    app.router.add_post("/v1/chat/completions", ask)
    return app


async def test_a_request_goes_to_both_servers_and_tells_what_the_first_had() -> None:
    pair = Pair()
    async with proxy_of(pair) as url, OpenAIClient(url, "peer", MonotonicClock(), "s") as client:
        answer = await client.chat([{"role": "user", "content": "hello"}], 2)
    assert answer.error is None
    assert (answer.text, len(answer.chunk_times)) == ("aa", 2)
    assert (answer.prompt_tokens, answer.cached_tokens, answer.output_tokens) == (9, 4, 2)
    prompt, decode = pair.asked
    assert (prompt["max_tokens"], prompt["stream"]) == (1, False)
    assert prompt["kv_transfer_params"]["do_remote_decode"] is True
    assert (decode["max_tokens"], decode["stream"]) == (2, True)
    assert decode["kv_transfer_params"] == WHERE
    assert prompt["cache_salt"] == decode["cache_salt"] == "s"
    assert prompt["messages"] == decode["messages"]


async def test_what_the_first_refuses_is_refused() -> None:
    pair = Pair()
    pair.refuses = 400
    async with proxy_of(pair) as url, OpenAIClient(url, "peer", MonotonicClock()) as client:
        answer = await client.complete([1, 2], 2)
        assert await first_prompt(url) == "HTTP 400: too long"
    assert answer.error == "HTTP 400: too long"
    assert len(pair.asked) == 2


async def test_a_server_that_is_gone_is_told() -> None:
    pair = Pair()
    async with served(_server(pair.decode)) as decode:
        gone = application("http://127.0.0.1:1", decode)
        async with served(gone) as url, OpenAIClient(url, "peer", MonotonicClock()) as client:
            answer = await client.complete([1, 2], 2)
    assert answer.error is not None
    assert "502" in answer.error
    assert await first_prompt("http://127.0.0.1:1") is not None


def test_a_prompt_is_asked_for_with_one_token() -> None:
    body = {"prompt": "a", "max_completion_tokens": 9, "stream_options": {}, "min_tokens": 2}
    asked = prompt_request(body)
    assert (asked["max_completion_tokens"], asked["max_tokens"]) == (1, 1)
    assert "stream_options" not in asked
    assert "min_tokens" not in asked


def test_events_without_usage_stay_as_they_are() -> None:
    for event in (
        b'data: {"usage":null}\n\n',
        b'data: "usage"\n\n',
        b"data: [DONE]\n\n",
        b": x\n\n",
    ):
        assert with_cached(event, 3) == event


def test_our_servers_are_those_of_a_cluster_file(tmp_path: Path) -> None:
    arguments = vllm_arguments(40_000_000, 512)
    instance = own_instance(1, "512MiB", arguments, Role.DECODE)
    check_config(ClusterConfig(instance=(instance,)))
    command = server_command(
        ModelConfig(), instance, tmp_path, ServerPlace(path=tmp_path / "http"), None
    )
    assert command[0] == "env"
    assert command[-len(arguments) :] == list(arguments)
    assert command[command.index("--kv-cache-memory-bytes") + 1] == "40000000"
    assert server_environment(instance)["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    assert "--max-num-batched-tokens" not in vllm_arguments(1)


def test_peers_get_connectors_of_their_own() -> None:
    name, value = offloading_flag("1MiB")
    assert name == "--kv-transfer-config"
    assert json.loads(value)["kv_connector_extra_config"] == {"cpu_bytes_to_use": 1 << 20}
    assert json.loads(nixl_flag()[1])["kv_buffer_device"] == "cpu"
    lmcache = json.loads(lmcache_flag(7)[1])["kv_connector_extra_config"]
    assert lmcache["lmcache.mp.port"] == 7
    assert lmcache["lmcache.mp.mp_transfer_mode"] == "lmcache_driven"
    assert nixl_variables(7)["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "7"


def test_a_missing_nixl_is_told(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: No module named nixl' >&2\nexit 1\n")
    python.chmod(0o755)
    why = why_no_nixl(python)
    assert why is not None
    assert why.endswith("ModuleNotFoundError: No module named nixl")
    python.write_text("#!/bin/sh\nexit 0\n")
    assert why_no_nixl(python) is None
    assert why_no_nixl(Path("/no/such/python")) is not None


async def test_without_vllm_all_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ModelDirectory(tmp_path, "m", None)
    settings = TierSettings()
    contests = (
        (host_memory, HOST_NAMES),
        (beside_lmcache, LMCACHE_NAMES),
        (prefill_and_decode, SPLIT_NAMES),
    )
    for contest, names in contests:
        found = await contest(LOADS, settings, model, (0,), (), lambda _: None)
        assert found.runs == ()
        assert set(found.skipped) == set(names)
        assert all("make peers" in why for why in found.skipped.values())


@dataclass
class Started:
    """Stand for the servers of a contest, in the place of processes."""

    fails: dict[str, str] = field(default_factory=dict)  # by a part of the arguments: what it says
    connectors: list[str] = field(default_factory=list)  # of vLLM, "" for none
    sizes: list[int] = field(default_factory=list)  # bytes, of LMCache's servers

    def vllm(self, *_: object, arguments: Sequence[str], peer: str, **__: object) -> Server:
        flag = "--kv-transfer-config"
        value = arguments[arguments.index(flag) + 1] if flag in arguments else "{}"
        self.connectors.append(json.loads(value).get("kv_connector", ""))
        assert (peer == "lmcache") == ("LMCacheMPConnector" in value)
        return Server(self.fails.get(self.connectors[-1]))

    def lmcache(self, _: object, __: int, size: int, ___: int) -> Server:
        self.sizes.append(size)
        return Server(self.fails.get("lmcache"))


@dataclass
class Server:
    says: str | None = None  # why it ends while it starts
    url: str = "http://127.0.0.1:1"

    def wait_ready(self, _: float) -> None:
        if self.says is not None:
            raise PeerFailed(self.says)

    wait_listening = wait_ready


async def _contest_of(
    started: Started, monkeypatch: pytest.MonkeyPatch, path: Path, lmcache: bool = True
) -> Contest:
    """The contest with LMCache, or else with host memory, of servers that nobody asks."""
    monkeypatch.setattr(tiers, "start_vllm", started.vllm)
    monkeypatch.setattr(tiers, "start_lmcache", started.lmcache)
    monkeypatch.setattr(tiers, "start_router", lambda *_: Server())
    monkeypatch.setattr(tiers, "ours", lambda *_: nullcontext("http://127.0.0.1:1"))
    monkeypatch.setattr(tiers, "first_prompt", AsyncMock(return_value=None))
    monkeypatch.setattr(tiers, "rounds", _names)
    contest, model = beside_lmcache if lmcache else host_memory, ModelDirectory(path, "m", None)
    return await contest(LOADS, TierSettings(dram="1MiB"), model, (0, 1), (), lambda _: None)


async def _names(_: Loads, __: float, urls: dict[str, str], *___: object) -> tuple[PeerRun, ...]:
    return tuple(run(name, 0, 1.0, 0) for name in urls)


async def test_two_vllm_share_one_lmcache_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "why_missing", lambda _: None)
    started = Started()
    contest = await _contest_of(started, monkeypatch, tmp_path)
    assert contest.skipped == {}
    assert [each.server for each in contest.runs] == list(LMCACHE_NAMES)
    assert started.connectors == ["LMCacheMPConnector"] * 2
    assert started.sizes == [2 << 20]


@pytest.mark.parametrize("part", ["lmcache", "LMCacheMPConnector"])
async def test_why_lmcache_does_not_start_is_told(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "why_missing", lambda _: None)
    contest = await _contest_of(Started({part: "no room"}), monkeypatch, tmp_path)
    assert contest.skipped == {LMCACHE_NAMES[1]: "no room"}
    assert [each.server for each in contest.runs] == list(LMCACHE_NAMES[:1])


@pytest.mark.parametrize("missing", ["lmcache", "routers"])
async def test_without_lmcache_ours_are_measured(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "why_missing", {missing: "not installed"}.get)
    started = Started()
    contest = await _contest_of(started, monkeypatch, tmp_path)
    assert contest.skipped == {LMCACHE_NAMES[1]: "not installed"}
    assert [each.server for each in contest.runs] == list(LMCACHE_NAMES[:1])
    assert started.sizes == started.connectors == []


async def test_a_connector_that_refuses_is_told_and_started_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "why_missing", lambda _: None)
    refused = "CPU Offloading is currently only supported on CUDA-alike and XPU GPUs"
    started = Started({"OffloadingConnector": refused})
    contest = await _contest_of(started, monkeypatch, tmp_path, lmcache=False)
    assert contest.skipped == {HOST_NAMES[2]: refused}
    assert [each.server for each in contest.runs] == list(HOST_NAMES[:2])
    assert started.connectors == ["", "", "OffloadingConnector"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_thread_on_another_core_is_put_back() -> None:
    first, *_, last = sorted(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{last}}}); print('.', flush=True); input()"
    with subprocess.Popen(
        (sys.executable, "-c", code),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert pin_back(process.pid, last) == 0
        assert pin_back(process.pid, first) == 1
        assert os.sched_getaffinity(process.pid) == {first}
        process.kill()


def test_tables_tell_of_whole_answers_and_of_caches() -> None:
    runs = (
        run(HOST_NAMES[0], 0, 1.0, 2),
        run(HOST_NAMES[0], 1, 1.0, 6),
        run(HOST_NAMES[1], 0, 2.0, 0),
    )
    contest = Contest("Two vLLM", (1, 1), runs, {}, tiers=True)
    console = Console(width=400, record=True, file=io.StringIO())
    for table in contest_tables(contest):
        console.print(table)
    text = console.export_text()
    assert "JCT ms mean" in text
    assert "40% (20%-60%)" in text
    assert "MB handed over" in text
    assert "P50" not in text
    assert "0.50 (0.50-0.50)" in text
    again = msgspec.json.decode(msgspec.json.encode(contest), type=Contest)
    assert again == contest


def test_a_quick_run_leaves_them_out() -> None:
    assert "tiers" in PARTS
    assert "tiers" not in QUICK_PARTS


def run(server: str, repeat: int, seconds: float, cached: int) -> PeerRun:
    """One request of ten prompt tokens."""
    times = tuple(seconds * (at + 1) for at in range(4))
    record = RequestRecord("s", 0, 0.0, 0.0, seconds, times, times[-1], 10, cached, 4, None)
    return PeerRun(server, "open", repeat, summarise(LoadResult((record,), 0)))


def test_any_cluster_may_be_measured_with_vllm_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = [InstanceConfig(role=Role.PREFILL), InstanceConfig(role=Role.DECODE)]
    monkeypatch.setattr(vllm_engine, "why_missing", lambda _: "not installed")
    with pytest.raises(ConfigError, match="not installed, or `make vllm`"):
        as_vllm(roles)
    monkeypatch.setattr(vllm_engine, "why_missing", lambda _: None)
    made = as_vllm(roles)
    assert [each.role for each in made] == [Role.PREFILL, Role.DECODE]
    assert all(each.engine == "vllm" and each.dram and each.cpus for each in made)
    (template,) = as_vllm(roles[:1])
    assert template.cpus is None  # of several of them
    check_config(ClusterConfig(instance=made))
