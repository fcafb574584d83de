"""The clusters that this user runs on this machine: `memserve up` leaves its gateway's address in
the user's runtime directory, and `memserve cluster` finds it there."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from memserve.cluster.port import is_listened_on
from memserve.config import GatewayConfig
from memserve.errors import ClusterError, ConfigError
from memserve.pool.segment import pid_namespace, start_time
from memserve.secrets import Secret, kept_secret, read_private, runtime_directory, write_private

DEFAULT_URL = f"http://{GatewayConfig().host}:{GatewayConfig().port}"
_PATTERN = "gateway-*.address"


class RunningCluster(msgspec.Struct, frozen=True):
    """A gateway's URL, for processes of this machine, and the process that supervises it."""

    url: Annotated[str, Meta(pattern=r"^https?://[A-Za-z0-9._:%\[\]-]{1,255}\Z")]
    host: Annotated[str, Meta(max_length=255)]
    port: Annotated[int, Meta(ge=1, le=65535)]
    pid: int
    started: int  # clock ticks from boot to the process's start: pids are used again
    namespace: int  # of process ids

    def is_stale(self) -> bool:
        """Return whether the supervisor has ended, without removing its file. In another PID
        namespace it cannot be looked for: then, whether nobody listens on the port."""
        if self.namespace == pid_namespace():
            return start_time(self.pid) != self.started
        try:
            return not is_listened_on(self.host, self.port)
        except ClusterError:
            return True


def announce_cluster(url: str, host: str, port: int) -> Path:
    """Write the address file of the cluster that this process supervises. Returns its path; the
    caller removes it when the cluster ends."""
    pid = os.getpid()
    running = RunningCluster(url, host, port, pid, start_time(pid) or 0, pid_namespace())
    path = runtime_directory() / f"gateway-{port}.address"
    write_private(path, msgspec.json.encode(running).decode())
    return path


def running_clusters() -> list[RunningCluster]:
    """Return this user's clusters, by port. Removes the files of those that were killed. Raises
    ConfigError if the runtime directory is not this user's alone."""
    found = []
    for path in runtime_directory().glob(_PATTERN):
        try:
            running = msgspec.json.decode(read_private(path), type=RunningCluster)
        except (ConfigError, msgspec.DecodeError):
            continue  # it has just ended, or is not ours to judge
        if running.is_stale():
            # In another namespace, of processes and perhaps of the network, it may live.
            if running.namespace == pid_namespace():
                with contextlib.suppress(OSError):
                    path.unlink()
        else:
            found.append(running)
    return sorted(found, key=lambda one: one.port)


def find_gateway(url: str | None) -> tuple[str, Secret | None]:
    """Return the URL of the gateway to ask: `url`, or that of the only cluster that this user runs
    here, or else DEFAULT_URL; and that cluster's secret, None if it is to be looked for as ever.

    Raises ConfigError if there are several.
    """
    if url is not None:
        return url, None
    running = running_clusters()
    if len(running) > 1:
        urls = ", ".join(one.url for one in running)
        raise ConfigError(f"several clusters of this user run here: {urls}; choose with --url")
    if not running:
        return DEFAULT_URL, None
    return running[0].url, kept_secret(running[0].port)
