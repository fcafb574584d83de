"""The environment of a measurement: versions, hardware, commit. Part of every JSON result."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import msgspec

from memserve import __version__
from memserve.config import available_cores
from memserve.cpu import cpu_name

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "aiohttp", "httptools", "uvloop")
# Seconds for git and nvidia-smi, which answer at once or hang on a broken driver.
_TOOL_TIMEOUT = 10.0


class Environment(msgspec.Struct, frozen=True):
    """Versions, hardware and commit."""

    time: str  # UTC, ISO 8601
    memserve: str
    commit: str | None  # of the code's checkout, with "+" if files have changed
    python: str
    packages: dict[str, str]
    platform: str
    cpu: str
    cores: int  # that this process may use
    memory_bytes: int
    gpus: tuple[str, ...]


def capture_environment() -> Environment:
    """Describe this machine and this installation."""
    return Environment(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        memserve=__version__,
        commit=_commit(),
        python=platform.python_version(),
        packages={name: version for name in _PACKAGES if (version := _version(name)) is not None},
        platform=platform.platform(),
        cpu=cpu_name(),
        cores=available_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=_gpus(),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    source = str(Path(__file__).parent)
    head = _output("git", "-C", source, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    changed = _output("git", "-C", source, "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changed else "")


def _gpus() -> tuple[str, ...]:
    listed = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return tuple((listed or "").splitlines())


def _output(*command: str) -> str | None:
    """Return the output of a command; None if it is absent or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TOOL_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
