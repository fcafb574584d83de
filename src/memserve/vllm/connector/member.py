"""The instance beside a vLLM server that joins a cluster: a child process of vLLM's engine.

The child is a `memserve instance`: it registers with gateways, answers them, and tells the pool in
the engine where to send KV. It ends with the engine.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import Annotated

import msgspec
from msgspec import Meta

from memserve.api.control import how_ended
from memserve.config import CacheConfig, Caching, InstanceConfig, ModelConfig
from memserve.errors import ConfigError
from memserve.flags import to_flags
from memserve.hosts import WILDCARDS, bracketed
from memserve.types import Role

log = logging.getLogger(__name__)

KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own
# Pauses before an instance that ended by itself is started again; they double up to the last one.
FIRST_PAUSE_SECONDS = 1.0
LAST_PAUSE_SECONDS = 60.0
_PREFIX = "memserve-member-"
END_SECONDS = 5.0  # between SIGTERM, on which the instance leaves its gateways, and SIGKILL


class MemberSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The connector's settings: vLLM's `kv_connector_extra_config`."""

    dram_bytes: str | int  # such as '64GiB'
    instance: Annotated[str, Meta(max_length=256)] | None = None  # id; default: from vLLM's
    role: Role = Role.COLOCATED
    join: tuple[str, ...] | str = ()  # URLs of gateways; none: no instance is started
    host: str = "127.0.0.1"  # at which gateways and peers reach the instance
    port: int = 0  # of the instance; 0: any
    caching: Caching = "full"
    url: str | None = None  # of vLLM's API, if its command line does not tell
    # Set by an instance that has started this server:
    socket: str | None = None  # path of the pool's Unix socket
    model: str | None = None
    revision: str | None = None

    @property
    def gateways(self) -> tuple[str, ...]:
        return (self.join,) if isinstance(self.join, str) else self.join


def read_settings(extra: Mapping[str, object]) -> MemberSettings:
    """Convert the settings. Raises ConfigError that lists the known names."""
    try:
        return msgspec.convert(dict(extra), MemberSettings)
    except msgspec.ValidationError as error:
        known = ", ".join(MemberSettings.__struct_fields__)
        raise ConfigError(f"kv_connector_extra_config: {error}; known: {known}") from error


class ServerArguments(msgspec.Struct, frozen=True):
    """URL and key of a vLLM server's API, from its command line."""

    url: str
    key: str | None = None


def read_arguments(arguments: Sequence[str]) -> ServerArguments | None:
    """Return URL and key of the API; None if the command line does not tell the URL (`--uds`,
    `--config`, or a malformed one)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--host", "--port", "--api-key", "--ssl-certfile", "--uds", "--config"):
        parser.add_argument(name)
    try:
        known, _ = parser.parse_known_args([_with_dashes(each) for each in arguments])
    except argparse.ArgumentError:
        return None
    if known.uds or known.config:
        return None
    host = known.host or "127.0.0.1"
    host = "127.0.0.1" if host in WILDCARDS else bracketed(host)
    scheme = "https" if known.ssl_certfile else "http"
    return ServerArguments(f"{scheme}://{host}:{known.port or 8000}", known.api_key)


def _with_dashes(argument: str) -> str:
    """Return a flag with dashes for the underscores in its name, as vLLM reads it."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def instance_command(
    settings: MemberSettings,
    name: str,
    model: ModelConfig,
    url: str,
    events: str | None,
) -> list[str]:
    """Return the command of the instance `name` beside the server at `url`, which publishes KV
    events at `events`. The caller appends `--vllm-pool`."""
    instance = InstanceConfig(
        engine="vllm",
        role=settings.role,
        host=settings.host,
        port=settings.port,
        vllm_url=url,
        vllm_events=events,
    )
    command = [sys.executable, "-m", "memserve", "instance", "--id", name, "--exit-with-parent"]
    command += [
        *to_flags(model),
        *to_flags(instance),
        *to_flags(CacheConfig(caching=settings.caching)),
    ]
    return [*command, *(part for gateway in settings.gateways for part in ("--join", gateway))]


class Member:
    """Runs the instance's process from `start` to `close`, and restarts it when it ends by itself.

    `pool`: path for the pool's Unix socket, in a directory that `close` removes."""

    def __init__(self) -> None:
        _sweep()
        self._directory = Path(mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))  # for this user alone
        self.pool = self._directory / "pool"
        self._lock = threading.Lock()  # guards `_process` and the setting of `_closing`
        self._closing = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def start(self, command: Sequence[str], key: str | None) -> None:
        environment = dict(os.environ)
        if key is not None:
            environment[KEY_VARIABLE] = key
        log.info("starting %s", " ".join(command))
        run = threading.Thread(
            target=self._keep, args=(list(command), environment), name="member", daemon=True
        )
        self._thread = run
        run.start()

    def close(self) -> None:
        with self._lock:  # `_live` starts no process after this
            self._closing.set()
            process = self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._thread is not None:
            self._thread.join()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _keep(self, command: list[str], environment: dict[str, str]) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self._closing.is_set():
            begun = time.monotonic()
            how = self._live(command, environment)
            if self._closing.is_set():
                return
            if time.monotonic() >= begun + LAST_PAUSE_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            log.error("the instance of this server has ended (%s); again in %g s", how, pause)
            self._closing.wait(pause)
            pause = min(2 * pause, LAST_PAUSE_SECONDS)

    def _live(self, command: list[str], environment: dict[str, str]) -> str:
        """Run the process once; return how it ended."""
        try:
            with self._lock:
                if self._closing.is_set():
                    return "not begun"
                # The child ends when its standard input closes, which the kernel does whenever
                # this process ends.
                process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
                self._process = process
        except OSError as error:
            return str(error)
        return how_ended(process.wait())


def _sweep() -> None:
    """Remove the directories of processes that were killed."""
    for directory in Path(gettempdir()).glob(f"{_PREFIX}*"):
        process = directory.name.removeprefix(_PREFIX).partition("-")[0]
        if process.isdigit() and not Path("/proc", process).exists():
            shutil.rmtree(directory, ignore_errors=True)
