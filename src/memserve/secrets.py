"""The cluster's secret: its sources (environment, file), and its files on this machine.

Instances, gateways and operators of one cluster share it. It is never an argument of a command
and never in a log. If none is configured, all processes of one user on one machine share a
secret in a file that only this user can read; it suffices on loopback addresses only.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from memserve.errors import ConfigError
from memserve.hosts import is_loopback, port_of

SECRET_VARIABLE = "MEMSERVE_SECRET"
SECRET_FILE_VARIABLE = "MEMSERVE_SECRET_FILE"
DIRECTORY_VARIABLE = "MEMSERVE_RUNTIME_DIR"

# A person may choose a weak secret: make each guess cost some 50 ms and 16 MiB.
_SCRYPT_COST = 1 << 14
_SCRYPT_BLOCK = 8
_SALT = b"memserve cluster 2"

_BYTES = 32  # random bytes of a generated secret
_MAX_FILE_BYTES = 4096
_LOCAL_NAME = "local.secret"


@dataclass(frozen=True, slots=True)
class Secret:
    """The values of a cluster's secret.

    `values`: this process presents the first one and accepts all, so that a secret can be
    changed while the cluster runs. `local`: generated for this user on this machine.
    """

    values: tuple[str, ...]
    local: bool = False

    def __repr__(self) -> str:
        return f"Secret({len(self.values)} values, local={self.local})"  # never the values

    def __str__(self) -> str:
        """The values in the format of MEMSERVE_SECRET."""
        return ",".join(self.values)

    @property
    def masters(self) -> tuple[bytes, ...]:
        """One key [32 bytes] per value; the keys of each use are derived from it."""
        return tuple(map(_master, self.values))


def cluster_secret(given: str | None = None) -> Secret:
    """Return the first of: the secret `given`, MEMSERVE_SECRET, the file that MEMSERVE_SECRET_FILE
    names, this user's own secret on this machine.

    Commas separate several values. Raises ConfigError for a secret that cannot be read.
    """
    text = given if given is not None else os.environ.get(SECRET_VARIABLE)
    if text:
        return _parse(text, SECRET_VARIABLE)
    path = os.environ.get(SECRET_FILE_VARIABLE)
    if path:
        return _parse(read_private(Path(path)), path)
    return Secret((_local_secret(),), local=True)


def new_secret() -> Secret:
    """Return a random secret."""
    return Secret((os.urandom(_BYTES).hex(),))


def require_secret(secret: Secret, host: str) -> None:
    """Raise ConfigError if `host` is not a loopback host and the secret is local, because other
    machines cannot have it."""
    if secret.local and not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines: set {SECRET_VARIABLE} or "
            f"{SECRET_FILE_VARIABLE}, the same for the whole cluster, or listen on 127.0.0.1"
        )


# --- files ------------------------------------------------------------------------------


def keep_secret(secret: Secret, port: int) -> Path:
    """Write the secret of the cluster whose gateway listens on this port of this machine to a
    file, for `secret_of`. Returns the path; the caller removes it when the cluster ends."""
    path = _kept(port)
    write_private(path, str(secret))
    return path


def kept_secret(port: int) -> Secret | None:
    """Return the secret that `keep_secret` wrote for this port; None without any."""
    path = _kept(port)
    return _parse(read_private(path), str(path)) if path.exists() else None


def forget_secret(port: int) -> None:
    """Remove the file that a killed cluster may have left for this port."""
    _kept(port).unlink(missing_ok=True)


def secret_of(url: str) -> Secret:
    """Return the secret of the cluster whose gateway is at `url`: the environment's, else the one
    that `keep_secret` wrote for this port of this machine, else this user's own."""
    found = cluster_secret()
    try:
        parts, port = urlsplit(url), port_of(url)
    except ValueError:
        return found
    if found.local and is_loopback(parts.hostname or ""):
        return kept_secret(port) or found
    return found


def _kept(port: int) -> Path:
    return runtime_directory() / f"gateway-{port}.secret"


def runtime_directory() -> Path:
    """Return the directory of this user's files, mode 0700; create it if it does not exist.

    The default is in memory, beside the pools' segments, so secrets do not survive a reboot.
    Raises ConfigError if another user owns the directory or can access it.
    """
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    path = Path(chosen) if chosen else Path(f"/dev/shm/.memserve-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; choose another with {DIRECTORY_VARIABLE}"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{path} must be a directory of this user that nobody else may read "
            f"(chmod 700); choose another with {DIRECTORY_VARIABLE}"
        )
    return path


def _local_secret() -> str:
    path = runtime_directory() / _LOCAL_NAME
    if not path.exists():
        write_private(path, str(new_secret()), replace=False)
    return _parse(read_private(path), str(path)).values[0]


def write_private(path: Path, text: str, *, replace: bool = True) -> None:
    """Write a file that only this user can read, atomically. Without `replace`, an existing file is
    kept."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        if replace:
            os.replace(draft, path)
        else:
            os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink(missing_ok=True)


def read_private(path: Path) -> str:
    """Return a file's text. Raises ConfigError if it is unreadable, too long, or open to all
    users."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if mode & 0o007 and stat.S_ISREG(mode):
        raise ConfigError(f"{path}: everybody may read it; chmod 600 {path}")
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: longer than {_MAX_FILE_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8") from error


def _parse(text: str, source: str) -> Secret:
    values = tuple(value for part in text.split(",") if (value := part.strip()))
    if not values:
        raise ConfigError(f"{source}: no secret in it")
    if not text.isprintable() and not text.strip().isprintable():
        raise ConfigError(f"{source}: a secret is text, in UTF-8 and of one line")
    return Secret(values)


@lru_cache(maxsize=8)
def _master(value: str) -> bytes:
    return hashlib.scrypt(
        value.encode(), salt=_SALT, n=_SCRYPT_COST, r=_SCRYPT_BLOCK, p=1, dklen=32
    )
