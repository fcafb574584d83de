"""API keys of a gateway's clients, with names and tenants; kept as hashes.

An entry is a key, or `sha256:` and its hash, and behind it, each after a space:

    name=NAME       the owner, in logs; default: the first 16 digits of the hash
    tenant=NAME     keys of one tenant share turns and cached prompts; default: a tenant per key
    weight=NUMBER   its tenant's share of turns: 2 is twice the default
    priority        its requests' `priority` counts against other tenants', too

Generated keys are random, so that their hashes need no salt and no slow function; a key that an
operator chooses must be as hard to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from memserve.errors import ConfigError

KEYS_VARIABLE = "MEMSERVE_API_KEYS"
MAX_KEYS = 100_000
MAX_KEY_BYTES = 512  # of a key that a client shows; a longer one is no key
_PREFIX = "sha256:"
_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY_BYTES = 32  # random bytes of a generated key
_INDEX_BYTES = 8


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key's hash, owner, tenant and rights."""

    digest: bytes  # SHA-256
    name: str
    tenant: str
    privileged: bool = False  # its requests' priorities count among tenants
    weight: float = 1.0


class ApiKeys:
    """A set of keys, by hash. Immutable: a reload makes another one."""

    def __init__(self, keys: Iterable[ApiKey] = (), *, wanted: bool = False) -> None:
        """`wanted`: clients need a key even if the set is empty; then none is let in."""
        # Looked up by a keyed hash, which clients cannot predict; compared in constant time.
        self._secret = os.urandom(16)
        self._keys = {self._index(key.digest): key for key in keys}
        self.wanted = wanted or bool(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[ApiKey]:
        return iter(self._keys.values())

    def find(self, shown: bytes) -> ApiKey | None:
        """Return the key that a client shows; None if it is not in the set."""
        if len(shown) > MAX_KEY_BYTES:
            return None
        digest = hashlib.sha256(shown).digest()
        key = self._keys.get(self._index(digest))
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None

    def _index(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, digest_size=_INDEX_BYTES, key=self._secret).digest()


def load_keys(given: Iterable[str], file: str | None) -> ApiKeys:
    """Return the keys of a configuration (`given`), of MEMSERVE_API_KEYS, and of a file with an
    entry on each line (`#`: a comment). Raises ConfigError."""
    entries = _entries(given)
    wanted = file is not None or bool(os.environ.get(KEYS_VARIABLE))
    if file is not None:
        entries += _lines(Path(file))
    if len(entries) > MAX_KEYS:
        raise ConfigError(f"{len(entries)} API keys; at most {MAX_KEYS}")
    return ApiKeys((_parse(entry, source) for entry, source in entries), wanted=wanted)


def hashed(given: Iterable[str]) -> str:
    """Return the entries of `given` and of MEMSERVE_API_KEYS, in that variable's format, with
    hashes instead of keys. Raises ConfigError."""
    return ",".join(_entry(_parse(entry, source)) for entry, source in _entries(given))


def new_key(name: str | None, tenant: str | None, privileged: bool) -> tuple[str, str]:
    """Return a random key, and its entry, which has the hash. Raises ConfigError."""
    key = f"sk-{os.urandom(_KEY_BYTES).hex()}"
    words = [key]
    words += [] if name is None else [f"name={name}"]
    words += [] if tenant is None else [f"tenant={tenant}"]
    words += ["priority"] if privileged else []
    return key, _entry(_parse(" ".join(words), "a new key"))


def append_entry(path: Path, entry: str) -> None:
    """Add an entry to a file of keys; a file made here is readable by this user only. Raises
    ConfigError."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            ends = not size or os.pread(descriptor, 1, size - 1) == b"\n"
            file.write(f"{'' if ends else chr(10)}{entry}\n".encode())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _entries(given: Iterable[str]) -> list[tuple[str, str]]:
    """Return the entries, each with its source for error messages."""
    environment = os.environ.get(KEYS_VARIABLE, "").split(",")
    return [
        *((entry, "gateway.api_keys") for entry in given),
        *((entry, KEYS_VARIABLE) for entry in environment if entry.strip()),
    ]


def _lines(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8") from error
    lines = [(line.partition("#")[0].strip(), n) for n, line in enumerate(text.splitlines(), 1)]
    return [(line, f"{path}:{n}") for line, n in lines if line]


def _parse(entry: str, source: str) -> ApiKey:
    shown, *options = entry.split() or [""]
    if not shown:
        raise ConfigError(f"{source}: an API key is empty")
    if shown.startswith(_PREFIX):
        if _HASH.fullmatch(shown.removeprefix(_PREFIX)) is None:
            raise ConfigError(f"{source}: {_PREFIX} and 64 hexadecimal digits")
        digest = bytes.fromhex(shown.removeprefix(_PREFIX))
    else:
        digest = hashlib.sha256(shown.encode()).digest()
    name = tenant = digest.hex()[:16]
    privileged, weight = False, 1.0
    for option in options:
        word, _, value = option.partition("=")
        if option == "priority":
            privileged = True
        elif word == "weight":
            weight = _weight(value, source)
        elif word not in ("name", "tenant"):
            # The word may be a misplaced key, so the message does not repeat it.
            raise ConfigError(
                f"{source}: behind the key stand name=, tenant=, weight= and priority, and "
                "something else is there; keys are separated by commas, or lines of a file"
            )
        elif _NAME.fullmatch(value) is None:
            raise ConfigError(f"{source}: {word} has letters, digits, '.', '_' and '-', up to 64")
        elif word == "name":
            name = value
        else:
            tenant = value
    return ApiKey(digest, name, tenant, privileged, weight)


def _entry(key: ApiKey) -> str:
    words = [f"{_PREFIX}{key.digest.hex()}"]
    own = key.digest.hex()[:16]
    words += [f"name={key.name}"] if key.name != own else []
    words += [f"tenant={key.tenant}"] if key.tenant != own else []
    words += [f"weight={key.weight:g}"] if key.weight != 1 else []
    words += ["priority"] if key.privileged else []
    return " ".join(words)


def _weight(text: str, source: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(f"{source}: weight= is a number above 0")
    return weight
