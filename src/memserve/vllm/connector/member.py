"""A vLLM server that joins a cluster by itself: the instance beside it, as a child of its engine.

The instance is the same process as where `memserve up` starts a vLLM server: it registers with
gateways, answers them, and tells the pool in the engine where KV goes. It ends with the engine.
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
# Between lives of an instance that ends by itself: twice as long each time, up to the last one.
FIRST_PAUSE_SECONDS = 1.0
LAST_PAUSE_SECONDS = 60.0
_PREFIX = "memserve-member-"
END_SECONDS = 5.0  # to leave its gateways, before it is killed


class MemberSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kv_connector_extra_config`, as a user writes it."""

    dram_bytes: str | int  # such as '64GiB'
    instance: Annotated[str, Meta(max_length=256)] | None = None  # its id; default: vLLM's
    role: Role = Role.COLOCATED
    join: tuple[str, ...] | str = ()  # gateways' URLs; none: it stays alone
    host: str = "127.0.0.1"  # where gateways and peers reach it
    port: int = 0
    caching: Caching = "full"
    url: str | None = None  # of vLLM's API, if its command line does not tell
    # Of a server that an instance has started, and talks to by itself:
    socket: str | None = None
    model: str | None = None
    revision: str | None = None

    @property
    def gateways(self) -> tuple[str, ...]:
        return (self.join,) if isinstance(self.join, str) else self.join


def read_settings(extra: Mapping[str, object]) -> MemberSettings:
    """Raises ConfigError that says what is known."""
    try:
        return msgspec.convert(dict(extra), MemberSettings)
    except msgspec.ValidationError as error:
        known = ", ".join(MemberSettings.__struct_fields__)
        raise ConfigError(f"kv_connector_extra_config: {error}; known: {known}") from error


class ServerArguments(msgspec.Struct, frozen=True):
    """What the command line of a vLLM server says about its API."""

    url: str
    key: str | None = None


def read_arguments(arguments: Sequence[str]) -> ServerArguments | None:
    """None: it listens where its command line does not tell."""
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
    """As vLLM reads the name of a flag."""
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
    """The command of the instance `name` beside the server at `url`, which publishes KV events at
    `events`; the socket of its pool is still to be said."""
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
    """The instance's process, started again when it ends by itself. From `start` to `close`."""

    def __init__(self) -> None:
        _sweep()
        self._directory = Path(mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))  # for this user alone
        self.pool = self._directory / "pool"
        self._lock = threading.Lock()  # of what follows
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
        with self._lock:  # from here on none is started
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
        """One life of the process; how it ended."""
        try:
            with self._lock:
                if self._closing.is_set():
                    return "not begun"
                # Its standard input closes when this process ends, however: it ends then, too.
                process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
                self._process = process
        except OSError as error:
            return str(error)
        return how_ended(process.wait())


def _sweep() -> None:
    """Remove what processes have left that were killed."""
    for directory in Path(gettempdir()).glob(f"{_PREFIX}*"):
        process = directory.name.removeprefix(_PREFIX).partition("-")[0]
        if process.isdigit() and not Path("/proc", process).exists():
            shutil.rmtree(directory, ignore_errors=True)
