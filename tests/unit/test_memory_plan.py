"""Memory that instances ask for is counted before anything is loaded, and refused with numbers."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from memserve.config import (
    ClusterConfig,
    InstanceConfig,
    ModelConfig,
    PlannerConfig,
    parse_bytes,
)
from memserve.engine.model import load_model
from memserve.errors import ConfigError
from memserve.host_memory import HostMemory
from memserve.instance import build
from memserve.instance.memory_plan import (
    CPU_BLOCKS,
    PROCESS_BYTES,
    Machine,
    ModelMemory,
    block_counts,
    model_memory,
    planned,
    step_bytes,
)
from memserve.instance.parts import Identity
from memserve.models.weights import count_parameters
from memserve.scheduler.architecture import LLAMA3_8B
from memserve.types import Epoch, InstanceId, Role
from tests.fakes import save_tiny_tokenizer
from tests.tiny_models import save_tiny_model

MIB, GIB = 1024**2, 1024**3
MODEL = ModelMemory(weights=GIB, token=64 * 1024)  # a block of 16: 1 MiB
REST = GIB + PROCESS_BYTES  # of one instance


def cluster(*instances: InstanceConfig) -> ClusterConfig:
    return ClusterConfig(instance=instances)


def here(free: int, shared: int | None = None, device: int | None = None) -> Machine:
    return Machine(HostMemory(free, 64 * GIB, "here"), shared, device)


def one(**settings: object) -> InstanceConfig:
    return InstanceConfig(**{"hbm_blocks": 100, "dram_blocks": 50, **settings})  # type: ignore[arg-type]


def test_what_fits_exactly_fits_and_a_byte_less_does_not() -> None:
    config = cluster(one(count=2), one(dram_blocks=0))
    need = (2 * 150 + 100) * MIB + 3 * REST
    assert planned(config, MODEL, here(need)) == config
    with pytest.raises(ConfigError, match=r"not enough memory: 4\.1 GiB are asked for"):
        planned(config, MODEL, here(need - 1))


def test_the_sum_over_all_members_is_told_and_a_value_that_fits() -> None:
    config = cluster(one(dram_blocks=200_000), one())
    with pytest.raises(ConfigError) as refused:
        planned(config, MODEL, here(16 * GIB))
    said = str(refused.value)
    assert "hbm_blocks = 100 (100 MiB), dram_blocks = 200000 (195 GiB)" in said
    assert "2.5 GiB besides for weights" in said
    assert "16.0 GiB of 64.0 GiB are free here" in said
    found = re.search(r"dram_blocks = ([0-9]+) would fit", said)
    assert found is not None
    fits = int(found[1])
    assert fits > 10_000
    assert planned(cluster(one(dram_blocks=fits), one()), MODEL, here(16 * GIB))


sizes = st.integers(1, 10**6).map(lambda mib: f"{mib}MiB")
tables = st.builds(
    InstanceConfig,
    count=st.integers(1, 4),
    hbm_blocks=st.none() | st.integers(1, 10**6),
    dram_blocks=st.integers(0, 10**6),
    hbm=st.none() | sizes | st.integers(1, 99).map(lambda percent: f"{percent}%"),
    dram=st.none() | sizes | st.integers(1, 99).map(lambda percent: f"{percent}%"),
)


def in_bytes(table: InstanceConfig) -> int:
    """KV of one instance, whose shares are in bytes already."""
    hbm = (table.hbm_blocks or CPU_BLOCKS) * MIB if table.hbm is None else parse_bytes(table.hbm)
    dram = table.dram_blocks * MIB if table.dram is None else parse_bytes(table.dram)
    return hbm + dram


@given(st.lists(tables, min_size=1, max_size=3), st.integers(1, 64))
def test_a_plan_fits_or_is_refused(given_tables: list[InstanceConfig], gib: int) -> None:
    try:
        found = planned(cluster(*given_tables), MODEL, here(gib * GIB)).instance
    except ConfigError as error:
        assert str(error).startswith("not enough memory: ")  # noqa: PT017
        assert str(error).endswith("would fit")  # noqa: PT017
        return
    assert sum(table.count * (in_bytes(table) + REST) for table in found) <= gib * GIB


@pytest.mark.parametrize(
    ("settings", "advised"),
    [
        ({"dram_blocks": 10**6}, {"dram_blocks": "int"}),
        ({"hbm_blocks": 10**6, "dram_blocks": 10**6}, {"hbm_blocks": "int", "dram_blocks": "int"}),
        ({"hbm": "5GiB", "dram": "90GiB"}, {"dram": "MiB"}),
        ({"hbm": "40%", "dram": "90%"}, {"dram": "%"}),
        ({"hbm": "90GiB", "dram": "90GiB"}, {"hbm": "MiB", "dram": "MiB"}),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_what_is_advised_fits(
    settings: dict[str, object], advised: dict[str, str], count: int
) -> None:
    machine = here(32 * GIB)
    table = InstanceConfig(**settings, count=count)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as refused:
        planned(cluster(table), MODEL, machine)
    advice = str(refused.value).rpartition("; ")[2]
    found = dict(re.findall(r"([a-z_]+) = '?([0-9]+(?:MiB|%)?)", advice))
    if count == 1:
        assert {name: re.sub(r"\d+", "", v) or "int" for name, v in found.items()} == advised
    changes = {name: int(v) if "blocks" in name else v for name, v in found.items()}
    assert planned(cluster(msgspec.structs.replace(table, **changes)), MODEL, machine)


def test_weights_alone_may_be_too_much() -> None:
    with pytest.raises(ConfigError, match=r"3 instances need 3\.8 GiB before any KV; 3\.0 GiB of"):
        planned(cluster(one(count=3, hbm="50%")), MODEL, here(3 * GIB))


def test_shares_are_of_what_weights_leave() -> None:
    config = cluster(one(hbm="25%", dram="50%"))
    (table,) = planned(config, MODEL, here(8 * GIB + REST)).instance
    assert (table.hbm, table.dram) == (str(2 * GIB), str(4 * GIB))
    with pytest.raises(ConfigError, match=r"2 x hbm = '25%' .*2 x dram = '50%' .*would fit"):
        planned(cluster(one(hbm="25%", dram="50%", count=2)), MODEL, here(8 * GIB + 2 * REST))
    with pytest.raises(ConfigError, match=r"hbm = '25%': this system does not tell"):
        planned(config, MODEL, Machine(None, None))


def test_shared_memory_may_be_less_than_memory() -> None:
    config = cluster(one(count=2))
    assert planned(config, MODEL, here(16 * GIB, shared=300 * MIB))
    with pytest.raises(ConfigError, match=r"/dev/shm, where host memory is, has 64\.0 MiB free"):
        planned(config, MODEL, here(16 * GIB, shared=64 * MIB))


def test_on_a_gpu_hbm_and_weights_are_the_devices() -> None:
    config = cluster(one(count=2))
    assert planned(config, MODEL, here(GIB, device=2 * GIB + 200 * MIB))
    with pytest.raises(ConfigError, match=r"2 x hbm_blocks = 100 .*the device has"):
        planned(config, MODEL, here(GIB, device=2 * GIB + 199 * MIB))
    shares = cluster(one(hbm="45%", dram="5%", count=2))
    (table,) = planned(shares, MODEL, here(4 * GIB, device=80 * GIB)).instance
    assert table.hbm == "45%"  # of what is free once weights are there
    with pytest.raises(ConfigError, match=r"180% of a device's memory.*hbm = '45%' in each"):
        planned(cluster(one(hbm="90%", count=2)), MODEL, here(4 * GIB, device=80 * GIB))


def test_weights_alone_may_be_too_much_for_a_gpu() -> None:
    with pytest.raises(
        ConfigError, match=r"weights of 2 instances need 2\.0 GiB before any KV; the "
    ):
        planned(cluster(InstanceConfig(count=2)), MODEL, here(8 * GIB, device=2 * GIB))


SILENT = InstanceConfig(dram_blocks=0)


@pytest.mark.parametrize(
    ("tables", "shares"),
    [
        ([SILENT], ["90%"]),
        ([SILENT, SILENT], ["45%", "45%"]),
        ([InstanceConfig(count=2, dram_blocks=0), SILENT], ["30%", "30%"]),
        ([one(hbm="60%"), SILENT], ["60%", "36%"]),
        ([one(hbm="8GiB"), SILENT], ["8GiB", "80%"]),  # of 72 GiB without weights
        ([one(hbm_blocks=8 * 1024), SILENT], [None, "80%"]),
        ([one()], [None]),
    ],
)
def test_gpu_instances_that_do_not_say_get_a_share_of_what_the_others_leave(
    tables: list[InstanceConfig], shares: list[str | None]
) -> None:
    count = sum(table.count for table in tables)
    machine = here(64 * GIB, device=(72 + count) * GIB)
    found = planned(cluster(*tables), MODEL, machine).instance
    assert [table.hbm for table in found] == shares
    assert [table.hbm_blocks for table in found] == [table.hbm_blocks for table in tables]
    assert planned(cluster(*found), MODEL, machine).instance == found


def test_a_planner_s_members_have_room_on_the_gpu() -> None:
    config = ClusterConfig(instance=(SILENT,), planner=PlannerConfig(max_members=3))
    assert planned(config, MODEL, here(8 * GIB, device=80 * GIB)).instance[0].hbm == "30%"


def test_what_does_not_fit_beside_others_on_a_gpu_is_refused() -> None:
    for taken, message in (("99.9%", "100.9% of a device's memory"), ("79GiB", "not enough")):
        with pytest.raises(ConfigError, match=message):
            planned(cluster(one(hbm=taken), SILENT), MODEL, here(8 * GIB, device=80 * GIB))


def test_an_instance_on_a_cpu_that_does_not_say_has_a_number_of_blocks() -> None:
    config = cluster(SILENT)
    need = 2048 * MIB + REST
    assert planned(config, MODEL, here(need)) == config
    with pytest.raises(ConfigError, match=r"by hbm_blocks = 2048 \(2\.0 GiB\)"):
        planned(config, MODEL, here(need - 1))
    assert block_counts(SILENT, MIB, here(need)) == (2048, 0)


def test_memory_is_said_in_blocks_or_in_bytes() -> None:
    cpu, block = Machine(None, None), 1000
    assert block_counts(InstanceConfig(hbm_blocks=3, dram_blocks=4), block, cpu) == (3, 4)
    assert block_counts(InstanceConfig(hbm="5500", dram="10KB"), block, cpu) == (5, 10)
    for hbm, message in (("120%", "less than 100%"), ("1", "1000"), ("0%", "more than 0%")):
        with pytest.raises(ConfigError, match=f"instance.hbm.*{message}"):
            block_counts(InstanceConfig(hbm=hbm), block, cpu)


def test_a_share_is_of_the_memory_that_is_free() -> None:
    host = HostMemory(50_000, 90_000, "here")
    shares = InstanceConfig(hbm="50%", dram="20.5%")
    assert block_counts(shares, 1000, Machine(host, None)) == (25, 10)
    assert block_counts(shares, 1000, Machine(host, None, 31_000), step=1000) == (15, 10)
    with pytest.raises(ConfigError, match=r"instance.hbm = '50%': this system does not tell"):
        block_counts(shares, 1000, Machine(None, None))
    with pytest.raises(ConfigError, match=r"instance.hbm = '50%': a block has 1000 bytes"):
        block_counts(shares, 1000, Machine(host, None, 31_000), step=40_000)


@given(st.integers(1, 200), st.integers(1, 2**20), st.sampled_from([512, 2048, 16384]))
def test_a_longest_sequence_and_its_step_have_room(gib: int, longest: int, chunk: int) -> None:
    """On a GPU whose whole memory is KV and a step's."""
    free, settings = gib * GIB, InstanceConfig(max_batch_tokens=chunk)
    context = step_bytes(LLAMA3_8B, settings, longest, free) - step_bytes(LLAMA3_8B, settings, 0, 0)
    assert context < free / 2
    tokens = (free - context) // LLAMA3_8B.kv_bytes_per_token
    assert tokens >= min(longest, free // (2 * LLAMA3_8B.kv_bytes_per_token))
    more = InstanceConfig(max_batch_tokens=2 * chunk)
    assert step_bytes(LLAMA3_8B, more, longest, free) > step_bytes(
        LLAMA3_8B, settings, longest, free
    )


@pytest.mark.parametrize("asked", [None, 5])
def test_a_gpu_instance_s_pool_has_most_of_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int | None
) -> None:
    device = 256 * MIB
    machine = here(16 * GIB, device=device)
    monkeypatch.setattr(build, "_machine", lambda device: machine)
    directory = save_tiny_model("llama", tmp_path)
    save_tiny_tokenizer(directory)
    config = ClusterConfig(model=ModelConfig(path=str(directory), dtype="float32", device="cpu"))
    settings = InstanceConfig(hbm_blocks=asked, dram_blocks=0, threads=1, profile="off")
    identity = Identity(InstanceId("p0"), Epoch(1), Role.COLOCATED, "tiny")
    parts = build.build_parts(config, settings, identity)
    try:
        blocks = parts.engine.info.pool_tokens // 16
        block = model_memory(directory, "float32").token * 16
        if asked is not None:
            assert blocks == asked
            return
        assert 0.5 * device < blocks * block < 0.9 * device  # a step needs some, too
    finally:
        parts.close()


def test_a_vllm_server_s_host_memory_counts() -> None:
    server = InstanceConfig(engine="vllm", dram="8GiB", count=2)
    assert planned(cluster(server), MODEL, here(16 * GIB))
    with pytest.raises(ConfigError, match=r"by 2 x dram = '8GiB' \(8\.0 GiB\); .*dram = '7296MiB'"):
        planned(cluster(server), MODEL, here(15 * GIB))


def test_a_models_memory_is_that_of_its_files(tmp_path: Path) -> None:
    directory = save_tiny_model("llama", tmp_path)
    found = model_memory(directory, "float32")
    module = AutoModelForCausalLM.from_pretrained(directory)
    weights = {p.data_ptr(): p.numel() for p in module.parameters()}
    assert found.weights == 4 * sum(weights.values())
    loaded = load_model(directory, torch.float32, torch.device("cpu"))
    assert found.token == loaded.layout("m", 16, True).token_bytes
    assert model_memory(directory, "bfloat16").token == found.token // 2


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x04" + b"\0" * 7 + b"\xff{}a"]
)
def test_a_damaged_file_counts_nothing(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    assert count_parameters(tmp_path) == 0
