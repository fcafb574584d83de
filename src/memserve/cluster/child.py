"""One child process: its address, its output, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from memserve.api.control import how_ended
from memserve.api.serving import Shutdown, hold_reloads, release_reloads
from memserve.cluster.line_printer import Lines
from memserve.errors import ClusterError

log = logging.getLogger(__name__)

# Lines of a child's output that are kept: the last ones, and the last ones not shown.
_TAIL_LINES = 30
_CHUNK_BYTES = 1 << 16  # a pipe's size
# Longest wait for a dead child's last output, which is in the pipe already.
_LAST_WORDS_SECONDS = 1.0
# The line with a process's address (`api.serving.announce`), which has nothing else.
_address = re.compile(r"https?://[^\s/]+")


class Child:
    """A process `python -m MODULE ARGUMENTS...` in a session of its own, so that Ctrl-C reaches the
    parent only.

    It ends with its parent (see `watchdog`). The caller of `spawn` owns it and must end it.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        self._address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)  # the last lines not shown
        self._last: deque[str] = deque(maxlen=_TAIL_LINES)  # the last lines
        self._show: Callable[[str], None] | None = None
        self._output = asyncio.ensure_future(self._read_output())
        self.ended = asyncio.ensure_future(self._end())  # its exit code

    @classmethod
    async def spawn(
        cls,
        name: str,
        arguments: Sequence[str],
        module: str = "memserve",
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        """Start a process. Its last lines are kept until `show_output`. `environment`: variables in
        addition to this process's, for secrets, which arguments would show to all users."""
        starting = asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # do not import files of the working directory that are named like modules
            "-m",
            module,
            *arguments,
            "--exit-with-parent",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        hold_reloads()  # the child inherits it: SIGHUP must not end it while it loads
        try:
            return cls(name, await starting)
        finally:
            release_reloads()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def address(self) -> str:
        """Return the child's URL as soon as it listens. Raises ClusterError if it ends before."""
        await asyncio.wait((self._address, self.ended), return_when=asyncio.FIRST_COMPLETED)
        if not self._address.done():
            raise await self.failure()
        return self._address.result()

    async def failure(self, whole: bool = False) -> ClusterError:
        """Wait until the child ends. Return an error with its exit code and its last lines that
        were not shown; with `whole`, shown ones, too."""
        code = await self.ended
        said = "".join(f"\n  {line}" for line in (self._last if whole else self._tail))
        return ClusterError(f"{self.name} ended with {how_ended(code)}{':' if said else ''}{said}")

    def show_output(self, show: Callable[[str], None]) -> None:
        """Call `show` with the kept lines, and with all further ones. `show` must not block: the
        child's output is not read until it returns."""
        self._show = show
        while self._tail:
            self._hand_over(self._tail.popleft())

    def terminate(self) -> None:
        """Send SIGTERM, the request to end in order; a second one does not wait for requests."""
        self._signal(signal.SIGTERM)

    def reload(self) -> None:
        """Send SIGHUP, the request to read changeable files, such as API keys, again."""
        self._signal(signal.SIGHUP)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def _end(self) -> int:
        code = await self._process.wait()
        await asyncio.wait((self._output,), timeout=_LAST_WORDS_SECONDS)
        return code

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # the child has just ended by itself
            self._process.send_signal(number)

    async def _read_output(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        lines = Lines()
        while data := await stdout.read(_CHUNK_BYTES):
            for line in lines.feed(data):
                self._take(line)
        for line in lines.end():
            self._take(line)

    def _take(self, line: str) -> None:
        if not self._address.done() and _address.fullmatch(line):
            self._address.set_result(line)
            return
        self._last.append(line)
        if self._show is not None:
            self._hand_over(line)
        else:
            self._tail.append(line)

    def _hand_over(self, line: str) -> None:
        assert self._show is not None
        try:
            self._show(f"{self.name}: {line}")
        except Exception as error:  # noqa: BLE001 - reading the child's output must go on
            log.debug("a line of %s could not be shown: %r", self.name, error)


async def end_children(
    children: Sequence[Child], shutdown: Shutdown, seconds: float, kill_seconds: float
) -> None:
    """End children: SIGTERM; after `seconds`, or as soon as the shutdown is forced, SIGTERM again;
    after `kill_seconds` more SIGKILL. Returns when all have ended."""
    if not children:
        return

    async def all_ended() -> None:
        await asyncio.wait([child.ended for child in children])

    for child in children:
        child.terminate()
    if await shutdown.wait_for(all_ended(), seconds):
        return
    for child in children:
        child.terminate()
    await asyncio.wait([child.ended for child in children], timeout=kill_seconds)
    for child in children:
        child.kill()
    await all_ended()
