"""What a vLLM server is started with."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest

from memserve.config import InstanceConfig, ModelConfig
from memserve.errors import ConfigError
from memserve.vllm.place import ServerPlace
from memserve.vllm.server import (
    VllmServer,
    require_command,
    server_command,
    server_environment,
    tier_settings,
)

MODEL = ModelConfig(path="owner/model", served_name="m", dtype="bfloat16", max_model_len=64)
PLACES = Path("/model"), ServerPlace(path=Path("/run/http"))


def test_the_command_names_the_model_the_socket_and_the_events() -> None:
    command = server_command(MODEL, InstanceConfig(), *PLACES, "ipc:///run/events")
    assert command[:3] == ["vllm", "serve", "/model"]
    given = dict(pairwise(command[3:]))
    assert (given["--uds"], given["--served-model-name"]) == ("/run/http", "m")
    assert (given["--dtype"], given["--max-model-len"]) == ("bfloat16", "64")
    events = json.loads(given["--kv-events-config"])
    assert events["endpoint"] == "ipc:///run/events"


def test_without_caching_it_caches_nothing_and_publishes_nothing() -> None:
    command = server_command(MODEL, InstanceConfig(), *PLACES, None)
    assert "--no-enable-prefix-caching" in command
    assert "--kv-events-config" not in command


def test_host_memory_is_a_tier_behind_its_cache() -> None:
    tier = tier_settings("4GiB", instance="v", socket="/run/pool")
    command = server_command(MODEL, InstanceConfig(), *PLACES, "ipc:///run/events", tier)
    given = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert given["kv_connector"] == "MemServeConnector"
    extra = {"dram_bytes": "4GiB", "instance": "v", "socket": "/run/pool"}
    assert given["kv_connector_extra_config"] == extra
    assert "--kv-transfer-config" not in server_command(MODEL, InstanceConfig(), *PLACES, None)


def test_a_module_is_told_the_model_by_a_flag_and_own_arguments_come_last() -> None:
    module = ("python", "-m", "vllm.entrypoints.openai.api_server")
    settings = InstanceConfig(vllm_command=module, vllm_args=("--dtype", "float32"))
    command = server_command(MODEL, settings, *PLACES, None)
    assert command[:5] == [*module, "--model", "/model"]
    assert command[-2:] == ["--dtype", "float32"]


def test_cores_are_said_in_vllms_own_words() -> None:
    assert server_environment(InstanceConfig()) == {}
    pinned = server_environment(InstanceConfig(cpus=(0, 2), threads=2))
    assert pinned == {"VLLM_CPU_OMP_THREADS_BIND": "0,2", "OMP_NUM_THREADS": "2"}


def test_what_cannot_be_started_is_said_before_it_is_tried() -> None:
    with pytest.raises(ConfigError, match="no-such-vllm: no such command"):
        require_command(("no-such-vllm", "serve"))


def test_a_path_that_no_unix_socket_can_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(ConfigError, match="set TMPDIR"):
        VllmServer()
    assert not list(deep.iterdir())
