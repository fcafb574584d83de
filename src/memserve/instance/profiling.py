"""Profile of an instance: loaded from the store, or measured before the instance takes requests."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import msgspec

from memserve.clock import MonotonicClock
from memserve.config import Profiling
from memserve.engine.devices import device_name
from memserve.engine.engine import Engine, EngineSettings
from memserve.engine.model import Model
from memserve.errors import OutOfBlocks, ProfileError, SharedMemoryFull
from memserve.instance.fit import fit_costs
from memserve.instance.probe import EngineProbe, ProbeFailed
from memserve.instance.profiler import PLANS, Effort, Profiler, Progress, measure_transfers
from memserve.pool.layout import KVLayout
from memserve.pool.pool import BlockPool
from memserve.scheduler.architecture import read_architecture
from memserve.scheduler.contract import Link
from memserve.scheduler.hardware import HARDWARE, cores, derive
from memserve.scheduler.profiles import (
    Measurements,
    PrefillPoint,
    Profile,
    ProfileStore,
    Subject,
    host_hardware,
    make_profile,
)

log = logging.getLogger(__name__)

# Assumed model of an NVIDIA GPU without known figures.
_TYPICAL_GPU = "a100"
_MOST_WAITING = 64  # more sequences than any plan submits at once
# Maximum share of the measuring time that threads waited for a core; above it, other processes
# distort the measurements. OpenMP's threads spin for each other, which multiplies the wait.
MOST_WAITED = 0.15
# Maximum size of the measured pool, except for a minimum of _FEWEST_TOKENS. If a token's KV is
# large, the measured contexts get shorter.
_POOL_BYTES = 1 << 30
_FEWEST_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class ProfiledEngine:
    """A model with the layout and settings of the engine to profile."""

    model: Model
    layout: KVLayout
    settings: EngineSettings
    directory: Path  # of the model

    @property
    def subject(self) -> Subject:
        """Key of the engine's profile: hardware, architecture, dtype, step size. Raises
        ModelError."""
        dtype = self.layout.dtype
        return Subject(
            hardware=host_hardware(device_name(self.model.device), self.settings.threads),
            architecture=read_architecture(self.directory, self.directory.name, dtype),
            dtype=dtype,
            max_batch_tokens=self.settings.limits.max_tokens,
        )

    @contextmanager
    def profiler(self, effort: Effort, progress: Progress) -> Iterator[Profiler]:
        """Context with a Profiler on an engine and a pool of its own. Raises SharedMemoryFull."""
        tokens = PLANS[effort].pool_tokens
        blocks = min(tokens, max(_POOL_BYTES // self.layout.token_bytes, _FEWEST_TOKENS))
        blocks = -(-blocks // self.layout.block_tokens)
        device = str(self.model.device)
        settings = replace(self.settings, max_waiting=_MOST_WAITING)
        with BlockPool(self.layout, blocks, 0, f"profile-{os.getpid()}", device) as pool:
            probe = EngineProbe(Engine(self.model, pool, settings))
            yield Profiler(probe, MonotonicClock(), progress)


def instance_profile(
    subject: Subject,
    mode: Profiling,
    store: ProfileStore | None,
    measure: Callable[[], Measurements],
) -> Profile:
    """Return the stored profile; if there is none, with mode "auto", a quick one, which is measured
    and stored; else the default profile, also after a failed measurement. `store`: None: profiles
    are not stored.

    `measure` may raise ProbeFailed, OutOfBlocks, SharedMemoryFull.
    """
    with ExitStack() as stack:
        if store is not None and store.load(subject) is None and mode == "auto":
            try:
                stack.enter_context(store.measuring(subject))
            except OSError as error:
                log.warning("profiles cannot be stored in %s: %s", store.directory, error)
        # Another process may have measured it meanwhile.
        stored = None if store is None else store.load(subject)
        if stored is not None:
            log.info("cost model: %s profile of %s", stored.effort, stored.measured)
            return stored
        if mode == "off":
            return default_profile(subject)
        log.info("cost model: measuring this instance, which takes a few seconds")
        try:
            measured = measure()
            like = default_profile(subject).costs
            costs = fit_costs(measured, subject.architecture, subject.max_batch_tokens, like)
        except (ProfileError, ProbeFailed, OutOfBlocks, SharedMemoryFull) as error:
            log.warning("the instance was not measured: %s", error)
            return default_profile(subject)
        profile = make_profile("quick", subject, costs)
        if measured.waited > MOST_WAITED:
            log.warning(
                "the machine was busy, so the profile is not stored; to measure and store one, run "
                "'memserve profile' when it is idle"
            )
            return profile
        if store is None:
            return profile
        try:
            log.info("cost model: stored in %s", store.save(profile))
        except OSError as error:
            log.warning("the profile was not stored: %s", error)
        return profile


def quick_measurements(engine: ProfiledEngine) -> Measurements:
    """Return measurements for the first start of a built-in engine. Raises as
    `take_measurements`."""
    return take_measurements(engine, "quick", log.info)[0]


def take_measurements(
    engine: ProfiledEngine,
    effort: Effort,
    progress: Progress,
    held_out: Callable[[int], Sequence[tuple[int, int]]] = lambda _: (),
    rounds: int | None = None,
) -> tuple[Measurements, tuple[PrefillPoint, ...]]:
    """Measure prefills, decode steps, and transfers by the paths available here.

    Returns the measurements, and held-out prefills. `held_out` gets the longest possible prompt
    (tokens) and returns their points (prompt tokens, cached tokens). `rounds` replaces the plan's
    number and scales its time limit. Raises ProbeFailed, OutOfBlocks, SharedMemoryFull.
    """
    plan = PLANS[effort]
    if rounds is not None:
        plan = replace(plan, rounds=rounds, seconds=plan.seconds / plan.rounds * rounds)
    with engine.profiler(effort, progress) as profiler:
        measured, others = profiler.measure(
            plan, engine.settings.limits.max_running, held_out(profiler.longest_prompt)
        )
    paths: list[Link] = ["shm"]
    if effort == "full" and find_spec("nixl") is not None:
        paths.append("nixl")
    transfers = measure_transfers(
        engine.layout, str(engine.model.device), paths, plan.blocks, progress
    )
    return msgspec.structs.replace(measured, transfer=transfers), others


def default_profile(subject: Subject) -> Profile:
    """Return a profile derived from the figures of typical hardware, without measurement."""
    device = subject.hardware.device.lower()
    named = [name for name in HARDWARE if name in device and name != "cpu"]
    if named or "nvidia" in device:
        hardware = HARDWARE[named[0] if named else _TYPICAL_GPU]
    else:
        hardware = cores(HARDWARE["cpu"], subject.hardware.threads)
    costs = derive(hardware, subject.architecture, subject.max_batch_tokens)
    return make_profile("default", subject, costs)
