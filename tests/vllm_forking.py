"""`python vllm_forking.py ARGUMENTS`: vLLM's OpenAI server, whose engine and workers are its forks.

As on CUDA, where vLLM forks by default. On a CPU it spawns them, and each of the three processes
imports vLLM anew: 11 s of CPU time each, and all that a server with a tiny model takes to start.
Forking is safe as long as no parent has run an OpenMP region: OMP_NUM_THREADS=1.
Run by vLLM's Python; it needs nothing of ours.
"""

from __future__ import annotations

import multiprocessing
import runpy
from multiprocessing.context import BaseContext

from vllm.utils import system_utils


def fork_context() -> BaseContext:
    return multiprocessing.get_context("fork")


def main() -> None:
    # Before any module of vLLM has imported the function by its name.
    system_utils.get_mp_context = fork_context
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
