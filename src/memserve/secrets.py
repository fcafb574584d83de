"""The cluster's secret: where a process gets it from, and where it is kept on this machine.

Everything of one cluster shares it: instances, gateways, and the person who operates them. It is
never an argument of a command and never in a log. Where nobody gives one, processes of one user
on one machine share a file that nobody else can read: other users of the machine are strangers,
and so is the network, since such a secret does not suffice beyond loopback.
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
from memserve.hosts import is_loopback

SECRET_VARIABLE = "MEMSERVE_SECRET"
SECRET_FILE_VARIABLE = "MEMSERVE_SECRET_FILE"
DIRECTORY_VARIABLE = "MEMSERVE_RUNTIME_DIR"

# A person may choose the secret: make guessing it expensive (some 50 ms and 16 MiB a guess).
_SCRYPT_COST = 1 << 14
_SCRYPT_BLOCK = 8
_SALT = b"memserve cluster 2"

_BYTES = 32  # of a secret that is made here
_MAX_FILE_BYTES = 4096
_LOCAL_NAME = "local.secret"


@dataclass(frozen=True, slots=True)
class Secret:
    """`values`: the first one is shown to others, all are accepted from them, so that a secret
    can be changed while the cluster runs. `local`: it is this user's on this machine."""

    values: tuple[str, ...]
    local: bool = False

    def __repr__(self) -> str:
        return f"Secret({len(self.values)} values, local={self.local})"  # never the values

    def __str__(self) -> str:
        """As MEMSERVE_SECRET has it."""
        return ",".join(self.values)

    @property
    def masters(self) -> tuple[bytes, ...]:
        """A key [32 bytes] of each value, from which the keys of each use are derived."""
        return tuple(map(_master, self.values))


def cluster_secret(given: str | None = None) -> Secret:
    """The secret `given`, or of MEMSERVE_SECRET, of the file that MEMSERVE_SECRET_FILE names, or
    else of this user on this machine.

    Several values are separated by commas. Raises ConfigError for one that cannot be read.
    """
    text = given if given is not None else os.environ.get(SECRET_VARIABLE)
    if text:
        return _parse(text, SECRET_VARIABLE)
    path = os.environ.get(SECRET_FILE_VARIABLE)
    if path:
        return _parse(_read(Path(path)), path)
    return Secret((_local_secret(),), local=True)


def new_secret() -> Secret:
    """A random one."""
    return Secret((os.urandom(_BYTES).hex(),))


def require_secret(secret: Secret, host: str) -> None:
    """Raise ConfigError where `host` is reached from elsewhere and only this user's own secret is
    there: other machines could not have it."""
    if secret.local and not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines: set {SECRET_VARIABLE} or "
            f"{SECRET_FILE_VARIABLE}, the same for the whole cluster, or listen on 127.0.0.1"
        )


# --- files ------------------------------------------------------------------------------


def keep_secret(secret: Secret, port: int) -> Path:
    """Keep the secret of the cluster whose gateway listens on a port of this machine, for
    `secret_of`. Returns the file, which the caller removes when the cluster ends."""
    path = runtime_directory() / f"gateway-{port}.secret"
    _write(path, str(secret))
    return path


def forget_secret(port: int) -> None:
    """A cluster that had this port, and was killed, may have left its secret."""
    (runtime_directory() / f"gateway-{port}.secret").unlink(missing_ok=True)


def secret_of(url: str) -> Secret:
    """The secret of the cluster whose gateway is at a URL: one that the environment names; that
    which was kept for this port of this machine; or this user's own."""
    found = cluster_secret()
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return found
    if found.local and is_loopback(parts.hostname or ""):
        path = runtime_directory() / f"gateway-{port}.secret"
        if path.exists():
            return _parse(_read(path), str(path))
    return found


def runtime_directory() -> Path:
    """The directory of this user's files, which nobody else can look into; made if need be.

    It is in memory, beside the pools' segments: secrets do not outlive the machine's run.
    Raises ConfigError where somebody else has made it, or others may read it.
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
        _write(path, str(new_secret()), replace=False)
    return _parse(_read(path), str(path)).values[0]


def _write(path: Path, text: str, *, replace: bool = True) -> None:
    """Whole, or not at all; without `replace`, whoever is first has made it."""
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


def _read(path: Path) -> str:
    """Raises ConfigError. A file that others may read is no secret."""
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
