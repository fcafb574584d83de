"""A cluster that Ray runs on several hosts: a node on each, and the commands of docs/ray.md, which
run on the first."""

from __future__ import annotations

import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from memserve.secrets import SECRET_VARIABLE
from tests.hosts.cluster import PATIENCE, PORT, SERVED, HostCluster
from tests.hosts_harness import Host, HostProcess, Hosts
from tests.ray_harness import (
    HEALTH,
    STARTED,
    head_arguments,
    ray_environment,
    session_directory,
    start_command,
)

_HEAD_PORT = 6379
_COMMAND_SECONDS = 480.0
# The prefill instance and the gateway have the CPUs, which the first host alone has. A host of the
# others has room for both decode instances.
_CPUS = 4
_ROOM = 2
_CLUSTER = """
[cluster]
backend = "ray"
[model]
path = {model}
served_name = {served}
dtype = "float32"
device = "cpu"
[gateway]
port = {port}
policy = "round-robin"  # every request is handed over: by what is faster, a tiny model's is not
prove_handover = false  # hand-overs are counted
{tables}
"""
_INSTANCE = """
[[instance]]
role = "{role}"
count = {count}
threads = 1
hbm_blocks = 300
dram_blocks = 16
profile = "off"
resources = {resources}
"""


@dataclass
class RayCluster(HostCluster):
    """Nodes are among `processes`, as `ray-A`."""

    directory: Path = field(kw_only=True)  # of Ray's sessions

    @property
    def head(self) -> Host:
        return next(iter(self.hosts))

    @property
    def address(self) -> str:
        """Ray's, for commands."""
        return f"{self.head.address}:{_HEAD_PORT}"

    def node(self, host: Host) -> None:
        """Start Ray on a host that is up; return when it runs."""
        own = [f"--address={self.address}", "--num-cpus=0", f'--resources={{"room": {_ROOM}}}']
        if host is self.head:
            own = head_arguments(_HEAD_PORT, _CPUS, self.directory)
        name = f"ray-{host.name}"
        process = self.processes[name] = host.start(
            *start_command(host.address, *own, "--num-gpus=0"),
            environment={**ray_environment(self.directory), **HEALTH},
            log=f"{name}-{secrets.token_hex(2)}.log",
        )
        _until_running(process)

    def ray(self, *arguments: str) -> str:
        """Run a `memserve ray` command on the head's host; returns what it prints."""
        return self.head.run(
            *(sys.executable, "-m", "memserve", "ray", *arguments),
            environment={**ray_environment(self.directory), SECRET_VARIABLE: self.secret},
            seconds=_COMMAND_SECONDS,
        )

    def deploy(self) -> str:
        """Start a prefill instance at the head and two decode instances elsewhere; the gateway's
        URL."""
        path = self.head.directory / "cluster.toml"
        tables = _INSTANCE.format(role="prefill", count=1, resources="{ CPU = 1 }")
        tables += _INSTANCE.format(role="decode", count=2, resources="{ CPU = 0, room = 1 }")
        model, served = (msgspec.json.encode(str(v)).decode() for v in (self.model, SERVED))
        path.write_text(_CLUSTER.format(model=model, served=served, port=PORT, tables=tables))
        said = self.ray("deploy", "--ray-address", self.address, str(path))
        (url,) = (line for line in said.splitlines() if line.startswith("http"))
        return url

    def nodes(self) -> dict[str, str]:
        """The address of each member's node, as Ray has it."""
        said = self.ray("status", "--json", "--ray-address", self.address)
        (shown,) = (line for line in said.splitlines() if line.startswith("["))
        return {one["name"]: one["node"] for one in msgspec.json.decode(shown)}


def _until_running(process: HostProcess) -> None:
    begin = time.monotonic()
    while STARTED not in process.text():
        assert process.running(), process.text()
        assert time.monotonic() < begin + PATIENCE, process.text()
        time.sleep(0.1)


@contextmanager
def started_ray(hosts: Hosts, model: Path, secret: str) -> Iterator[RayCluster]:
    """Ray on all hosts, the head on the first; nothing is deployed."""
    directory = session_directory()
    try:
        cluster = RayCluster(hosts, model, secret, directory=directory)
        for host in hosts:
            cluster.node(host)
        yield cluster
    finally:
        hosts.close()  # Ray's processes write in there
        shutil.rmtree(directory, ignore_errors=True)
