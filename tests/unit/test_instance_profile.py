"""Measuring a small instance, keeping what was measured, and giving it to whoever asks."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import count
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest

from memserve.api.http_message import Request
from memserve.api.status import PoolTotals
from memserve.bench.profile import (
    check_plot,
    held_out_points,
    profile_table,
    run_profile,
    write_plot,
)
from memserve.bench.profile_cli import ProfileConfig
from memserve.clock import ManualClock, MonotonicClock
from memserve.config import Profiling
from memserve.engine.batch import BatchLimits
from memserve.engine.engine import Engine, EngineSettings
from memserve.engine.model import Model
from memserve.errors import ConfigError, ProfileError
from memserve.instance import samples as samples_module
from memserve.instance.app import InstanceApp
from memserve.instance.instance import Instance
from memserve.instance.parts import Identity, Parts
from memserve.instance.probe import EngineProbe
from memserve.instance.profiler import PLANS, QUICK, ProfilePlan, Profiler
from memserve.instance.profiling import (
    ProfiledEngine,
    default_profile,
    instance_profile,
    quick_measurements,
)
from memserve.instance.samples import Samples
from memserve.pool.pool import BlockPool
from memserve.scheduler.profiles import (
    VERSION,
    Profile,
    ProfileStore,
    decode_profile,
    encode_profile,
    make_profile,
)
from memserve.types import Epoch, InstanceId, Role
from tests.engine_harness import load
from tests.fakes import FakeEngine, tiny_tokenizer
from tests.gateway_harness import Client
from tests.tiny_models import save_tiny_model

LIMITS = BatchLimits(max_tokens=256, mixed_tokens=64, max_running=8)
SETTINGS = EngineSettings("tiny", threads=1, limits=LIMITS, max_waiting=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    directory = save_tiny_model("gemma3", tmp_path_factory.mktemp("models"))
    return load(directory), directory


def _profile(engine: ProfiledEngine, mode: Profiling, store: ProfileStore) -> Profile:
    return instance_profile(engine.subject, mode, store, lambda: quick_measurements(engine))


@pytest.fixture
def engine(tiny: tuple[Model, Path]) -> ProfiledEngine:
    model, directory = tiny
    return ProfiledEngine(model, model.layout("tiny", 16, True), SETTINGS, directory)


@pytest.fixture
def store(tmp_path: Path) -> ProfileStore:
    return ProfileStore(tmp_path / "profiles")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else runs on the machine, as far as anybody can tell."""
    monkeypatch.setattr(samples_module, "seconds_waited", lambda: 0.0)


def test_a_probe_times_what_it_says_and_leaves_nothing(tiny: tuple[Model, Path]) -> None:
    model, _ = tiny
    with BlockPool(model.layout("tiny", 16, True), 64, 0, instance="p") as pool:
        engine = Engine(model, pool, SETTINGS)
        with EngineProbe(engine) as probe:
            assert probe.prefill(600, 320) > 0
            assert probe.decode(4, 100, 3) > 0
            stats = engine.stats()
        # 280 of the first prompt; of the others what is behind their last whole block.
        assert stats.computed_prompt_tokens == 280 + 4 * (100 - 96)
        assert stats.cached_prompt_tokens == 320 + 4 * 96
        assert stats.steps == 2 + 4
        pool.check_integrity()
        hbm = pool.stats().hbm
        assert (hbm.free, hbm.active, hbm.pinned) == (64, 0, 0)


def test_points_are_shortened_to_what_the_engine_can_hold(tiny: tuple[Model, Path]) -> None:
    model, _ = tiny
    with BlockPool(model.layout("tiny", 16, True), 20, 0, instance="p") as pool:
        profiler = Profiler(
            EngineProbe(Engine(model, pool, SETTINGS)), ManualClock(), lambda _: None
        )
        measured, others = profiler.measure(QUICK, 8, [(100, 50)])
    assert max(p.prompt_tokens for p in measured.prefill) <= 20 * 16
    assert {p.cached_tokens for p in measured.prefill} != {0}
    assert max(p.context_tokens for p in measured.decode) <= 20 * 16
    ((prompt, cached),) = [(p.prompt_tokens, p.cached_tokens) for p in others]
    assert (prompt, cached) == (100, 48)


