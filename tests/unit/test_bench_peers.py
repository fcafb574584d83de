"""Peers: what is installed, how they are started, and what is said of them."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from evaluation.peers.config import PARTS, QUICK_PARTS, PeersConfig, chosen_parts
from evaluation.peers.index import IndexShape, index_table, run_index_bench
from evaluation.peers.install import (
    PEERS,
    TORCH,
    TORCH_INDEX,
    Peer,
    PeerNotInstalled,
    install,
    install_all,
    run_command,
    without_cuda,
)
from evaluation.peers.process import PeerFailed, serving
from evaluation.peers.report import NOT_MEASURED, PeersResult, peers_tables
from evaluation.peers.servers import start_generate
from evaluation.peers.serving import Contest, PeerRun
from evaluation.peers.vllm import VllmSettings, vllm_command
from evaluation.readme import render_readme
from memserve.bench.environment import capture_environment
from memserve.bench.loadgen import LoadResult, RequestRecord
from memserve.bench.openai_client import OpenAIClient
from memserve.bench.report import summarise
from memserve.bench.vllm_engine import why_missing
from memserve.clock import MonotonicClock
from memserve.errors import ConfigError
from memserve.models.tokenizer import Tokenizer
from tests.fakes import tiny_tokenizer
from tests.tiny_models import Reference, save_tiny_model

SHAPE = IndexShape(count=20, tokens=256, prefixes=2, prefix_tokens=64, samples=5)


class Commands:
    """Stands for pip and the environments' Pythons."""

    def __init__(self, fails: str = "", brought: str = "numpy torch") -> None:
        self.ran: list[str] = []
        self._fails = fails
        self._brought = brought

    def __call__(self, command: Sequence[str]) -> str:
        line = " ".join(command)
        self.ran.append(line)
        if self._fails and self._fails in line:
            raise PeerNotInstalled("no such distribution")
        if "requires(" in line:
            return "numpy>=2\ntorch==2.13.0\ntorchvision\nzmq; extra == 'all'\n"
        if "purelib" in line:  # as if an environment were the folder of its packages
            return f"{Path(command[0]).parents[1]}\n"
        return self._brought if "distributions()" in line else ""


def test_requirements_that_bring_cuda_are_left_out() -> None:
    lines = ["numpy<3", "torch==2", "Torch_Vision", "torchvision>1", "triton", 'x; extra == "y"']
    assert without_cuda([*lines, "regex; python_version > '3'"]) == [
        "numpy<3",
        "Torch_Vision",
        "regex; python_version > '3'",
    ]


def test_a_peer_gets_our_torch_and_is_not_installed_twice(tmp_path: Path) -> None:
    peer = Peer(name="p", bare=("engine==1", TORCH), of="engine")
    commands = Commands()
    assert why_missing("p", tmp_path) is not None
    (tmp_path / "p").mkdir()
    install(peer, tmp_path, commands)
    assert why_missing("p", tmp_path) is None
    (bare,) = (line for line in commands.ran if "--no-deps" in line)
    assert bare.endswith(f"engine==1 {TORCH}")
    (rest,) = (line for line in commands.ran if "numpy>=2" in line)
    assert rest.endswith(f"install numpy>=2 {TORCH}")
    ran = len(commands.ran)
    install(peer, tmp_path, commands)
    assert len(commands.ran) == ran
    install(msgspec.structs.replace(peer, bare=("engine==2", TORCH)), tmp_path, commands)
    assert len(commands.ran) > ran


