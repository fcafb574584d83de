"""The `memserve` command with engines that have no model: `python -m tests.e2e.fake_memserve`.

MEMSERVE_FAKE_ENGINE holds the engine's arguments as JSON. An instance whose model directory
has a file `broken` does not load; one of which there is a file `slow-ID` loads until that is gone.
A file `kill-NAME` there is taken by one process, whose task or thread of this name ends then.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from memserve import cli
from memserve.api.status import PoolTotals
from memserve.cluster.local import LocalBackend
from memserve.config import ClusterConfig, InstanceConfig
from memserve.errors import ModelError
from memserve.instance import run
from memserve.instance.parts import Identity, Parts
from memserve.models.tokenizer import Tokenizer
from memserve.vital import Vitals
from tests.fakes import FakeEngine


def build(config: ClusterConfig, settings: InstanceConfig, identity: Identity) -> Parts:
    directory = Path(config.model.path)
    if (directory / "broken").exists():
        raise ModelError("the weights are broken")
    while (directory / f"slow-{identity.id}").exists():
        time.sleep(0.01)
    engine = FakeEngine(**json.loads(os.environ.get("MEMSERVE_FAKE_ENGINE", "{}")))
    thread = threading.Thread(target=_mortal, args=(directory,), name="mortal", daemon=True)
    thread.start()
    tokenizer = Tokenizer.load(directory)
    return Parts(engine, tokenizer, PoolTotals, lambda: None, threads=lambda: (thread,))


def _mortal(directory: Path) -> None:
    while not _taken(directory, "mortal"):
        time.sleep(0.01)


def _taken(directory: Path, name: str) -> bool:
    """Whether this process is the one that took the file."""
    try:
        (directory / f"kill-{name}").rename(directory / f"killed-{os.getpid()}")
    except FileNotFoundError:
        return False
    return True


def _make_tasks_mortal(directory: Path) -> None:
    begin = Vitals.task

    async def until_killed(name: str, work: Coroutine[Any, Any, None]) -> None:
        running = asyncio.ensure_future(work)
        try:
            while not running.done():
                if _taken(directory, name):
                    raise RuntimeError("killed by a test")
                await asyncio.wait((running,), timeout=0.01)
            running.result()
        finally:
            running.cancel()

    def task(vitals: Vitals, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return begin(vitals, name, until_killed(name, work))

    Vitals.task = task  # type: ignore[method-assign]


if __name__ == "__main__":
    if directory := os.environ.get("MEMSERVE_FAKE_DEATHS"):
        _make_tasks_mortal(Path(directory))
    run._built_in = build
    cli.LocalBackend = partial(  # type: ignore[misc,assignment]
        LocalBackend, module="tests.e2e.fake_memserve"
    )
    cli.main()
