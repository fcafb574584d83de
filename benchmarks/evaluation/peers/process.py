"""Servers of peers as processes: started together, ready when they name their models."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from memserve.errors import MemserveError

_POLL_SECONDS = 0.5
_ASK_SECONDS = 5.0  # for a list of models: servers that load answer late, or not at all
_END_SECONDS = 10.0  # after SIGTERM, to end the processes that it has started itself
_TOLD_LINES = 5
# The end of a traceback, in vLLM's logs behind the process and the place of the line.
_CAUSE = re.compile(
    r"(?:\([^)]*\) )?(?:ERROR [^\[]*\[[^\]]*\] )?((?:\w+\.)*\w*(?:Error|Exception): .+)"
)


class PeerFailed(MemserveError):
    """A peer that does not start, or does not do what is asked of it."""


class PeerServer:
    """One server, from its start to the end of `serving`."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path, url: str) -> None:
        self.name = name
        self.url = url
        self.group = process.pid  # of all its processes
        self._process = process
        self._log = log

    def wait_ready(self, seconds: float) -> None:
        """Until it names its models. Raises PeerFailed with its last lines."""
        self._wait(self._names_models, seconds)

    def wait_listening(self, seconds: float) -> None:
        """Until it takes connections: for servers that do not speak HTTP. Raises as wait_ready."""
        self._wait(self._listens, seconds)

    def _wait(self, is_ready: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise PeerFailed(f"{self.name} ended while it started: {self.why_ended()}")
            if is_ready():
                return
            time.sleep(_POLL_SECONDS)
        raise PeerFailed(f"{self.name} is not ready after {seconds:.0f} s: {self.last_lines()}")

    def _names_models(self) -> bool:
        try:
            with urlopen(f"{self.url}/v1/models", timeout=_ASK_SECONDS) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def _listens(self) -> bool:
        at = urlsplit(self.url)
        try:
            with socket.create_connection((at.hostname, at.port), _ASK_SECONDS):
                return True
        except OSError:
            return False

    def why_ended(self) -> str:
        """The first error that it told, from which the others followed; else its last lines."""
        for line in self._lines():
            if (cause := _CAUSE.match(line)) is not None:
                return cause[1].strip()
        return self.last_lines()

    def last_lines(self) -> str:
        lines = self._lines()
        return " | ".join(line.strip() for line in lines[-_TOLD_LINES:])

    def _lines(self) -> list[str]:
        return self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()


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


def end_with_parent() -> None:
    """For a server of ours: measuring is over when whoever started this process is gone."""
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
