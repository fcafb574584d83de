"""`python -m memserve.engine.devices`: this machine's CUDA devices, as JSON.

In a process of its own, so that who asks keeps neither torch nor a CUDA context.
"""

from __future__ import annotations

import json

import torch


def main() -> None:
    """Print the free bytes of each device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    print(json.dumps([torch.cuda.mem_get_info(index)[0] for index in range(count)]))


if __name__ == "__main__":
    main()
