"""Contract of a backend, which runs a cluster's processes on machines and restarts them.

`Cluster` decides what runs (`Launch`); a backend decides where, starts it again when it crashes,
and ends it. A new backend implements `Backend` and `Kept`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from memserve.api.serving import Shutdown
from memserve.config import ClusterConfig, InstanceConfig
from memserve.errors import ClusterError
from memserve.types import Role


@dataclass(frozen=True, slots=True)
class Launch:
    """One process to run: `memserve ARGUMENTS`.

    The arguments name no address of another process: the backend adds `--port` for a gateway that
    shares a port, and `--join` for an instance. `secrets` are environment variables, since all
    users of a machine can read arguments.
    """

    name: str  # unique in the cluster; an instance's id
    group: str  # of instances with equal settings, as `Group.name`, or GATEWAYS
    arguments: tuple[str, ...]
    settings: InstanceConfig | None = None  # an instance's
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


GATEWAYS = "gateway"  # the group of the gateways


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process runs: the address of its machine, and its process id there."""

    node: str
    pid: int


@dataclass(frozen=True, slots=True)
class Group:
    """Instances with equal settings: one `[[instance]]` table of the file."""

    name: str  # the role; `decode.2` for the second table of that role
    role: Role  # as configured
    members: tuple[str, ...]  # names, in the order of their start


class Kept(Protocol):
    """One process that a backend keeps running."""

    @property
    def name(self) -> str: ...

    @property
    def place(self) -> Place | None:
        """Where it runs, or ran last; None before `start`, and while nobody knows."""

    @property
    def alive(self) -> bool:
        """Whether it runs now; False in the pause before a restart."""

    @property
    def crashes(self) -> int:
        """Crashes since `start`."""

    async def start(self) -> None:
        """Start the process. Raises ClusterError if no machine can run it."""

    async def address(self) -> str:
        """Return its URL as soon as it listens. Raises ClusterError if it ends before."""

    async def failure(self) -> ClusterError:
        """Wait until the present process ends; return an error with its last lines."""

    async def keep(self) -> None:
        """Start it again whenever it crashes, until it ends because it was asked to.

        Raises ClusterError, with its last lines, when it is given up.
        """

    async def stop(self, shutdown: Shutdown, seconds: float) -> None:
        """End it for good: it has `seconds` to finish what it runs, less if the shutdown is
        forced. Returns when it has ended."""

    def show_output(self, show: Callable[[str], None]) -> None:
        """Call `show`, which must not block, with each line that it prints, kept ones first."""

    def reload(self) -> None:
        """Have it read changeable files, such as API keys, again."""


class Backend(Protocol):
    """Runs processes. Its owner calls `open` first, and `close` in any case."""

    @property
    def url(self) -> str:
        """The gateways' URL for processes of this machine, once one of them has an address."""

    def fit(self, config: ClusterConfig) -> ClusterConfig:
        """Return the configuration with what depends on the machines filled in, as threads.

        Raises ConfigError for what this backend cannot do.
        """

    async def open(self) -> None:
        """Connect to the machines, and reserve what processes share. Raises ClusterError."""

    def kept(self, launch: Launch, needed: Callable[[], bool]) -> Kept:
        """Return a process that is not started yet. While `needed` returns True it is not given
        up, however often it crashes, because others are useless without it."""

    async def close(self) -> None:
        """Release what `open` took; all processes have been stopped."""


class Groups(Protocol):
    """Contract of a running cluster that can be scaled, on any backend."""

    async def groups(self) -> tuple[Group, ...]: ...

    async def places(self) -> Mapping[str, Place]:
        """Return where each process runs, by name."""

    async def scale(self, group: str, count: int) -> None:
        """Start or end instances until the group has `count`.

        New ones are started when this returns, not ready: gateways show them `starting`. The
        newest end first, each once it has finished what it runs. Raises ClusterError for a group
        that there is not, and for a cluster without any instance.
        """
