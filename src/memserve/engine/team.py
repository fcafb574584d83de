"""Who may compute with several threads: one at a time.

GNU's OpenMP keeps a team of threads for whoever has computed with several, until that thread ends.
While the teams' threads outnumber the cores, those that wait for each other sleep instead of
spinning. A decode step has some three hundred such waits: on two cores with one idle team beside
the engine's it took 54 ms instead of 37.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def use_one_thread() -> None:
    """This thread is to have no team. PyTorch gives one to each thread that computes."""
    torch.set_num_threads(1)


def with_team(threads: int, work: Callable[[], T]) -> T:
    """Do `work` in a thread that has a team of so many, and ends with it."""
    with ThreadPoolExecutor(1, "team", torch.set_num_threads, (threads,)) as thread:
        return thread.submit(work).result()
