"""`memserve up` as a process of its own, to be watched from outside as an operator would."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from memserve.api.status import InstanceState
from memserve.bench.measure import BenchmarkError
from memserve.cluster.client import ClusterClient
from memserve.cluster.member import ClusterView
from memserve.config import ClusterConfig
from memserve.errors import ClusterError, ConfigError
from memserve.hosts import free_port

MEMSERVE = (sys.executable, "-P", "-m", "memserve")
# A demo model is converted, and profiles are measured, at the first start on a machine.
START_SECONDS = 900.0
# Longer than `up` gives its children: a drain (30 s), `CLOSE_SECONDS` and `KILL_SECONDS`, twice.
STOP_SECONDS = 90.0
_POLL_SECONDS = 0.5
_TAIL_BYTES = 4_000  # of what `up` said, where it failed


class RunningUp:
    """Where it serves, and who it is."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, log: Path) -> None:
        self.url = url
        self.pid = process.pid
        self.log = log
        self._process = process

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    def last_words(self) -> str:
        return self.log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")

    def check(self) -> None:
        """Raises BenchmarkError if it has ended."""
        if self.ended:
            code = self._process.returncode
            raise BenchmarkError(f"memserve up ended with {code}:\n{self.last_words()}")

    async def view(self) -> ClusterView | None:
        """None: the gateway does not answer."""
        try:
            async with ClusterClient(self.url) as client:
                return await client.view()
        except (ClusterError, ConfigError):  # its secret is just being written
            return None

    async def until_ready(self, instances: int, seconds: float) -> bool:
        """Whether so many instances came to be ready in time. Raises BenchmarkError if it ends."""
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            self.check()
            view = await self.view()
            if view is not None:
                ready = [m for m in view.instances if m.state is InstanceState.READY]
                if len(ready) == instances:
                    return True
            await asyncio.sleep(_POLL_SECONDS)
        return False


@asynccontextmanager
async def running_up(
    config: ClusterConfig,
    log: Path | None = None,
    command: Sequence[str] = MEMSERVE,
    start_seconds: float = START_SECONDS,
) -> AsyncIterator[RunningUp]:
    """Start a cluster at a free port, and end it. `log`: where its output goes.

    Raises BenchmarkError if it does not come to serve.
    """
    gateway = msgspec.structs.replace(config.gateway, port=free_port(config.gateway.host))
    config = msgspec.structs.replace(config, gateway=gateway)
    with tempfile.TemporaryDirectory(prefix="memserve-soak-") as directory:
        file = Path(directory) / "cluster.toml"
        file.write_text(to_toml(config), encoding="utf-8")
        output = log or Path(directory) / "up.log"
        with output.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                *command,
                "up",
                "--no-dashboard",  # measured is what serves
                str(file),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours
            )
        up = RunningUp(process, f"http://{gateway.host}:{gateway.port}", output)
        try:
            instances = sum(table.count for table in config.instance)
            if not await up.until_ready(instances, start_seconds):
                raise BenchmarkError(f"not ready after {start_seconds:g} s:\n{up.last_words()}")
            yield up
        finally:
            await _end(process)


def to_toml(config: ClusterConfig) -> str:
    """The file that `load_config` reads the same configuration from."""
    lines = []
    for name, section in msgspec.to_builtins(config).items():
        several = isinstance(section, tuple)
        for table in section if several else (section,):
            lines.append(f"[[{name}]]" if several else f"[{name}]")
            # JSON's strings, numbers, booleans and lists are TOML's, too.
            lines += [f"{key} = {json.dumps(v)}" for key, v in table.items() if v is not None]
    return "\n".join(lines) + "\n"


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
