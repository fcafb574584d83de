"""One child process: where it listens, what it says, and how it ends."""

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
from memserve.cluster.lines import Lines
from memserve.errors import ClusterError

log = logging.getLogger(__name__)

# What is kept of a child's output until somebody wants to see it.
_TAIL_LINES = 30
_CHUNK_BYTES = 1 << 16  # a pipe's size
# For a dead child's last output to arrive: it is in the pipe already.
_LAST_WORDS_SECONDS = 1.0
# The line with which a process says where it listens (`api.serving.announce`): nothing else.
_address = re.compile(r"https?://[^\s/]+")


class Child:
    """`python -m MODULE ARGUMENTS...` in a session of its own, so that Ctrl-C reaches the
    parent only.

    It ends with its parent (see `watchdog`). Owned by whoever spawned it, who must end it.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        self._address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)  # that nobody has seen
        self._last: deque[str] = deque(maxlen=_TAIL_LINES)
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
        """Start it. What it prints is kept until `show_output`. `environment`: in addition to
        this process's; for what no argument may say."""
        starting = asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # a file here that is named like a module of Python's is none of ours
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
        hold_reloads()  # it has to load before it can take one, and must not end by it
        try:
            return cls(name, await starting)
        finally:
            release_reloads()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def address(self) -> str:
        """The URL that it listens on, once it does. Raises ClusterError if it ends before."""
        await asyncio.wait((self._address, self.ended), return_when=asyncio.FIRST_COMPLETED)
        if not self._address.done():
            raise await self.failure()
        return self._address.result()

    async def failure(self, whole: bool = False) -> ClusterError:
        """Waits until it ends; how that was, with its last lines that nobody has seen, or all
        of its last lines."""
        code = await self.ended
        said = "".join(f"\n  {line}" for line in (self._last if whole else self._tail))
        return ClusterError(f"{self.name} ended with {how_ended(code)}{':' if said else ''}{said}")

    def show_output(self, show: Callable[[str], None]) -> None:
        """Hand over its lines: those that were kept, and all that come from now on. `show`
        must not wait: until it returns, the child's output is not read."""
        self._show = show
        while self._tail:
            self._hand_over(self._tail.popleft())

    def terminate(self) -> None:
        """Ask it to end in order; asked twice, it waits for no request."""
        self._signal(signal.SIGTERM)

    def reload(self) -> None:
        """Ask it to read again what may change while it runs."""
        self._signal(signal.SIGHUP)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def _end(self) -> int:
        code = await self._process.wait()
        await asyncio.wait((self._output,), timeout=_LAST_WORDS_SECONDS)
        return code

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
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
        except Exception as error:  # noqa: BLE001 - a child must be read on, whoever shows it
            log.debug("a line of %s could not be shown: %r", self.name, error)


async def end_children(
    children: Sequence[Child], shutdown: Shutdown, seconds: float, kill_seconds: float
) -> None:
    """Ask them to end; after so many seconds, or as soon as the shutdown is forced, once more;
    after `kill_seconds` more kill those that are left."""
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
