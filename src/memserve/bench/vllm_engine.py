"""vLLM servers as the instances of a measured cluster: `--engine vllm`.

vLLM has its own Python environment, because its dependencies conflict with memserve's; `make vllm`
creates it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

import memserve
from memserve.config import InstanceConfig
from memserve.errors import ConfigError
from memserve.types import Role

# Python environments of other servers, relative to the working directory.
ROOT = Path("build/peers")
LARGE_KV = 512 << 20  # bytes of vLLM's own KV memory: enough for a whole workload
SOURCE = Path(memserve.__file__).parents[1]  # vLLM's environment does not have memserve installed
BLOCK_TOKENS = 32  # with vLLM's 128, short turns would have few whole blocks to share
_DRAM = "1GiB"  # behind vLLM's own memory


def python_of(peer: str, root: Path = ROOT) -> Path:
    """Return the path of an environment's Python, which need not exist."""
    return root / peer / "bin" / "python"


def marker_of(peer: str, root: Path = ROOT) -> Path:
    """Return the path of the file that an installation writes last."""
    return root / peer / ".installed"


def why_missing(peer: str, root: Path = ROOT) -> str | None:
    """Return why an environment cannot be used; None if it can."""
    if marker_of(peer, root).exists():
        return None
    return f"not installed in {root / peer}: run `make peers-install`"


def vllm_arguments(kv_bytes: int, step_tokens: int | None = None) -> tuple[str, ...]:
    """Return the flags of measured vLLM servers, which override others. `kv_bytes`: KV memory.
    `step_tokens`: most tokens of a step; None: vLLM's default."""
    step = () if step_tokens is None else ("--max-num-batched-tokens", str(step_tokens))
    return (
        *("--enforce-eager", "--block-size", str(BLOCK_TOKENS)),
        *("--kv-cache-memory-bytes", str(kv_bytes), *step),
    )


def own_instance(
    core: int | None, dram: str, arguments: Sequence[str], role: Role = Role.COLOCATED
) -> InstanceConfig:
    """Return an instance with a vLLM server and a pool of size `dram` behind it. `core`: CPU core
    that it computes on; None: any."""
    python = str(python_of("vllm").absolute())
    quiet = ("VLLM_NO_USAGE_STATS=1", "HF_HUB_OFFLINE=1")
    module = ("-W", "ignore", "-m", "vllm.entrypoints.openai.api_server")
    return InstanceConfig(
        engine="vllm",
        role=role,
        threads=1,
        cpus=None if core is None else (core,),
        dram=dram,
        vllm_command=("env", f"PYTHONPATH={SOURCE}", *quiet, python, *module),
        vllm_args=tuple(arguments),
    )


def as_vllm(instances: Sequence[InstanceConfig]) -> tuple[InstanceConfig, ...]:
    """Return the instances with vLLM servers, on one core each if there are several. Raises
    ConfigError if vLLM is not installed."""
    if (why := why_missing("vllm")) is not None:
        raise ConfigError(f"--engine vllm: vLLM is {why}, or `make vllm`")
    arguments = vllm_arguments(LARGE_KV)
    if len(instances) == 1:
        (one,) = instances
        made = own_instance(None, _DRAM, arguments, one.role)
        return (msgspec.structs.replace(made, count=one.count),)
    cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
    return tuple(own_instance(next(cores), _DRAM, arguments, each.role) for each in instances)
