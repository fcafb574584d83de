"""Hosts on one machine, for tests of clusters that span several.

A `Host` is a set of namespaces (network, mounts, processes, name) with its own `/dev/shm`, `/proc`
and `/sys`, and a link of limited rate to a switch that it shares with the others. All of it hangs
on processes of the test: the kernel takes it away however the test ends, and nothing is made in the
machine's own network. Needs root and Linux's usual tools; see `missing`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

import psutil
import pytest

from memserve.secrets import DIRECTORY_VARIABLE

GIGABIT = 1_000_000_000  # bits a second
NETWORK = "10.0.0"  # hosts are .1, .2, ...
TOOLS = ("ip", "tc", "unshare", "nsenter", "mount")
PATIENCE = 60.0  # seconds: many times what anything here takes
_TICK = 0.01
# The token bucket holds the bytes of this time: a timer tick, and a little more.
_BURST_SECONDS = 0.004
_QUEUE = "50ms"
_CLONE_NEWNET = 0x40000000
_DEVICE = "eth0"
_BRIDGE = "switch"
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")

# The first process of a set of namespaces. It ends with its standard input, a pipe of the test's,
# and with it everything in them. SIGCHLD is ignored so that the kernel reaps orphans.
_SWITCH_INIT = f"""
set -e
ip link add {_BRIDGE} type bridge
ip link set {_BRIDGE} up
trap '' CHLD; echo up; exec cat
"""
# Where processes look for devices (UCX does in /sys) and names (peers in /etc/hosts).
_HOST_INIT = """
set -e
mount -t tmpfs tmpfs /dev/shm
mount -t sysfs sysfs "$1/sys"
[ ! -d "$1/sys/fs/cgroup" ] || mount --rbind /sys/fs/cgroup "$1/sys/fs/cgroup"
mount --rbind "$1/sys" /sys
mount --bind "$1/hosts" /etc/hosts
hostname "$2"
trap '' CHLD; echo up; exec cat
"""


@contextmanager
def started_hosts(
    names: Sequence[str], directory: Path, bits_per_second: int = GIGABIT
) -> Iterator[Hosts]:
    """`Hosts`, or a skip of the test with the reason."""
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(Hosts(names, directory, bits_per_second))
        except HostsUnavailable as error:
            pytest.skip(str(error))
        yield hosts


class HostsUnavailable(Exception):
    """This machine gives no namespaces to this user; why, and what would work."""


def missing() -> str | None:
    """Why there can be no hosts here, and what to do about it; None: there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's: run these tests there"
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"no command {', '.join(absent)}: install iproute2 and util-linux"
    if os.geteuid():
        return "network namespaces and their links need root: run these tests as root"
    return None


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes on a host's link since its boot, headers included."""

    sent: int
    received: int

    def since(self, before: Traffic) -> Traffic:
        return Traffic(self.sent - before.sent, self.received - before.received)


class HostProcess:
    """A command that runs on a host. `pid`: of the command itself, as the machine counts."""

    def __init__(self, entering: subprocess.Popen[bytes], log: Path) -> None:
        self._entering = entering  # nsenter, which waits for the command
        self.log = log
        self.pid = _until(self._command, f"a process of {entering.args!r}")

    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def running(self) -> bool:
        return self._entering.poll() is None

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit status."""
        return self._entering.wait(seconds)

    def end(self) -> None:
        """By SIGTERM, or SIGKILL if that does not do."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self.running():
                return
            with suppress(ProcessLookupError):
                self.signal(number)
            with suppress(subprocess.TimeoutExpired):
                self.wait()

    def _command(self) -> int | None:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._entering.pid).children():
                return child.pid
        # It was over before it was looked for, or could not be started.
        return None if self.running() else self._entering.pid


