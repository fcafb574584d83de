"""Servers of peers as processes: started together, ready when they name their models."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import urlopen

from memserve.errors import MemserveError

_POLL_SECONDS = 0.5
_ASK_SECONDS = 5.0  # for a list of models: servers that load answer late, or not at all
_END_SECONDS = 10.0  # after SIGTERM, to end the processes that it has started itself
_TOLD_LINES = 5


class PeerFailed(MemserveError):
    """A peer that does not start, or does not do what is asked of it."""


class PeerServer:
    """One server, from its start to the end of `serving`."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path, url: str) -> None:
        self.name = name
        self.url = url
        self._process = process
        self._log = log

    def wait_ready(self, seconds: float) -> None:
        """Raises PeerFailed with its last lines."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise PeerFailed(f"{self.name} ended while it started: {self.last_lines()}")
            try:
                with urlopen(f"{self.url}/v1/models", timeout=_ASK_SECONDS) as answer:
                    if answer.status == 200:
                        return
            except (URLError, OSError):
                pass
            time.sleep(_POLL_SECONDS)
        raise PeerFailed(f"{self.name} is not ready after {seconds:.0f} s: {self.last_lines()}")

    def last_lines(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-_TOLD_LINES:])


@contextmanager
def serving(
    name: str, command: Sequence[str], environment: Mapping[str, str], port: int
) -> Iterator[PeerServer]:
    """Start a server on a port of this machine, and end it with all that it started."""
    with TemporaryDirectory(prefix="memserve-peer-") as folder:
        log = Path(folder) / "output"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its processes are one group, which ends as one
            )
        try:
            yield PeerServer(name, process, log, f"http://127.0.0.1:{port}")
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    _signal(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)
    _signal(process.pid, signal.SIGKILL)
    process.wait()


def _signal(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return  # nobody is left