def test_one_peer_has_the_packages_of_another(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    install(Peer(name="p", over="q"), tmp_path, Commands())
    assert (tmp_path / "p" / "over.pth").read_text() == f"{tmp_path / 'q'}\n"


@pytest.mark.parametrize(
    ("peer", "download"),
    [
        (Peer(name="p", bare=("engine==1",)), "engine==1"),
        (Peer(name="p", bare=("engine==1", TORCH)), f"--extra-index-url {TORCH_INDEX} engine==1"),
        (Peer(name="p", requirements=("library",)), "library"),
    ],
)
def test_a_download_that_breaks_off_is_begun_again(
    tmp_path: Path, peer: Peer, download: str
) -> None:
    commands, broken = Commands(), []

    def run(command: Sequence[str]) -> str:
        if download in " ".join(command) and not broken:
            broken.append(command)
            raise PeerNotInstalled("it broke off")
        if TORCH in command and "--extra-index-url" not in command:
            raise PeerNotInstalled("no such distribution")
        return commands(command)

    (tmp_path / "p").mkdir()
    install(peer, tmp_path, run)
    assert why_missing("p", tmp_path) is None
    assert any(download in line for line in commands.ran)


def test_what_brought_cuda_does_not_count_as_installed(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    with pytest.raises(PeerNotInstalled, match="nvidia-cublas"):
        install(Peer(name="p"), tmp_path, Commands(brought="torch nvidia-cublas"))
    assert why_missing("p", tmp_path) is not None


def test_one_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    for peer in PEERS:
        (tmp_path / peer.name).mkdir()
    said: list[str] = []
    assert install_all((), tmp_path, Commands(fails="vllm-router"), said.append) == 1
    assert [line.split(":")[0] for line in said] == [peer.name for peer in PEERS]
    assert "routers: skipped: no such distribution" in said
    with pytest.raises(ValueError, match="no peer typo"):
        install_all(("typo",), tmp_path, Commands(), said.append)


def test_a_command_that_fails_says_its_last_lines() -> None:
    assert run_command((sys.executable, "-c", "print(7)")) == "7\n"
    with pytest.raises(PeerNotInstalled, match="why"):
        run_command((sys.executable, "-c", "import sys; sys.exit('why')"))
    with pytest.raises(PeerNotInstalled):
        run_command(("/no/such/program",))


def test_vllm_gets_its_own_flag_for_a_cache_that_is_off() -> None:
    on = vllm_command(Path("p"), VllmSettings(model="m", port=1))
    off = vllm_command(Path("p"), VllmSettings(model="m", port=1, prefix_caching=False))
    assert set(on) ^ set(off) == {"--enable-prefix-caching", "--no-enable-prefix-caching"}


def test_a_server_that_ends_says_why() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no room')"]
    with (
        serving("peer", command, {}, 1) as server,
        pytest.raises(PeerFailed, match="peer ended while it started: no room"),
    ):
        server.wait_ready(60.0)


def test_a_server_without_http_is_ready_when_it_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with serving("peer", ["sleep", "60"], os.environ, port) as server:
            server.wait_listening(60.0)
    command = [sys.executable, "-c", "import sys; sys.exit('no room')"]
    with (
        serving("peer", command, {}, port) as server,
        pytest.raises(PeerFailed, match="peer ended while it started: no room"),
    ):
        server.wait_listening(60.0)


def test_of_many_errors_the_first_is_told() -> None:
    told = (
        "INFO 11-26 17:00:00 [a.py:1] no Error: here",
        "(Worker pid=7) ERROR 11-26 17:00:01 [b.py:2] Traceback (most recent call last):",
        "(Worker pid=7) ERROR 11-26 17:00:01 [b.py:2] Exception: GPUs only",
        "(APIServer pid=6) RuntimeError: Engine core initialization failed",
    )
    command = [sys.executable, "-c", f"print({chr(10).join(told)!r}); raise SystemExit(1)"]
    with (
        serving("vLLM", command, {}, 1) as server,
        pytest.raises(PeerFailed, match=r"vLLM ended while it started: Exception: GPUs only$"),
    ):
        server.wait_ready(60.0)


def test_our_indexes_are_measured_and_missing_peers_are_skipped(tmp_path: Path) -> None:
    said: list[str] = []
    report = run_index_bench(SHAPE, 1, said.append, tmp_path)
    assert [f.name for f in report.figures] == ["memserve pool", "memserve prompt trees"]
    assert all(f.insert_us > 0 and f.match_us > 0 for f in report.figures)
    assert set(report.skipped) == {"SGLang RadixCache", "vLLM block hashes", "Dynamo RadixTree"}
    assert all("make peers" in why for why in report.skipped.values())
    assert index_table(report).row_count == 2


def test_ratios_are_of_the_same_round() -> None:
    runs = [run("memserve", 0, 1.0), run("memserve", 1, 4.0)]
    runs += [run("vLLM", 0, 2.0), run("vLLM", 1, 2.0), run("slow", 1, 8.0)]
    contest = Contest("One instance", (2,), tuple(runs), {"other": "not installed"})
    text = shown(PeersResult((contest,), None, None, NOT_MEASURED))
    assert "1.00 (0.50-2.00)" in text
    assert "0.50 (0.50-0.50)" in text
    assert "other: skipped: not installed" in text
    assert "not measured: Transformers' continuous batching" in text


def test_the_results_are_shown_in_the_readme(tmp_path: Path) -> None:
    runs = (run("memserve", 0, 1.0), run("vLLM", 0, 2.0))
    result = PeersResult((Contest("One instance", (2,), runs, {}),), None, None, ())
    file = {
        "command": ["memserve", "bench", "peers", "--quick"],
        "environment": capture_environment(),
        "config": PeersConfig(),
        "result": result,
    }
    (tmp_path / "peers.json").write_bytes(msgspec.json.encode(file))
    text = render_readme(tmp_path)
    assert "`memserve bench peers --quick`" in text
    assert "| vLLM | 2000 |" in text


async def test_generate_behind_the_api_is_generate(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    model = save_tiny_model("llama", tmp_path)
    (model / "tokenizer.json").write_bytes((tmp_path / "tokenizer.json").read_bytes())
    prompt = list(range(3, 40))
    async with AsyncExitStack() as stack:
        server = start_generate(stack, "float32", model, sorted(os.sched_getaffinity(0))[:1])
        await asyncio.to_thread(server.wait_ready, 100.0)
        async with OpenAIClient(server.url, "peer", MonotonicClock()) as client:
            answers = await asyncio.gather(client.complete(prompt, 6), client.complete(prompt, 6))
    wanted = Tokenizer.load(model).decode(Reference(model).generate(prompt, 6))
    for answer in answers:
        assert answer.error is None
        assert answer.text == wanted
        assert (answer.prompt_tokens, answer.output_tokens) == (len(prompt), 6)
        assert len(answer.chunk_times) == 6


def test_parts_may_be_chosen() -> None:
    assert chosen_parts(None, QUICK_PARTS) == QUICK_PARTS
    assert chosen_parts(["gateway", "index"], PARTS) == ("index", "gateway")
    with pytest.raises(ConfigError, match="--only typo: there are serving"):
        chosen_parts(["typo"], PARTS)


def run(server: str, repeat: int, seconds: float) -> PeerRun:
    """One request with a first token after so many seconds, and three more, as long apart."""
    times = tuple(seconds * (at + 1) for at in range(4))
    record = RequestRecord("s", 0, 0.0, 0.0, seconds, times, times[-1], 10, 5, 4, None)
    return PeerRun(server, "open", repeat, summarise(LoadResult((record,), 0)))


def shown(result: PeersResult) -> str:
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(peers_tables(result))
    return console.export_text()
