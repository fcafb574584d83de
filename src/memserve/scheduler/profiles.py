"""Profiles: cost models with the key of their hardware and model, stored in the user's cache, and
the measurements that cost models are fitted to.

One file per combination of hardware and model, replaced atomically. A file that cannot be read, or
that is of another subject, counts as absent.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from memserve.cpu import cpu_name
from memserve.errors import ProfileError
from memserve.models.demo import user_cache
from memserve.scheduler.architecture import Architecture
from memserve.scheduler.contract import TransferPath
from memserve.scheduler.cost_model import CostModel

_Count = Annotated[int, Meta(ge=0)]
_Seconds = Annotated[float, Meta(gt=0)]


class PrefillPoint(msgspec.Struct, frozen=True):
    """Prefill of one prompt alone, up to its first token."""

    prompt_tokens: _Count
    cached_tokens: _Count
    seconds: _Seconds


class DecodePoint(msgspec.Struct, frozen=True):
    """One decode step of a batch."""

    sequences: _Count
    context_tokens: _Count  # sum over the sequences
    seconds: _Seconds


class TransferPoint(msgspec.Struct, frozen=True):
    """Transfer of blocks to another pool, from the call to the acknowledgement."""

    path: TransferPath
    num_bytes: _Count
    pieces: _Count
    seconds: _Seconds


class Measurements(msgspec.Struct, frozen=True):
    """Measured points, each the median of repeats."""

    prefill: tuple[PrefillPoint, ...] = ()
    decode: tuple[DecodePoint, ...] = ()
    transfer: tuple[TransferPoint, ...] = ()
    # Seconds that threads waited for a busy core, per second of prefills and decode steps. A high
    # value means that other processes disturbed the measurements.
    waited: Annotated[float, Meta(ge=0)] = 0.0


# Profiles of other versions are refused. To be raised when measurements or formulas change.
VERSION = 2

# default: derived from the figures of a typical machine; quick: a few points, measured at an
# instance's first start; full: measured by `memserve profile`.
Effort = Literal["default", "quick", "full"]
_RANK: tuple[Effort, ...] = ("default", "quick", "full")


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The parts of an instance, other than its model, that determine its speed."""

    device: str  # name of the GPU or CPU
    threads: int
    software: str


class Subject(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The key of a profile. Models of one architecture share it: weights' values do not matter."""

    hardware: Hardware
    architecture: Architecture
    dtype: str  # of weights and KV
    max_batch_tokens: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all fields, hex."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stored profile, and the answer of an instance to `GET /profile`."""

    version: int
    effort: Effort
    measured: str  # UTC, ISO 8601
    subject: Subject
    costs: CostModel


def make_profile(effort: Effort, subject: Subject, costs: CostModel) -> Profile:
    """Return a profile with the current time."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Profile(version=VERSION, effort=effort, measured=now, subject=subject, costs=costs)


_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Profile)
_PROBED = np.array([1, 512, 8192])  # tokens and bytes; the check takes 2 ms


def encode_profile(profile: Profile) -> bytes:
    return _encode(profile)


def decode_profile(data: bytes) -> Profile:
    """Decode a profile. Raises ProfileError if it is invalid, of another version, or predicts
    seconds that are negative or not finite."""
    profile = read_profile(data)
    if not _predicts(profile.costs):
        raise ProfileError("the profile predicts negative or infinite seconds")
    return profile


def read_profile(data: bytes) -> Profile:
    """Decode a profile without the check of its predictions, which takes some milliseconds. Raises
    ProfileError if it is invalid, or of another version."""
    try:
        profile = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError, OverflowError) as error:
        raise ProfileError(f"not a profile: {error}") from error
    if profile.version != VERSION:
        raise ProfileError(f"the profile has version {profile.version}, not {VERSION}")
    return profile


def _predicts(costs: CostModel) -> bool:
    """Return whether predictions at `_PROBED` sizes are finite and not negative. A bad profile of
    one member would affect the routing of all requests."""
    try:
        with np.errstate(all="ignore"):
            seconds = (
                costs.prefill_seconds(_PROBED, 0),
                costs.decode_step_seconds(4, _PROBED),
                costs.transfer_seconds(_PROBED, 1, "shm"),
                costs.transfer_seconds(_PROBED, 1, "nixl"),
                costs.transfer_seconds(_PROBED, 1, "host"),
            )
    except (ValueError, ArithmeticError, MemoryError):  # numbers that are far too large
        return False
    return all(bool(np.all(np.isfinite(each) & (np.asarray(each) >= 0))) for each in seconds)


def host_hardware(device: str, threads: int) -> Hardware:
    """Return the `Hardware` of this machine with an engine on `device`: "cpu", or a GPU's name."""
    name = cpu_name() if device == "cpu" else device
    return Hardware(device=name, threads=threads, software=f"torch {metadata.version('torch')}")


class ProfileStore:
    """Stored profiles by subject, one JSON file each."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or user_cache() / "profiles"

    def path(self, subject: Subject) -> Path:
        return self.directory / f"{subject.fingerprint[:32]}.json"

    def load(self, subject: Subject) -> Profile | None:
        """Return the stored profile of a subject; None if absent or unusable."""
        try:
            profile = decode_profile(self.path(subject).read_bytes())
        except (OSError, ProfileError):
            return None
        return profile if profile.subject == subject else None

    def save(self, profile: Profile) -> Path:
        """Store a profile unless one of more effort exists; return its path. Raises OSError."""
        path = self.path(profile.subject)
        there = self.load(profile.subject)
        if there is not None and _RANK.index(there.effort) > _RANK.index(profile.effort):
            return path
        self.directory.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".unfinished-", dir=self.directory)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.format(_encode(profile), indent=1) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        return path

    @contextmanager
    def measuring(self, subject: Subject) -> Iterator[None]:
        """Lock a subject for measuring; other processes of this host wait. Raises OSError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.path(subject).with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
