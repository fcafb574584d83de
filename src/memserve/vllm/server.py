"""A vLLM server as a child of an instance: the instance alone can reach it.

It listens on a Unix socket in a directory that only this user can enter, so that nobody needs a
key and no stranger gets in: what clients may do is decided by the gateway and the instance.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import msgspec

from memserve.api.control import how_ended
from memserve.config import InstanceConfig, ModelConfig
from memserve.errors import ConfigError, EngineStopped, GivenUp
from memserve.pool.segment import sweep
from memserve.secrets import SECRET_FILE_VARIABLE, SECRET_VARIABLE
from memserve.vllm.place import ServerPlace

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2  # between looks at a server that starts
# After SIGTERM vLLM ends its engine's processes; what has not ended by then is killed, all of it.
END_SECONDS = 10.0
GONE_SECONDS = 2.0  # between SIGKILL and the end of a process with gigabytes
MAX_PATH_BYTES = 107  # of a Unix socket, on Linux

# The server, and beside it a guard that outlives both: when this process ends, by whatever means,
# its end of the pipe closes, and the guard ends all that is left of the server's group, and
# removes its directory.
_GUARDED = f"""\
import os, shutil, signal, sys, time
group = os.getpid()
if os.fork() == 0:
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    while os.read(0, 4096):
        pass
    try:
        os.killpg(group, signal.SIGTERM)
        for _ in range({int(END_SECONDS * 10)}):
            time.sleep(0.1)
            os.killpg(group, 0)
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    os._exit(0)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def server_command(
    model: ModelConfig,
    settings: InstanceConfig,
    directory: Path,
    place: ServerPlace,
    events: str | None,
    tier: dict[str, Any] | None = None,
) -> list[str]:
    """The command of a server for the model in `directory`, at the Unix socket of `place`, which
    publishes KV events at the endpoint `events`; None: it caches nothing. `tier`: what is behind
    its KV cache, see `tier_settings`. `vllm_args` come last: they prevail."""
    command = list(settings.vllm_command)
    if command[-1] != "serve":  # `vllm serve MODEL`, or a module with `--model MODEL`
        command.append("--model")
    command += [str(directory), "--uds", str(place.path)]
    command += ["--served-model-name", model.served_name or model.path, "--dtype", model.dtype]
    if model.max_model_len is not None:
        command += ["--max-model-len", str(model.max_model_len)]
    # Who counts cached tokens is told them; a line for each request, the instance writes.
    command += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    if events is None:
        command.append("--no-enable-prefix-caching")
    else:
        publisher: dict[str, Any] = {"enable_kv_cache_events": True, "publisher": "zmq"}
        publisher |= {"endpoint": events}
        command += ["--kv-events-config", msgspec.json.encode(publisher).decode()]
    if tier is not None:
        command += ["--kv-transfer-config", msgspec.json.encode(tier).decode()]
    return [*command, *settings.vllm_args]


def tier_settings(dram: str, **own: str) -> dict[str, Any]:
    """vLLM's `--kv-transfer-config` for a KV cache with so much of the host's memory behind it, and
    the connector's `own` settings. The package must be there in the environment of
    `vllm_command`, too."""
    return {
        "kv_connector": "MemServeConnector",
        "kv_connector_module_path": "memserve.vllm.connector.facade",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"dram_bytes": dram, **own},
    }


def server_environment(settings: InstanceConfig) -> dict[str, str]:
    """Where it computes, in vLLM's own variables."""
    environment = {}
    if settings.cpus is not None:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, settings.cpus))
    if settings.threads is not None:
        environment["OMP_NUM_THREADS"] = str(settings.threads)
    return environment


def require_command(command: Sequence[str]) -> None:
    """Raise ConfigError for a program that is not there."""
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"{command[0]}: no such command; instance.vllm_command says what starts a vLLM server"
        )


class VllmServer:
    """Owns the server's processes and its directory, from the constructor to `stop`."""

    def __init__(self) -> None:
        """Raises ConfigError where temporary files have too long a path."""
        self._directory = Path(mkdtemp(prefix="memserve-vllm-"))  # for this user alone
        self.place = ServerPlace(path=self._directory / "http")
        events = self._directory / "events"
        self.events = f"ipc://{events}"  # where it publishes KV events
        self.pool = self._directory / "pool"  # the socket of the pool in it, if it has one
        if len(os.fsencode(events)) > MAX_PATH_BYTES:
            shutil.rmtree(self._directory)
            raise ConfigError(f"{self._directory}: too long for Unix sockets; set TMPDIR")
        self._process: subprocess.Popen[bytes] | None = None
        # Ends with the server: whoever needs it watches this thread.
        self.thread = threading.Thread(target=self._wait, name="vllm-server", daemon=True)

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it; what it prints goes to standard error."""
        self._process = subprocess.Popen(
            (sys.executable, "-c", _GUARDED, str(self._directory), *command),
            stdin=subprocess.PIPE,
            # Not ours: who reads that waits for all who have it, and an engine may outlive us.
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**_without_secrets(os.environ), **environment},
            start_new_session=True,
        )
        self.thread.start()
        threading.Thread(target=self._show, name="vllm-output", daemon=True).start()

    def until_ready(self, ending: threading.Event) -> None:
        """Returns when it is healthy. Raises EngineStopped if it ends before, GivenUp as soon as
        `ending` is set."""
        while not self.place.is_healthy():
            if not self.thread.is_alive():
                raise EngineStopped(f"the vLLM server ended while it started: {self.ending()}")
            if ending.wait(LOOK_SECONDS):
                raise GivenUp("the vLLM server was still starting")

    def ending(self) -> str:
        """How it ended."""
        code = None if self._process is None else self._process.returncode
        return "it runs" if code is None else how_ended(code)

    def stop(self) -> None:
        """End it, all of its processes, and remove what it leaves. Once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
            # Engines and workers are processes of their own.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self.thread.join()
            if self._process.stdin is not None:
                self._process.stdin.close()  # the guard's end
            _until_gone(self._process.pid)
            sweep()  # the shared memory of its engine, which a signal ends without a word
        shutil.rmtree(self._directory, ignore_errors=True)

    def _wait(self) -> None:
        assert self._process is not None
        self._process.wait()
        log.info("the vLLM server has ended: %s", self.ending())

    def _show(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            sys.stderr.write(line.decode(errors="replace"))
            sys.stderr.flush()


def _until_gone(group: int) -> None:
    """Wait for the processes of a group that was killed."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        for _ in range(int(GONE_SECONDS / 0.02)):
            os.killpg(group, 0)
            time.sleep(0.02)


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """What computes has no use for the cluster's secret."""
    secrets = (SECRET_VARIABLE, SECRET_FILE_VARIABLE)
    return {name: value for name, value in environment.items() if name not in secrets}
