"""Control of OpenMP's thread teams: only one thread of the process computes with several threads.

GNU's OpenMP keeps a team for each thread that has computed with several threads, until that thread
ends. While the teams' threads outnumber the cores, they sleep at barriers instead of spinning. A
decode step has about three hundred barriers: on two cores it took 54 ms instead of 37 ms with one
idle team beside the engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def use_one_thread() -> None:
    """Give the calling thread no team. By default PyTorch gives each computing thread one."""
    torch.set_num_threads(1)


def with_team(threads: int, work: Callable[[], T]) -> T:
    """Run `work` in a thread with a team of `threads`, which ends afterwards. Returns the result
    of `work`."""
    with ThreadPoolExecutor(1, "team", torch.set_num_threads, (threads,)) as thread:
        return thread.submit(work).result()
