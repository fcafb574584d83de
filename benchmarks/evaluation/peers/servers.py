"""How the servers of a contest are started: each until the end of a stack of contexts."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from evaluation import with_evaluation
from evaluation.peers.process import PeerFailed, PeerServer, serving
from evaluation.peers.vllm import VllmSettings, vllm_command, vllm_environment
from memserve.bench.measure import started_cluster
from memserve.bench.vllm_engine import ROOT, python_of
from memserve.config import (
    ClusterConfig,
    Dtype,
    GatewayConfig,
    InstanceConfig,
    ModelConfig,
    Policy,
)
from memserve.hosts import free_port
from memserve.models.chat_template import DEFAULT_CHAT_TEMPLATE
from memserve.models.resolve import ModelDirectory, Progress

CONTEXT = 4096  # tokens
ROUTER_SECONDS = 60.0  # to find its instances
LMCACHE_VARIABLES = {"LMCACHE_TRACK_USAGE": "false"}  # else it tells its makers
_TRANSFORMERS = "evaluation.peers.transformers_process"
_SPLIT_PROXY = "evaluation.peers.split_proxy"
_LMCACHE = "lmcache.v1.multiprocess.server"


@asynccontextmanager
async def ours(
    model: ModelDirectory,
    dtype: Dtype,
    instances: Sequence[InstanceConfig],
    progress: Progress,
    policy: Policy = "prompt-tree",
) -> AsyncIterator[str]:
    """As `memserve up` starts them behind a gateway; its URL."""
    cluster = ClusterConfig(
        model=ModelConfig(path=str(model.path), dtype=dtype, max_model_len=CONTEXT),
        gateway=GatewayConfig(access_log=False, policy=policy),
        instance=tuple(instances),
    )
    async with started_cluster(cluster, progress) as started:
        yield started.url


def start_vllm(
    stack: AsyncExitStack,
    model: Path,
    dtype: Dtype,
    cores: Sequence[int],
    *,
    caching: bool = True,
    arguments: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    peer: str = "vllm",
) -> PeerServer:
    """`arguments` and `variables`: more of its command line and of its environment. `peer`: whose
    Python has this vLLM."""
    folder = stack.enter_context(TemporaryDirectory(prefix="memserve-peer-"))
    settings = VllmSettings(
        model=str(model),
        port=free_port(),
        dtype=dtype,
        max_model_len=CONTEXT,
        prefix_caching=caching,
        extra=(*_template(model, Path(folder)), *arguments),
    )
    command = vllm_command(python_of(peer), settings)
    environment = {**vllm_environment(len(cores), cores), **(variables or {})}
    return stack.enter_context(serving("vLLM", command, environment, settings.port))


def _template(model: Path, folder: Path) -> tuple[str, ...]:
    """vLLM serves no chats with a model that has no template; ours has one for such models."""
    settings = (model / "tokenizer_config.json").read_text(encoding="utf-8")
    if (model / "chat_template.jinja").exists() or '"chat_template"' in settings:
        return ()
    file = folder / "template.jinja"
    file.write_text(DEFAULT_CHAT_TEMPLATE, encoding="utf-8")
    return "--chat-template", str(file)


def start_generate(
    stack: AsyncExitStack, dtype: Dtype, model: Path, cores: Sequence[int]
) -> PeerServer:
    port = free_port()
    where = (str(len(cores)), ",".join(map(str, cores)), str(port))
    command = [sys.executable, "-P", "-m", _TRANSFORMERS, str(model), dtype, *where]
    environment = with_evaluation(vllm_environment(len(cores), cores))
    return stack.enter_context(serving("Transformers", command, environment, port))


def start_router(stack: AsyncExitStack, urls: Sequence[str]) -> PeerServer:
    port = free_port()
    command = [
        *(str(ROOT / "routers" / "bin" / "vllm-router"), "--host", "127.0.0.1"),
        *("--port", str(port), "--prometheus-port", str(free_port()), "--log-level", "error"),
        *("--policy", "cache_aware", "--worker-urls", *urls),
    ]
    environment = vllm_environment(1, ())
    return stack.enter_context(serving("vllm-router", command, environment, port))


def start_lmcache(stack: AsyncExitStack, port: int, size: int, chunk: int) -> PeerServer:
    """LMCache's server, which holds the KV of all vLLM servers that know its port. `size`: bytes;
    `chunk`: tokens that it stores as one."""
    command = [
        *(str(python_of("lmcache")), "-W", "ignore", "-m", _LMCACHE),
        *("--host", "127.0.0.1", "--port", str(port), "--chunk-size", str(chunk)),
        *("--l1-size-gb", str(size / (1 << 30)), "--eviction-policy", "LRU"),
        # A thread for each of two servers. It reads and writes their KV memory itself: vLLM's
        # side copies no model of several KV groups, such as Gemma 3.
        *("--max-workers", "2", "--supported-transfer-mode", "lmcache_driven"),
        "--disable-observability",
    ]
    environment = {**vllm_environment(1, ()), **LMCACHE_VARIABLES}
    return stack.enter_context(serving("LMCache", command, environment, port))


def start_split_proxy(stack: AsyncExitStack, prefill: str, decode: str) -> PeerServer:
    """In front of a vLLM that computes prompts and one that decodes, at these URLs."""
    port = free_port()
    command = [sys.executable, "-P", "-m", _SPLIT_PROXY, prefill, decode, str(port)]
    environment = with_evaluation(vllm_environment(1, ()))
    return stack.enter_context(serving("proxy", command, environment, port))


async def ready(
    peers: Sequence[tuple[str, PeerServer]],
    skipped: dict[str, str],
    seconds: float,
    progress: Progress,
) -> dict[str, str]:
    """URLs of those that have come up; the others are skipped."""
    found = {}
    for name, server in peers:
        progress(f"waiting for {name}")
        try:
            await asyncio.to_thread(server.wait_ready, seconds)
        except PeerFailed as error:
            skipped[name] = str(error)
        else:
            found[name] = server.url
    return found
