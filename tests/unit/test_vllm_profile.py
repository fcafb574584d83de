"""The cost model of a vLLM server, measured by requests to a fake one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memserve.config import ClusterConfig, InstanceConfig, ModelConfig
from memserve.engine.request import EngineInfo
from memserve.instance import vllm_profile as module
from memserve.instance.probe import ProbeFailed
from memserve.instance.vllm_profile import ServerProbe, measured_server, vllm_profile
from memserve.scheduler.profiles import Profile, ProfileStore
from memserve.types import RequestId
from memserve.vllm.place import ServerPlace
from tests.fake_vllm import BLOCK, BLOCKS, LENGTH, Server
from tests.fakes import tiny_tokenizer
from tests.tiny_models import save_tiny_model

INFO = EngineInfo(
    model="m",
    vocab_size=512,
    max_model_len=LENGTH,
    pool_tokens=BLOCK * BLOCKS,
    block_tokens=BLOCK,
    dtype="vllm",
    device="vllm",
    threads=1,
    eos_token_ids=(1,),
    max_running=4,
    mixed_batch_tokens=256,
    max_waiting=8,
)
TOKENS = np.arange(3, 200, dtype=np.int32)
Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a fake server whose prompts and steps take their time."""
    monkeypatch.setattr(module, "PLAN", replace(module.PLAN, rounds=1))
    servers: list[Server] = []

    def started(**settings: Any) -> Server:
        settings = {"prompt_token_seconds": 0.0002, "step_seconds": 0.002} | settings
        servers.append(Server(tmp_path / f"{len(servers)}", **settings))
        return servers[-1]

    yield started
    for server in servers:
        server.end()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def profile_of(server: Server, model: Path, store: ProfileStore, **settings: Any) -> Profile | None:
    own = InstanceConfig(engine="vllm", threads=1, **settings)
    config = ClusterConfig(model=ModelConfig(path=str(model)), instance=(own,))
    place = ServerPlace(path=server.path)
    return vllm_profile(
        config, own, model, tiny_tokenizer(store.directory.parent), place, INFO, store
    )


def test_prefills_prefixes_and_batches_are_measured(start: Start) -> None:
    server = start()
    measured = measured_server(ServerPlace(path=server.path), INFO, TOKENS)
    assert {0} < {point.cached_tokens for point in measured.prefill}
    assert all(0 < p.prompt_tokens <= LENGTH for p in measured.prefill)
    assert {point.sequences for point in measured.decode} == {1, 4}  # max_running of 4
    # Each in a namespace of its own: nothing was found that should not have been.
    salts = {body["cache_salt"] for body in server.fake.bodies}
    assert len(salts) > len(measured.prefill)
    assert server.fake.running == 0


def test_an_instance_that_lets_few_wait_is_measured_with_whole_batches(start: Start) -> None:
    info = replace(INFO, max_running=8, max_waiting=1)
    measured = measured_server(ServerPlace(path=start().path), info, TOKENS)
    assert {point.sequences for point in measured.decode} == {1, 8}


def test_chunks_that_come_together_took_the_time_before_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe = ServerProbe(ServerPlace(path="nowhere"), INFO, TOKENS)
    monkeypatch.setattr(probe, "_run", lambda *_: 0.0)
    # Steps of 2 seconds, of which two arrive at once each time.
    times = [0.0, *(4.0 * (i // 2 + 1) for i in range(8))]
    probe._outputs = {RequestId("a"): [(at, 1) for at in times]}
    assert probe.decode(1, 64, 8) == 2.0
    probe._outputs = {RequestId("a"): [(1.0, 1), (1.0, 1)]}
    with pytest.raises(ProbeFailed, match="all tokens of 1 sequences came at once"):
        probe.decode(1, 64, 8)


def test_a_server_that_does_not_tell_cached_tokens_is_measured_without_prefixes(
    start: Start,
) -> None:
    server = start(secretive=True)
    measured = measured_server(ServerPlace(path=server.path), INFO, TOKENS)
    assert {point.cached_tokens for point in measured.prefill} == {0}
    assert len(measured.prefill) >= 2


def test_a_server_that_others_use_is_not_measured(start: Start) -> None:
    server = start()
    server.fake.running = 1
    with pytest.raises(ProbeFailed, match="others use the server: 1 run"):
        measured_server(ServerPlace(path=server.path), INFO, TOKENS)
    assert server.fake.bodies == []


def test_a_started_server_is_measured_once(start: Start, model: Path, tmp_path: Path) -> None:
    server, store = start(), ProfileStore(tmp_path / "profiles")
    first = profile_of(server, model, store)
    assert first is not None
    assert first.effort == "quick"
    asked = len(server.fake.bodies)
    assert profile_of(server, model, store) == first
    assert len(server.fake.bodies) == asked
    # Other arguments may make another speed.
    other = profile_of(server, model, store, vllm_args=("--tensor-parallel-size=2",))
    assert other is not None
    assert other.subject.architecture.tensor_parallel == 2
    assert len(server.fake.bodies) > asked


def test_a_server_of_others_is_measured_each_time(
    start: Start, model: Path, tmp_path: Path
) -> None:
    server, store = start(), ProfileStore(tmp_path / "profiles")
    first = profile_of(server, model, store, vllm_url="http://127.0.0.1:8001")
    again = profile_of(server, model, store, vllm_url="http://127.0.0.1:8002")
    assert first is not None
    assert again is not None
    assert first.effort == again.effort == "quick"
    assert first.subject.fingerprint != again.subject.fingerprint
    assert not store.directory.exists()


def test_without_a_measurement_the_model_is_priced_on_typical_hardware(
    start: Start, model: Path, tmp_path: Path
) -> None:
    server, store = start(), ProfileStore(tmp_path / "profiles")
    profile = profile_of(server, model, store, profile="off")
    assert profile is not None
    assert profile.effort == "default"
    assert server.fake.bodies == []
    server.fake.running = 1  # in use: not measured either
    profile = profile_of(server, model, store)
    assert profile is not None
    assert profile.effort == "default"


def test_a_model_of_unknown_form_has_no_cost_model(start: Start, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert profile_of(start(), tmp_path, ProfileStore(tmp_path / "profiles")) is None


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (("-tp", "4"), 4),
        (("--tensor-parallel-size=2", "-tp", "8"), 8),
        (("-tp",), None),
        (("-tp", "many"), None),
        (("--tensor-parallel-size-of-others", "3"), None),
    ],
)
def test_arguments_of_vllm(arguments: tuple[str, ...], value: int | None) -> None:
    assert module._number(arguments, "--tensor-parallel-size", "-tp") == value
