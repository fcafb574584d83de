"""A Ray cluster of several nodes on this machine's loopback addresses, which ends with its test.

Each node is a `ray start --block` of its own: its processes are its children, and are found and
ended by that. Nodes share a token, in a file of their own: without it, Ray takes one from the home
directory, or leaves one there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from memserve.hosts import free_port

ROOT = Path(__file__).parents[1]
END_SECONDS = 120.0  # of a command that ends in order
HEAD = "127.0.0.2"  # Ray takes 127.0.0.1 for the machine's outer address
TRIES = 3  # Ray gives a node 30 s, which may not do where tests run beside each other
# A lost node is known after 4 s, and one that is only slow is not lost.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
}
STARTED = "Ray runtime started"  # printed by `ray start` when its node is up


def session_directory() -> Path:
    """Make the directory of a Ray cluster's sessions, with its token; the caller removes it."""
    # Short, since sockets are in there: their paths have at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    token = directory / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    return directory


def ray_environment(directory: Path) -> dict[str, str]:
    """Return the variables of a cluster's nodes, and of the commands that connect to them."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(directory / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
    }


def start_command(address: str, *arguments: str) -> list[str]:
    """Return the command that runs a node at `address` until it is killed."""
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", *arguments),
        *(f"--node-ip-address={address}", "--object-store-memory=80000000"),
        *("--disable-usage-stats", "--block"),
    ]


def head_arguments(port: int, cpus: int, directory: Path) -> list[str]:
    """Return what makes a node the head. `directory`: of the sessions."""
    return [
        *("--head", f"--port={port}", f"--num-cpus={cpus}", "--include-dashboard=false"),
        f"--temp-dir={directory}",
    ]


class RayNodes:
    """A head with room for gateways and others, and workers with two GPUs (Ray believes what it is
    told), of the resource `worker`, and without CPUs."""

    def __init__(self, environment: dict[str, str]) -> None:
        """`environment`: more variables of all processes of the nodes."""
        self.directory = session_directory()
        self.address = f"{HEAD}:{free_port(HEAD)}"
        # Also for the drivers: what connects to these nodes.
        self.environment = ray_environment(self.directory)
        self._environment = {**os.environ, **self.environment, **HEALTH, **environment}
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.seen: list[psutil.Process] = []  # processes of all nodes, as far as they were seen

    def start(self, workers: int) -> None:
        """Return when all nodes are up."""
        port = int(self.address.rpartition(":")[2])
        self._begin(HEAD, *head_arguments(port, 8, self.directory))
        for number in range(workers):
            self.add(f"127.0.0.{3 + number}")

    def add(self, address: str) -> None:
        """Start a worker."""
        self._begin(
            address,
            *(f"--address={self.address}", "--num-cpus=0", "--num-gpus=2"),
            '--resources={"worker": 4}',
        )

    def processes(self, address: str) -> list[psutil.Process]:
        """The node's processes: Ray's own, actors, and their members."""
        try:
            found = psutil.Process(self._nodes[address].pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self.seen += found
        return found

    def lose(self, address: str) -> None:
        """Kill all of a node at once, as a power cut does."""
        everything = self.processes(address)
        node = self._nodes.pop(address)
        node.kill()
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()
        psutil.wait_procs(everything)

    def end(self) -> None:
        for address in list(self._nodes):
            self.lose(address)
        for process in self.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def log(self) -> str:
        """All that Ray has logged on any node, and the nodes have printed."""
        files = [path for path in self.directory.rglob("*") if path.is_file()]
        texts = [path.read_bytes() for path in files if path.name != "token"]
        return b"\n".join(texts).decode(errors="replace")

    def _begin(self, address: str, *arguments: str) -> None:
        """Start a node, and return when it is up."""
        out = self.directory / f"{address}.out"
        for _ in range(TRIES):
            with out.open("wb") as file:
                node = self._nodes[address] = subprocess.Popen(
                    start_command(address, *arguments),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    env=self._environment,
                )
            while node.poll() is None:
                if STARTED in out.read_text():
                    return
                time.sleep(0.1)
        raise AssertionError(f"node {address} does not start: {out.read_text()}")


def end_with(process: subprocess.Popen[str], number: signal.Signals) -> int:
    """Send a signal; return the exit code."""
    process.send_signal(number)
    return process.wait(END_SECONDS)
