"""An emulated link: two network namespaces on this machine with a limited rate between them."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from memserve.errors import EmulationError

# Seconds for `ip` and `tc`, which answer at once, or wait for a lock of the kernel.
_TOOL_TIMEOUT = 30.0
# The token bucket holds the bytes of this time: a timer tick, and a little more.
_BURST_SECONDS = 0.004
_QUEUE = "50ms"
_DEVICE = "cable"


@dataclass(frozen=True, slots=True)
class End:
    """One end of the link: a network namespace and its address."""

    namespace: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """The prefix of a command that runs it at this end."""
        return ("ip", "netns", "exec", self.namespace)


class EmulatedLink:
    """A veth pair with both ends shaped to `bits_per_second`. Needs root and iproute2."""

    def __init__(self, bits_per_second: int) -> None:
        self.bits_per_second = bits_per_second
        name = f"memserve-{os.getpid()}"
        self.near = End(f"{name}-a", "10.213.77.1")
        self.far = End(f"{name}-b", "10.213.77.2")
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        """Raises EmulationError with the reason."""
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise EmulationError(f"no command {tool!r}; install iproute2")
        with ExitStack() as made:
            for end in (self.near, self.far):
                _run("ip", "netns", "add", end.namespace)
                made.callback(_run, "ip", "netns", "del", end.namespace)
            pair = ("type", "veth", "peer", "name", _DEVICE, "netns", self.far.namespace)
            _run("ip", "link", "add", "name", _DEVICE, "netns", self.near.namespace, *pair)
            for end in (self.near, self.far):
                inside = ("-n", end.namespace)
                _run("ip", *inside, "link", "set", "lo", "up")  # UCX connects to itself, too
                _run("ip", *inside, "address", "add", f"{end.address}/30", "dev", _DEVICE)
                _run("ip", *inside, "link", "set", _DEVICE, "up")
                burst = str(int(self.bits_per_second / 8 * _BURST_SECONDS))
                shape = ("tbf", "rate", f"{self.bits_per_second}bit", "burst", burst)
                where = ("qdisc", "add", "dev", _DEVICE, "root")
                _run("tc", *inside, *where, *shape, "latency", _QUEUE)
            self._cleanup = made.pop_all()
        return self

    def cut(self) -> None:
        """Drop all packets from now on, without an error at either end."""
        _run("ip", "-n", self.far.namespace, "link", "set", _DEVICE, "down")

    def mend(self) -> None:
        _run("ip", "-n", self.far.namespace, "link", "set", _DEVICE, "up")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()


def _run(*command: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=_TOOL_TIMEOUT
    )
    if done.returncode:
        raise EmulationError(f"{' '.join(command)}: {done.stderr.strip()}")
