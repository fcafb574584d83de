"""A cluster of vLLM servers, with a tiny model: `memserve up` as a user has it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memserve
from memserve.bench.vllm_engine import ROOT, python_of, why_missing
from memserve.hosts import free_port
from memserve.pool.segment import SHM_DIRECTORY
from memserve.vllm.server import tier_settings
from tests.fakes import until, url_told
from tests.insider import ask

# Of another version than the installed one: the interpreter of its environment.
OTHER = os.environ.get("MEMSERVE_TEST_VLLM")
PYTHON = Path(OTHER) if OTHER else python_of("vllm", ROOT)
MISSING = None if OTHER else why_missing("vllm", ROOT)
# A server takes half a minute to start, and minutes where the machine has other work.
START_SECONDS = 280
SOURCE = Path(memserve.__file__).parents[1]  # vLLM's environment has no package of ours
# In place of `vllm serve`; -P, since the directory of the script is not to be imported from.
FORKING = [str(PYTHON), "-P", str(Path(__file__).with_name("vllm_forking.py"))]
BLOCK = 32
LARGE = "67108864"  # bytes of vLLM's own KV cache, for all that a test asks
CONFIG = """
model.path = {model}
model.dtype = "float32"
gateway.port = 0
gateway.prove_handover = false  # hand-overs are counted
gateway.policy = "{policy}"
cache.caching = "{caching}"
"""
INSTANCE = """
[[instance]]
engine = "vllm"
threads = 1
{settings}
vllm_command = ["env", {path}, {environment}{command}]
vllm_args = ["--enforce-eager", "--block-size", "{block}", {arguments}]
"""


@dataclass(frozen=True)
class Instances:
    """A table of the cluster's file. `settings`: lines of TOML."""

    settings: str = ""
    arguments: tuple[str, ...] = ("--kv-cache-memory-bytes", LARGE)
    block: int = BLOCK
    environment: str = ""  # one more variable of vLLM's


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    cached: int  # of the prompt
    figures: dict[str, Any]  # `usage.memserve`


class Cluster:
    """One that runs."""

    def __init__(self, url: str, model: str, process: subprocess.Popen[str], log: Path) -> None:
        self.url = url
        self.model = model
        self.process = process
        self.log = log

    def members(self) -> list[dict[str, Any]]:
        """As `GET /cluster` has them."""
        time.sleep(0.25)  # who waits for something asks often, and is another signer each time
        answer = ask(self.url, "/cluster")
        assert answer.status == 200, answer.text
        members: list[dict[str, Any]] = answer.json["instances"]
        return members

    def complete(self, prompt: list[int], tokens: int, **more: Any) -> Answer:
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True, **more}
        done = post(self.url, "/v1/completions", body)
        usage = done["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return Answer(done["choices"][0]["token_ids"], cached, usage["memserve"])


@contextmanager
def up(
    model: Path,
    directory: Path,
    *tables: Instances,
    caching: str = "full",
    policy: str = "prompt-tree",
    more: str = "",
) -> Iterator[Cluster]:
    """A cluster with these instances, whose file and log are in `directory`; `more`: lines of
    the file."""
    config, log = directory / "cluster.toml", directory / "log"
    text = CONFIG.format(model=json.dumps(str(model)), caching=caching, policy=policy) + more
    for table in tables:
        text += INSTANCE.format(
            settings=table.settings,
            path=json.dumps(f"PYTHONPATH={SOURCE}"),
            environment=f"{json.dumps(table.environment)}, " if table.environment else "",
            command=json.dumps(FORKING)[1:-1],
            block=table.block,
            arguments=json.dumps(table.arguments)[1:-1],
        )
    config.write_text(text)
    with log.open("wb") as output:
        process = subprocess.Popen(
            (sys.executable, "-m", "memserve", "up", "--no-dashboard", str(config)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
    assert process.stdout is not None
    try:
        url = url_told(process.stdout)
        assert url is not None, log.read_text()[-4000:]
        yield Cluster(url, str(model), process, log)
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def gateway(model: Path, directory: Path, policy: str) -> Iterator[Cluster]:
    """A gateway alone, which instances may join."""
    command = [sys.executable, "-m", "memserve", "gateway", "--model", str(model), "--port", "0"]
    log = directory / "gateway.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--policy", policy], stdout=subprocess.PIPE, stderr=output, text=True
        )
    assert process.stdout is not None
    try:
        yield Cluster(process.stdout.readline().strip(), str(model), process, log)
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def server(model: Path, join: str, role: str) -> Iterator[str]:
    """A vLLM server as anybody starts one, with one flag more; its URL, at once."""
    port = free_port()
    tier = tier_settings("16MiB", role=role, join=join, instance=role)
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--kv-cache-memory-bytes", LARGE]
    command += ["--enable-prompt-tokens-details", "--kv-transfer-config", json.dumps(tier)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        # As the kernel does where memory is short: nothing of it gets to say a word, and whoever is
        # beside it has to clear up.
        (engine,) = descendants(process.pid, "VLLM::EngineCore")
        os.kill(engine, signal.SIGKILL)
        try:
            process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), method="POST")
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def prompt_of(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(5, 500), k=tokens)


def segments() -> set[Path]:
    """Shared memory of the pools of all processes below this one."""
    owners = set(map(str, descendants(os.getpid(), "")))
    # memserve-NAMESPACE-PID-...
    return {path for path in SHM_DIRECTORY.glob("memserve-*") if path.name.split("-")[2] in owners}


def until_gone(paths: set[Path]) -> None:
    until(lambda: not any(path.exists() for path in paths))


def descendants(process: int, name: str) -> list[int]:
    """Processes below one whose title begins with `name`, in the order in which they began."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            titles[int(entry.name)] = (entry / "cmdline").read_bytes().decode().strip("\0 ")
        except OSError:  # it has ended meanwhile
            continue
        parents[int(entry.name)] = int(fields[1])

    def is_below(one: int) -> bool:
        while one in parents:
            if one == process:
                return True
            one = parents[one]
        return False

    return sorted(one for one, title in titles.items() if title.startswith(name) and is_below(one))
