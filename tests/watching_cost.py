"""What a dashboard costs a gateway: `python -m tests.watching_cost [MEMBERS] [SECONDS]`.

Prints the CPU of a gateway's process, in percent of one core, with fake members and its last
decisions at their limit: while nobody looks, and while a `Watcher` polls as the dashboard does.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from memserve.scheduler.decisions import KEPT_DECISIONS
from memserve.watch.watcher import Watcher
from tests.fakes import FakeCluster, FakeEngine, tiny_tokenizer


def main(members: int = 64, seconds: float = 30.0) -> None:
    directory = Path(tempfile.mkdtemp())
    tokenizer = tiny_tokenizer(directory)
    # This cluster's own gateway runs beside its members; the one that is measured is a process.
    with FakeCluster(tokenizer, [FakeEngine() for _ in range(members)]) as cluster:
        command = [sys.executable, "-m", "tests.e2e.serve_fake", "gateway", str(directory)]
        child = subprocess.Popen([*command, *cluster.urls], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        url = child.stdout.readline().strip()
        try:
            _ask(url, KEPT_DECISIONS)
            measured = psutil.Process(child.pid)
            idle = asyncio.run(_percent(measured, seconds, None))
            watched = asyncio.run(_percent(measured, seconds, url, members))
        finally:
            child.terminate()
            child.wait()
    print(
        f"{members} members: {idle:.2f} % of a core alone, {watched:.2f} % with a dashboard, "
        f"{watched - idle:.2f} % for it"
    )


def _ask(url: str, count: int) -> None:
    def ask(times: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        body = json.dumps({"prompt": "the quick brown fox", "max_tokens": 1})
        for _ in range(times):
            connection.request(
                "POST", "/v1/completions", body, {"content-type": "application/json"}
            )
            connection.getresponse().read()

    threads = [threading.Thread(target=ask, args=(count // 4,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def _percent(
    process: psutil.Process, seconds: float, url: str | None, members: int = 0
) -> float:
    """CPU of a process over a time, in percent of a core; with `url`, while that is polled, which
    must tell of so many members."""
    async with Watcher([] if url is None else [url]) as watcher:
        watching = None
        if url is not None:
            await watcher.poll()
            watching = asyncio.create_task(watcher.run(lambda: None))
            assert watcher.history.latest is not None, watcher.trouble
            assert len(watcher.history.latest.decisions) == 50
        before = process.cpu_times()
        await asyncio.sleep(seconds)
        after = process.cpu_times()
        if watching is not None:
            assert not watcher.failures
            seen = watcher.history.latest
            assert sum(member.stats is not None for member in seen.members) == members
            assert len(watcher.history.points) > 0.5 * seconds
            watching.cancel()
    return 100 * (after.user + after.system - before.user - before.system) / seconds


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