def test_what_does_not_fit_the_time_is_left_out(tiny: tuple[Model, Path]) -> None:
    model, _ = tiny
    plan = ProfilePlan(
        prefill=((1, 0), (16, 0), (64, 0), (128, 0)),
        decode=((1, 16), (2, 16), (4, 16)),
        blocks=(1,),
        rounds=3,
        seconds=-1.0,
        needed=2,
        pool_tokens=1024,
    )
    with BlockPool(model.layout("tiny", 16, True), 64, 0, instance="p") as pool:
        profiler = Profiler(
            EngineProbe(Engine(model, pool, SETTINGS)), ManualClock(), lambda _: None
        )
        measured, _ = profiler.measure(plan, 8)
    assert [p.prompt_tokens for p in measured.prefill] == [1, 16]
    assert [p.sequences for p in measured.decode] == [1, 2]


def test_undisturbed_times_are_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([0.0, 0.0, 0.0, 1e6, 1e6, 1e6, 1e6, 1e6, 1e6, 2e6, 2e6, 4e6])
    monkeypatch.setattr(samples_module, "seconds_waited", lambda: next(waits))
    samples = Samples([(1, 0), (1, 0), (2, 0)])
    assert samples.points == [(1, 0), (2, 0)]
    for seconds in (5.0, 90.0, 4.0, 7.0):  # the second one waited
        samples.take((1, 0), lambda *_, seconds=seconds: seconds)  # type: ignore[misc]
    for seconds in (30.0, 40.0):
        samples.take((2, 0), lambda *_, seconds=seconds: seconds)  # type: ignore[misc]
    assert samples.disturbed == [(2, 0)]
    assert {point: sample.seconds for point, sample in samples.believed.items()} == {
        (1, 0): 5.0,
        (2, 0): 30.0,
    }


def test_a_first_start_measures_and_the_next_one_reads(
    engine: ProfiledEngine,
    store: ProfileStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    first = _profile(engine, "auto", store)
    assert first.effort == "quick"
    assert "measuring this instance" in caplog.text
    caplog.clear()
    assert _profile(engine, "auto", store) == first
    assert _profile(engine, "off", store) == first  # off: nothing is measured
    assert "measuring" not in caplog.text
    seconds = first.costs.prefill_seconds([64, 512, 900], 0)
    assert (seconds > 0).all()
    assert (seconds < 5).all()
    assert float(first.costs.transfer_seconds(10**6, 16, "shm")) > 0


def test_a_busy_machine_is_measured_again_the_next_time(
    engine: ProfiledEngine, store: ProfileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = count()
    monkeypatch.setattr(samples_module, "seconds_waited", lambda: float(next(waits)))
    # What was disturbed is measured again while there is time; here there is little.
    monkeypatch.setitem(PLANS, "quick", replace(QUICK, seconds=0.0))
    assert _profile(engine, "auto", store).effort == "quick"
    assert store.load(engine.subject) is None
    assert _profile(engine, "auto", store).effort == "quick"


def test_without_a_measurement_a_typical_machine_is_assumed(
    engine: ProfiledEngine, store: ProfileStore
) -> None:
    profile = _profile(engine, "off", store)
    assert profile.effort == "default"
    assert float(profile.costs.prefill_seconds(512, 0)) > 0
    assert store.load(engine.subject) is None
    gpu = msgspec.structs.replace(engine.subject.hardware, device="NVIDIA H100 80GB HBM3")
    on_gpu = default_profile(msgspec.structs.replace(engine.subject, hardware=gpu))
    assert on_gpu.costs.prefill_seconds(512, 0) < profile.costs.prefill_seconds(512, 0)


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    engine: ProfiledEngine, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    profile = _profile(engine, "auto", ProfileStore(tmp_path / "file" / "profiles"))
    assert profile.effort == "quick"


def test_profiles_are_kept_apart_by_what_they_depend_on(
    engine: ProfiledEngine, store: ProfileStore
) -> None:
    profile = default_profile(engine.subject)
    path = store.save(profile)
    assert store.load(engine.subject) == profile
    assert list(store.directory.iterdir()) == [path]  # nothing unfinished
    for other in (
        replace(engine, settings=replace(SETTINGS, threads=2)),
        replace(engine, settings=replace(SETTINGS, limits=replace(LIMITS, max_tokens=512))),
    ):
        assert store.load(other.subject) is None
    moved = path.rename(store.path(other.subject))  # a file in another's place is not believed
    assert moved.exists()
    assert store.load(other.subject) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"version": 1}',
    ],
)
def test_a_damaged_file_is_as_good_as_none(
    engine: ProfiledEngine, store: ProfileStore, data: bytes
) -> None:
    path = store.save(default_profile(engine.subject))
    path.write_bytes(data)
    assert store.load(engine.subject) is None
    store.save(default_profile(engine.subject))
    assert store.load(engine.subject) is not None


