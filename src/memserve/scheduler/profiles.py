"""Profiles: cost models with what they were measured on, kept in the user's cache.

One file for each combination of hardware and model, replaced as a whole. What cannot be read,
or belongs to something else, is as good as absent.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from memserve.errors import ProfileError
from memserve.models.demo import user_cache
from memserve.scheduler.architecture import Architecture
from memserve.scheduler.cost_model import CostModel

# A profile written by code that measured or computed otherwise is not read.
VERSION = 1

# default: from the figures of a typical machine; quick: some points, at an instance's first
# start; full: `memserve profile`.
Effort = Literal["default", "quick", "full"]
_RANK: tuple[Effort, ...] = ("default", "quick", "full")


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the speed of an instance depends on, beside its model."""

    device: str  # the GPU's or the CPU's name
    threads: int
    software: str


class Subject(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is measured: the key of a profile. Weights of one shape are equally fast."""

    hardware: Hardware
    architecture: Architecture
    dtype: str  # of weights and KV
    max_batch_tokens: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every field, as hex."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `GET /profile` of an instance answers, and what is stored."""

    version: int
    effort: Effort
    measured: str  # UTC, ISO 8601
    subject: Subject
    costs: CostModel


def make_profile(effort: Effort, subject: Subject, costs: CostModel) -> Profile:
    """A profile of now."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Profile(version=VERSION, effort=effort, measured=now, subject=subject, costs=costs)


_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Profile)
_PROBED = np.array([1, 512, 8192])  # tokens, and bytes: 2 ms


def encode_profile(profile: Profile) -> bytes:
    return _encode(profile)


def decode_profile(data: bytes) -> Profile:
    """Raises ProfileError for what is no profile of this version, or predicts nonsense."""
    try:
        profile = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError, OverflowError) as error:
        raise ProfileError(f"not a profile: {error}") from error
    if profile.version != VERSION:
        raise ProfileError(f"a profile of version {profile.version}; {VERSION} is read here")
    if not _predicts(profile.costs):
        raise ProfileError("a profile whose predictions are no times")
    return profile


def _predicts(costs: CostModel) -> bool:
    """Whether its predictions are finite and not negative, as far as prompts go: everybody's
    requests are routed by them."""
    try:
        with np.errstate(all="ignore"):
            seconds = (
                costs.prefill_seconds(_PROBED, 0),
                costs.decode_step_seconds(4, _PROBED),
                costs.transfer_seconds(_PROBED, 1, "shm"),
                costs.transfer_seconds(_PROBED, 1, "nixl"),
            )
    except (ValueError, ArithmeticError, MemoryError):  # numbers that fit nowhere
        return False
    return all(bool(np.all(np.isfinite(each) & (np.asarray(each) >= 0))) for each in seconds)


def host_hardware(device: str, threads: int) -> Hardware:
    """This machine, with an engine on `device` ("cpu", or a GPU's name)."""
    name = cpu_name() if device == "cpu" else device
    return Hardware(device=name, threads=threads, software=f"torch {metadata.version('torch')}")


def cpu_name() -> str:
    """As the kernel calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


class ProfileStore:
    """Profiles by subject."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or user_cache() / "profiles"

    def path(self, subject: Subject) -> Path:
        return self.directory / f"{subject.fingerprint[:32]}.json"

    def load(self, subject: Subject) -> Profile | None:
        """None where there is none, or none that can be used."""
        try:
            profile = decode_profile(self.path(subject).read_bytes())
        except (OSError, ProfileError):
            return None
        return profile if profile.subject == subject else None

    def save(self, profile: Profile) -> Path:
        """Store it, unless a more thorough one is there. Raises OSError."""
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
        """One process of this machine at a time measures a subject; others wait. Raises OSError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.path(subject).with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
