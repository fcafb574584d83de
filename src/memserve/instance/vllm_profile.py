"""Cost model of a vLLM server, measured by requests to it before its instance is ready."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

import msgspec
import numpy as np

from memserve.clock import MonotonicClock
from memserve.config import ClusterConfig, InstanceConfig, available_cores
from memserve.cpu import cpu_name
from memserve.engine.request import EngineInfo
from memserve.errors import EngineStopped, ModelError
from memserve.instance.probe import Probe, ProbeFailed
from memserve.instance.profiler import ProfilePlan, Profiler
from memserve.instance.profiling import instance_profile
from memserve.models.tokenizer import Tokenizer
from memserve.scheduler.architecture import read_architecture
from memserve.scheduler.hardware import HARDWARE, derive
from memserve.scheduler.profiles import (
    Hardware,
    Measurements,
    Profile,
    ProfileStore,
    Subject,
)
from memserve.types import Namespace, TokenArray
from memserve.vllm.engine import VllmEngine
from memserve.vllm.metrics import UnknownMetrics, read_load
from memserve.vllm.place import ServerPlace

log = logging.getLogger(__name__)

# Two rounds, of which the faster time of each point counts, since disturbances by other processes
# of the server's machine are not visible. The first decode point has a batch of one, the last one a
# long context.
PLAN = ProfilePlan(
    prefill=((64, 0), (512, 0), (64, 2048), (2048, 0), (256, 0)),
    decode=((1, 64), (8, 64), (8, 512)),
    blocks=(),
    rounds=2,
    seconds=8.0,  # short compared with a server's start
    needed=2,
    pool_tokens=0,
)
# Ordinary words: some models interpret the ids of special tokens (as an image, which is missing).
_TEXT = "The river runs past the old mill, and in the evening light seven boats come home. " * 4
_MOST_WAITING = 64  # more sequences than the plan submits at once
_DEFAULT_STEP_TOKENS = 2048  # vLLM's `--max-num-batched-tokens` where it is not given
_GPUS = Path("/proc/driver/nvidia/gpus")


def vllm_profile(
    config: ClusterConfig,
    settings: InstanceConfig,
    directory: Path,
    tokenizer: Tokenizer,
    place: ServerPlace,
    info: EngineInfo,
    store: ProfileStore,
) -> Profile | None:
    """Return the cost model of the server at `place`: the stored one, or with `profile = "auto"`
    one measured now, which is stored if this instance has started the server; else one derived
    from typical hardware. None, with a line in the log, for a model whose size cannot be read.
    """
    try:
        subject = _subject(config, settings, directory, place)
    except (ModelError, EngineStopped, OSError, HTTPException) as error:
        log.warning("no cost model: %s", error)
        return None

    def measure() -> Measurements:
        token_ids = np.unique(np.array(tokenizer.encode(_TEXT, False), dtype=np.int32))
        return measured_server(place, info, token_ids)

    # An attached server may be restarted with other arguments: its profile is not stored.
    kept = store if settings.vllm_url is None else None
    profile = instance_profile(subject, settings.profile, kept, measure)
    # KV moves between pools in host memory, also where the model is on a GPU.
    host = derive(HARDWARE["cpu"], subject.architecture, subject.max_batch_tokens)
    costs = msgspec.structs.replace(profile.costs, shm=host.shm)
    return msgspec.structs.replace(profile, costs=costs)


def measured_server(place: ServerPlace, info: EngineInfo, token_ids: TokenArray) -> Measurements:
    """Time prefills and decode steps of an idle server by requests with prompts of `token_ids`.

    The blocks that it caches for them are in namespaces that are not used again. Raises
    ProbeFailed, also if the server is in use by others.
    """
    try:
        load = read_load(place.ask("/metrics").decode())
    except (OSError, HTTPException, ValueError, EngineStopped, UnknownMetrics) as error:
        raise ProbeFailed(f"the vLLM server does not report its load: {error}") from error
    if load.running or load.waiting:
        raise ProbeFailed(f"others use the server: {load.running} run, {load.waiting} wait")
    tells_cached = ServerProbe(place, info, token_ids).caches()
    probe = ServerProbe(place, info, token_ids)  # an engine is started once
    probe.tells_cached, plan = tells_cached, PLAN
    if not tells_cached:
        log.info("cost model: the server reports no cached tokens; no prefix is measured")
        plan = replace(plan, prefill=[(n, c) for n, c in plan.prefill if not c])
    profiler = Profiler(probe, MonotonicClock(), lambda text: log.debug("cost model: %s", text))
    measured, _ = profiler.measure(plan, info.max_running)
    return measured


class ServerProbe(Probe):
    """Probe of a vLLM server, by an engine of its own. Prefixes are cached by computing them."""

    def __init__(self, place: ServerPlace, info: EngineInfo, token_ids: TokenArray) -> None:
        # All sequences of a point are submitted at once, which may exceed the instance's limit.
        engine = VllmEngine(place, replace(info, max_waiting=max(info.max_waiting, _MOST_WAITING)))
        super().__init__(engine, token_ids, info.block_tokens, info.pool_tokens)

    def caches(self) -> bool:
        """Return whether the server reports a cached block for a prompt's second run. Runs the
        engine, which cannot be used again."""
        block = self.block_tokens
        if self.longest_prompt < 2 * block:
            return False
        with self:
            try:
                self.prefill(2 * block, block)
            except ProbeFailed:
                return False
        return True

    def _typical(self, times: Sequence[float]) -> float:
        """Return the mean of the steps' seconds: several chunks of a stream may arrive together,
        after a longer wait for the first of them."""
        return float(np.mean(times))

    def _cache(self, prompts: Sequence[TokenArray], tokens: int, namespace: Namespace) -> None:
        # One token more: models with sliding windows keep a block only if tokens follow it.
        self._generate([prompt[: tokens + 1] for prompt in prompts], 1, namespace)

    def _forget(self, namespace: Namespace) -> None:
        """Do nothing: vLLM can only drop its whole cache, and evicts unused blocks by itself."""


class _Version(msgspec.Struct, frozen=True):
    version: str


def _subject(
    config: ClusterConfig, settings: InstanceConfig, directory: Path, place: ServerPlace
) -> Subject:
    """Return the key of the server's profile, which contains all arguments of the server. Raises
    ModelError, EngineStopped, OSError, HTTPException."""
    try:
        version = msgspec.json.decode(place.ask("/version"), type=_Version).version
    except msgspec.MsgspecError as error:
        raise EngineStopped(f"the vLLM server does not report its version: {error}") from error
    where = " ".join(settings.vllm_args) if settings.vllm_url is None else settings.vllm_url
    cores = len(settings.cpus) if settings.cpus is not None else available_cores()
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype  # 2 bytes, as vLLM's
    architecture = read_architecture(directory, directory.name, dtype)
    return Subject(
        hardware=Hardware(
            device=cpu_name() if "cpu" in version else _gpu_name() or cpu_name(),
            threads=settings.threads or cores,
            software=f"vllm {version} {where}".rstrip(),
        ),
        architecture=msgspec.structs.replace(
            architecture,
            tensor_parallel=_number(settings.vllm_args, "--tensor-parallel-size", "-tp") or 1,
        ),
        dtype=dtype,
        max_batch_tokens=_number(settings.vllm_args, "--max-num-batched-tokens")
        or _DEFAULT_STEP_TOKENS,
    )


def _number(arguments: Sequence[str], *names: str) -> int | None:
    """Return the value of the last of vLLM's arguments `names`, as `--name 2` or `--name=2`; None
    if none is given or it is no number."""
    value: int | None = None
    for at, argument in enumerate(arguments):
        name, _, given = argument.partition("=")
        if name in names:
            text = given or (arguments[at + 1] if at + 1 < len(arguments) else "")
            value = int(text) if text.isdecimal() and int(text) > 0 else value
    return value


def _gpu_name() -> str | None:
    """Return the name of the first NVIDIA GPU, as reported by its driver; None without one."""
    for path in sorted(_GPUS.glob("*/information")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return None
