"""A vLLM server as a child process of an instance.

The server listens on a Unix socket in a directory that only this user can enter, so it needs no API
key. The gateway and the instance decide what clients may do.
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

LOOK_SECONDS = 0.2  # between health checks of a server that starts
# After SIGTERM vLLM ends its engine's processes. After this time the whole group is killed.
END_SECONDS = 10.0
GONE_SECONDS = 2.0  # between SIGKILL and the end of a process that has gigabytes of memory
MAX_PATH_BYTES = 107  # of a Unix socket, on Linux

# Starts the server and a guard process. When this process ends, even by SIGKILL, its end of the
# pipe closes; the guard then ends all processes left in the server's group, and removes its
# directory.
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
    """Return the command of a server for the model in `directory`, at the Unix socket of `place`.

    `events`: ZMQ endpoint for KV events; None: no prefix caching. `tier`: the memory behind the KV
    cache, see `tier_settings`. `vllm_args` come last, so they override the others."""
    command = list(settings.vllm_command)
    if command[-1] != "serve":  # `vllm serve MODEL`, or a module with `--model MODEL`
        command.append("--model")
    command += [str(directory), "--uds", str(place.path)]
    command += ["--served-model-name", model.served_name or model.path, "--dtype", model.dtype]
    if model.max_model_len is not None:
        command += ["--max-model-len", str(model.max_model_len)]
    # The prompt token details have the cached tokens. The instance writes the access log.
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
    """Return vLLM's `--kv-transfer-config` for a pool of `dram` bytes of host memory (such as
    '64GiB') behind the KV cache, with the connector's `own` settings. `memserve` must be installed
    in the environment of `vllm_command`."""
    return {
        "kv_connector": "MemServeConnector",
        "kv_connector_module_path": "memserve.vllm.connector.facade",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"dram_bytes": dram, **own},
    }


def server_environment(settings: InstanceConfig) -> dict[str, str]:
    """Return vLLM's environment variables for the settings `cpus` and `threads`."""
    environment = {}
    if settings.cpus is not None:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, settings.cpus))
    if settings.threads is not None:
        environment["OMP_NUM_THREADS"] = str(settings.threads)
    return environment


def require_command(command: Sequence[str]) -> None:
    """Raise ConfigError if the program of `command` does not exist."""
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"{command[0]}: no such command; instance.vllm_command says what starts a vLLM server"
        )


class VllmServer:
    """Owns the server's processes and its directory, from the constructor to `stop`."""

    def __init__(self) -> None:
        """Raises ConfigError if the path of temporary files is too long for a Unix socket."""
        self._directory = Path(mkdtemp(prefix="memserve-vllm-"))  # for this user alone
        self.place = ServerPlace(path=self._directory / "http")
        events = self._directory / "events"
        self.events = f"ipc://{events}"  # endpoint for the server's KV events
        self.pool = self._directory / "pool"  # path for the socket of the server's pool, if any
        if len(os.fsencode(events)) > MAX_PATH_BYTES:
            shutil.rmtree(self._directory)
            raise ConfigError(f"{self._directory}: too long for Unix sockets; set TMPDIR")
        self._process: subprocess.Popen[bytes] | None = None
        # Ends with the server, so its users watch this thread.
        self.thread = threading.Thread(target=self._wait, name="vllm-server", daemon=True)

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the server; its output goes to standard error."""
        self._process = subprocess.Popen(
            (sys.executable, "-c", _GUARDED, str(self._directory), *command),
            stdin=subprocess.PIPE,
            # A pipe, not this process's standard output: a reader of that waits until all holders
            # close it, and an engine process may outlive this one.
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**_without_secrets(os.environ), **environment},
            start_new_session=True,
        )
        self.thread.start()
        threading.Thread(target=self._show, name="vllm-output", daemon=True).start()

    def until_ready(self, ending: threading.Event) -> None:
        """Return when the server is healthy. Raises EngineStopped if the server ends before,
        GivenUp as soon as `ending` is set."""
        while not self.place.is_healthy():
            if not self.thread.is_alive():
                raise EngineStopped(f"the vLLM server ended while it started: {self.ending()}")
            if ending.wait(LOOK_SECONDS):
                raise GivenUp("the vLLM server was still starting")

    def ending(self) -> str:
        """Return how the server ended, in words."""
        code = None if self._process is None else self._process.returncode
        return "it runs" if code is None else how_ended(code)

    def stop(self) -> None:
        """End all processes of the server, and remove its directory and shared memory. Call it
        once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
            # Engines and workers are further processes of the server's group.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self.thread.join()
            if self._process.stdin is not None:
                self._process.stdin.close()  # the guard's end
            _until_gone(self._process.pid)
            sweep()  # a killed engine leaves its shared memory behind
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
    """Wait up to GONE_SECONDS until the processes of a killed group are gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        for _ in range(int(GONE_SECONDS / 0.02)):
            os.killpg(group, 0)
            time.sleep(0.02)


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the cluster's secret, which vLLM does not need."""
    secrets = (SECRET_VARIABLE, SECRET_FILE_VARIABLE)
    return {name: value for name, value in environment.items() if name not in secrets}
