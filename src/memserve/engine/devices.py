"""What PyTorch's devices are capable of. `python -m memserve.engine.devices` prints the free bytes
of this machine's CUDA devices, as JSON.

In a process of its own, so that who asks keeps neither torch nor a CUDA context.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import torch

_LEAST_CAPABILITY = (8, 0)  # Ampere: the first with matrix units for bfloat16


def runs_triton(device: torch.device) -> bool:
    """Whether the engine's Triton kernels run on `device`."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def device_name(device: torch.device) -> str:
    """Return the name of a GPU; of a CPU, "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def main() -> None:
    """Print the free bytes of each device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    print(json.dumps([torch.cuda.mem_get_info(index)[0] for index in range(count)]))


if __name__ == "__main__":
    main()
