"""vLLM servers as the instances of a cluster that is measured: `--engine vllm`.

vLLM has an environment of its own, because its dependencies contradict ours; `make vllm` makes it.
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

# Environments of other servers, below the working directory, as everything that is built.
ROOT = Path("build/peers")
LARGE_KV = 512 << 20  # bytes of vLLM's own KV memory, for all that is asked
_SOURCE = Path(memserve.__file__).parents[1]  # vLLM's environment has no package of ours
BLOCK_TOKENS = 32  # tokens; vLLM's 128 would leave little of a short conversation's turns to share
_DRAM = "1GiB"  # behind vLLM's own memory


def python_of(peer: str, root: Path = ROOT) -> Path:
    """The Python of an environment, whether it is there or not."""
    return root / peer / "bin" / "python"


def marker_of(peer: str, root: Path = ROOT) -> Path:
    """The file that is written last: an environment without it is unfinished."""
    return root / peer / ".installed"


def why_missing(peer: str, root: Path = ROOT) -> str | None:
    """Why an environment cannot be used; None: it can."""
    if marker_of(peer, root).exists():
        return None
    return f"not installed in {root / peer}: run `make peers-install`"


def vllm_arguments(kv_bytes: int, step_tokens: int | None = None) -> tuple[str, ...]:
    """The flags of vLLM servers that are compared; they come last and prevail. `step_tokens`: of
    a step at most; None: vLLM's default."""
    step = () if step_tokens is None else ("--max-num-batched-tokens", str(step_tokens))
    return (
        *("--enforce-eager", "--block-size", str(BLOCK_TOKENS)),
        *("--kv-cache-memory-bytes", str(kv_bytes), *step),
    )


def own_instance(
    core: int | None, dram: str, arguments: Sequence[str], role: Role = Role.COLOCATED
) -> InstanceConfig:
    """A vLLM server with our pool behind it. `core`: that it computes on; None: any."""
    python = str(python_of("vllm").absolute())
    quiet = ("VLLM_NO_USAGE_STATS=1", "HF_HUB_OFFLINE=1")
    module = ("-W", "ignore", "-m", "vllm.entrypoints.openai.api_server")
    return InstanceConfig(
        engine="vllm",
        role=role,
        threads=1,
        cpus=None if core is None else (core,),
        dram=dram,
        profile="off",
        vllm_command=("env", f"PYTHONPATH={_SOURCE}", *quiet, python, *module),
        vllm_args=tuple(arguments),
    )


def as_vllm(instances: Sequence[InstanceConfig]) -> tuple[InstanceConfig, ...]:
    """The given instances with vLLM servers, on a core each if there are several. Raises
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