class Host:
    """One host. `directory` is its home: commands run there, and their logs are there."""

    def __init__(self, name: str, number: int, switch: _Namespaces, directory: Path) -> None:
        self.name = name
        self.address = f"{NETWORK}.{number}"
        self.directory = directory
        self.hostname = f"host-{name.lower()}"
        self.environment: dict[str, str] = {
            DIRECTORY_VARIABLE: str(directory / "run"),
            "UCX_TLS": "tcp",  # by others, UCX would find ways between hosts of one machine
            "NIXL_LOG_LEVEL": "FATAL",
        }
        self._switch = switch
        self._mac = f"02:00:00:00:00:{number:02x}"  # the same after a boot, as a network card's is
        self._inside: _Namespaces | None = None
        self._logs = 0

    @property
    def is_up(self) -> bool:
        return self._inside is not None

    @property
    def init(self) -> int:
        """Its first process."""
        assert self._inside is not None, f"{self.name} is off"
        return self._inside.pid

    def boot(self, bits_per_second: int = GIGABIT) -> None:
        """Come up, with nothing running. Raises HostsUnavailable."""
        assert not self.is_up, f"{self.name} is up"
        kinds = ("--net", "--mount", "--pid", "--uts", "--ipc", "--mount-proc")
        inside = _Namespaces(kinds, _HOST_INIT, str(self.directory), self.hostname)
        self._inside = inside
        pair = f"name {self.name} type veth peer name {_DEVICE} address {self._mac}"
        self._switch.run("ip", "link", "add", *pair.split(), "netns", str(inside.pid))
        self._switch.run("ip", "link", "set", self.name, "master", _BRIDGE, "up")
        inside.run("ip", "link", "set", "lo", "up")
        inside.run("ip", "address", "add", f"{self.address}/24", "dev", _DEVICE)
        inside.run("ip", "link", "set", _DEVICE, "up")
        self.limit(bits_per_second)

    def limit(self, bits_per_second: int) -> None:
        """The rate of its link from now on, in each direction."""
        assert self._inside is not None, f"{self.name} is off"
        _limit(self._switch, self.name, bits_per_second)
        _limit(self._inside, _DEVICE, bits_per_second)

    def kill(self) -> None:
        """Kill all its processes. It is off afterwards: `/dev/shm` and the link are gone. Peers
        hear the ends of connections, unless the link was `cut` before."""
        assert self._inside is not None, f"{self.name} is off"
        # Held, so that the link lasts until the ends of connections have gone over it.
        with Path(f"/proc/{self.init}/ns/net").open("rb"):
            self._inside.end()
            self._inside = None
            self._switch.run("ip", "link", "del", self.name)

    def cut(self) -> None:
        """Drop all packets from and to this host from now on, without an error at any end."""
        self._switch.run("ip", "link", "set", self.name, "down")

    def mend(self) -> None:
        self._switch.run("ip", "link", "set", self.name, "up")

    def traffic(self) -> Traffic:
        for line in Path(f"/proc/{self.init}/net/dev").read_text().splitlines():
            device, _, figures = line.partition(":")
            if device.strip() == _DEVICE:
                received, sent = (int(figures.split()[column]) for column in (0, 8))
                return Traffic(sent, received)
        raise AssertionError(f"{self.name} has no link")

    def command(self, *argv: str, environment: Mapping[str, str] | None = None) -> list[str]:
        """The arguments that run `argv` here, when they are run outside."""
        settings = {**self.environment, **(environment or {})}
        return [
            *("nsenter", f"--target={self.init}", "--net", "--mount", "--pid", "--uts", "--ipc"),
            *("env", f"--chdir={self.directory}", *(f"{k}={v}" for k, v in settings.items())),
            *argv,
        ]

    def run(
        self,
        *argv: str,
        environment: Mapping[str, str] | None = None,
        seconds: float = PATIENCE,
    ) -> str:
        """Run a command to its end; returns what it prints. Fails unless its status is 0."""
        done = subprocess.run(
            self.command(*argv, environment=environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"{self.name}: {' '.join(argv)}: {done.stdout}"
        return done.stdout

    def start(
        self,
        *argv: str,
        environment: Mapping[str, str] | None = None,
        log: str | None = None,
    ) -> HostProcess:
        """Run a command until it ends, or the host. Output goes to the file `log` of its home."""
        self._logs += 1
        path = self.directory / (log or f"{self._logs}-{Path(argv[0]).name}.log")
        with path.open("ab") as output:
            entering = subprocess.Popen(
                self.command(*argv, environment=environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupted test's signals are the test's
            )
        return HostProcess(entering, path)

    def memserve(
        self, *arguments: str, environment: Mapping[str, str] | None = None, log: str | None = None
    ) -> HostProcess:
        """Start a `memserve` command."""
        argv = (sys.executable, "-m", "memserve", *arguments)
        return self.start(*argv, environment=environment, log=log)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What this thread, and threads that it starts, connect to is seen from this host."""
        with Path("/proc/thread-self/ns/net").open("rb") as home:
            with Path(f"/proc/{self.init}/ns/net").open("rb") as there:
                _enter_network(there)
            try:
                yield
            finally:
                _enter_network(home)


class Hosts:
    """Hosts by name, booted, on one switch. Context manager."""

    def __init__(
        self, names: Sequence[str], directory: Path, bits_per_second: int = GIGABIT
    ) -> None:
        """`directory`: of the hosts' homes, a folder of its name for each."""
        self._names = names
        self._directory = directory
        self._rate = bits_per_second
        self._hosts: dict[str, Host] = {}
        self._switch: _Namespaces | None = None

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def __enter__(self) -> Self:
        """Raises HostsUnavailable with the reason."""
        if (reason := missing()) is not None:
            raise HostsUnavailable(reason)
        self._switch = _Namespaces(("--net", "--pid"), _SWITCH_INIT)
        try:
            for number, name in enumerate(self._names, 1):
                directory = self._directory / name
                for folder in (directory / "run", directory / "sys"):
                    folder.mkdir(parents=True)
                (directory / "run").chmod(0o700)  # as memserve asks of it
                self._hosts[name] = Host(name, number, self._switch, directory)
            table = "".join(f"{host.address} {host.hostname}\n" for host in self)
            for host in self:
                (host.directory / "hosts").write_text(f"127.0.0.1 localhost\n{table}")
                host.boot(self._rate)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Idempotent."""
        for host in self:
            if host.is_up:
                host.kill()
        if self._switch is not None:
            self._switch.end()
            self._switch = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Namespaces:
    """Namespaces that last as long as their first process."""

    def __init__(self, kinds: Sequence[str], script: str, *arguments: str) -> None:
        """Raises HostsUnavailable."""
        self._unshare = subprocess.Popen(
            ["unshare", *kinds, "--fork", "--kill-child", "sh", "-c", script, "sh", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._unshare.stdout is not None
        if self._unshare.stdout.readline() != b"up\n":
            _, said = self._unshare.communicate(timeout=PATIENCE)
            raise HostsUnavailable(
                f"no namespaces ({said.decode().strip()}): in a container, run these tests with "
                "the capabilities SYS_ADMIN and NET_ADMIN, as `docker run --privileged` gives"
            )
        (first,) = psutil.Process(self._unshare.pid).children()
        self.pid = first.pid

    def run(self, *command: str) -> None:
        done = subprocess.run(
            ("nsenter", f"--target={self.pid}", "--net", *command),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        if done.returncode:
            raise HostsUnavailable(f"{' '.join(command)}: {done.stderr.strip()}")

    def end(self) -> None:
        """Kill the first process, and so all others; they are gone afterwards."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._unshare.communicate(timeout=PATIENCE)


def _limit(where: _Namespaces, device: str, bits_per_second: int) -> None:
    """What leaves by this device; the other direction is the other end's."""
    burst = str(int(bits_per_second / 8 * _BURST_SECONDS))
    shape = ("tbf", "rate", f"{bits_per_second}bit", "burst", burst, "latency", _QUEUE)
    where.run("tc", "qdisc", "replace", "dev", device, "root", *shape)


def _enter_network(handle: IO[bytes]) -> None:
    if _libc.setns(handle.fileno(), _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _until(find: Callable[[], T | None], what: str) -> T:
    end = time.monotonic() + PATIENCE
    while (found := find()) is None:
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(_TICK)
    return found