def test_another_version_is_not_read(engine: ProfiledEngine, store: ProfileStore) -> None:
    profile = msgspec.structs.replace(default_profile(engine.subject), version=VERSION + 1)
    with pytest.raises(ProfileError, match=f"version {VERSION + 1}, not {VERSION}"):
        decode_profile(encode_profile(profile))
    store.save(profile)
    assert store.load(engine.subject) is None


@pytest.mark.parametrize("tokens", [0, (1 << 20) + 1, 1 << 31, (1 << 63) - 1])
def test_tables_that_would_fill_the_memory_are_not_begun(
    engine: ProfiledEngine, tokens: int
) -> None:
    """They have a row for each token of a step, and a member says how many there are."""
    profile = default_profile(engine.subject)
    costs = msgspec.structs.replace(profile.costs, max_batch_tokens=tokens)
    with pytest.raises(ProfileError, match=r"max_batch_tokens"):
        decode_profile(encode_profile(msgspec.structs.replace(profile, costs=costs)))


def test_a_quick_profile_does_not_replace_a_full_one(
    engine: ProfiledEngine, store: ProfileStore
) -> None:
    def of(effort: str) -> Profile:
        costs = default_profile(engine.subject).costs
        return make_profile(effort, engine.subject, costs)  # type: ignore[arg-type]

    store.save(of("full"))
    store.save(of("quick"))
    stored = store.load(engine.subject)
    assert stored is not None
    assert stored.effort == "full"
    store.save(of("full"))


async def test_an_instance_gives_its_profile(engine: ProfiledEngine, tmp_path: Path) -> None:
    profile = default_profile(engine.subject)
    identity = Identity(InstanceId("i"), Epoch(1), Role.COLOCATED, "tiny")
    instance = Instance(identity, MonotonicClock())
    app = InstanceApp(instance)
    assert (await _get(app, "/profile"))[0] == 503  # not yet
    parts = Parts(FakeEngine(), tiny_tokenizer(tmp_path), PoolTotals, lambda: None, profile=profile)
    await instance.start(parts)
    try:
        status, body = await _get(app, "/profile")
    finally:
        await instance.stop()
        await instance.close()
    assert status == 200
    assert decode_profile(body) == profile


async def _get(app: InstanceApp, path: str) -> tuple[int, bytes]:
    request = Request("GET", path, b"", [], b"", False, True, path.encode())
    client = Client(request)
    await app.handle(request, client.reply)
    return client.status, client.body


def test_the_command_fits_checks_and_plots(
    engine: ProfiledEngine,
    store: ProfileStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PLANS, "full", QUICK)
    config = ProfileConfig(threads=1, max_batch_tokens=256, held_out=8, rounds=1)
    said: list[str] = []
    report = run_profile(engine, config, store, said.append)
    assert report.held_out is not None
    assert report.held_out_by_architecture is not None
    assert report.held_out.points == len(report.checked) == 8
    assert all(point.measured > 0 and point.predicted > 0 for point in report.checked)
    assert store.load(engine.subject) == report.profile
    assert any("round 1 of 1" in line for line in said)
    assert profile_table(report).renderables
    write_plot(report, tmp_path / "plots" / "p.svg")
    root = ElementTree.fromstring((tmp_path / "plots" / "p.svg").read_text())
    svg = "{http://www.w3.org/2000/svg}"
    points = [g for g in root.iter(f"{svg}g") if g.get("id", "").startswith("PathCollection")]
    assert [len(list(one.iter(f"{svg}use"))) for one in points] == [8, 8, 1, 1]  # the legend


def test_plots_that_cannot_be_are_refused_before_measuring() -> None:
    with pytest.raises(ConfigError, match=r"an \.svg file"):
        check_plot(Path("p.png"), ProfileConfig())
    with pytest.raises(ConfigError, match="nothing to plot"):
        check_plot(Path("p.svg"), ProfileConfig(held_out=0))


def test_held_out_points_span_lengths_and_cached_ratios() -> None:
    points = held_out_points(24, 30_000)
    prompts = [x for x, _ in points]
    assert prompts == sorted(prompts)
    assert prompts[0] < 90
    assert 6500 < prompts[-1] <= 8192
    ratios = np.array([c / x for x, c in points])
    assert ratios.min() == 0.0
    assert 0.93 < ratios.max() <= 0.95
    assert max(x for x, _ in held_out_points(24, 500)) <= 500
