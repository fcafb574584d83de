"""Settings that this machine cannot have are refused before anything starts, with what works."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from memserve.cluster import preflight
from memserve.cluster.preflight import check_machine, with_room
from memserve.config import ClusterConfig, GatewayConfig, InstanceConfig, ModelConfig
from memserve.errors import ClusterError, ConfigError
from memserve.host_memory import HostMemory
from tests.tiny_models import save_tiny_model

ANY = GatewayConfig(port=0)


def quiet(line: str) -> None:
    return


def cores(*numbers: int) -> ClusterConfig:
    return ClusterConfig(gateway=ANY, instance=(InstanceConfig(cpus=numbers),))


def test_cores_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 6})
    check_machine(cores(0, 6))
    with pytest.raises(
        ConfigError,
        match=r"instance.cpus = \[1, 5, 9\]: this process may not use 5, 9, only 0-2,6; "
        r"cpus = \[0, 1, 2\] works",
    ):
        check_machine(cores(1, 5, 9))
    with pytest.raises(
        ConfigError, match=r"instance.cpus = \[\]: name at least one core, as \[0\]"
    ):
        check_machine(cores())


@pytest.mark.parametrize(
    "name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "mps", "", "cuda:9999"]
)
def test_a_device_has_a_known_name(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"model.device = .*'cpu', 'cuda' or 'cuda:1' are devices"
    ):
        check_machine(ClusterConfig(model=ModelConfig(device=name), gateway=ANY))


@pytest.mark.parametrize(
    ("name", "devices", "said"),
    [
        ("cuda", [], r"model.device = 'cuda': PyTorch finds no CUDA device; 'cpu' works"),
        ("cuda:9", [], r"model.device = 'cuda:9': PyTorch finds no CUDA device; 'cpu' works"),
        ("cuda:9", [2**40, 2**40], r"'cuda:9': PyTorch finds 2 CUDA devices; 'cuda:1' works"),
        ("cuda:1", [2**40, 2**10], r"not enough memory: .*the device has 1.0 KiB free"),
    ],
)
def test_a_device_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, devices: list[int], said: str
) -> None:
    monkeypatch.setattr(preflight, "cuda_memory", lambda: devices)
    config = ClusterConfig(model=ModelConfig(device=name), gateway=ANY)
    check_machine(config)
    with pytest.raises(ConfigError, match=said):
        with_room(config, save_tiny_model("llama", tmp_path), quiet)


def test_torch_is_asked_in_a_process_of_its_own() -> None:
    import torch

    assert len(preflight.cuda_memory()) == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "no text in UTF-8"),
        (lambda path: path.write_text("{% for %}"), "does not compile"),
    ],
)
def test_a_template_is_a_template(
    tmp_path: Path, write: Callable[[Path], object], said: str
) -> None:
    path = tmp_path / "chat.jinja"
    write(path)
    gateway = GatewayConfig(port=0, chat_template=str(path))
    with pytest.raises(ConfigError, match=f"gateway.chat_template = .*{said}"):
        check_machine(ClusterConfig(gateway=gateway))


def test_ports_are_free() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ClusterError, match=f"gateway.port = {port}: .*already in use; gateway.port = 0 takes"
        ):
            check_machine(ClusterConfig(gateway=GatewayConfig(port=port)))
        instances = (InstanceConfig(), InstanceConfig(port=port))
        with pytest.raises(ClusterError, match=f"instance.port = {port}: .*already in use"):
            check_machine(ClusterConfig(gateway=ANY, instance=instances))
    check_machine(ClusterConfig(gateway=GatewayConfig(port=port)))
    with pytest.raises(ConfigError, match=f"instance.port = {port} is gateway.port of another one"):
        check_machine(
            ClusterConfig(gateway=GatewayConfig(port=port), instance=(InstanceConfig(port=port),))
        )
    with pytest.raises(ClusterError, match=r"Cannot assign requested address; host = '127"):
        check_machine(ClusterConfig(gateway=GatewayConfig(host="192.0.2.1", port=0)))


def test_memory_is_counted_by_the_models_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_tiny_model("llama", tmp_path)
    monkeypatch.setattr(preflight, "host_memory", lambda: HostMemory(2**32, 2**33, "here"))
    small = ClusterConfig(gateway=ANY, instance=(InstanceConfig(hbm="25%", dram="64KiB"),))
    (found,) = with_room(small, directory, quiet).instance
    assert found.hbm is not None
    assert 2**29 < int(found.hbm) < 2**30
    with pytest.raises(ConfigError, match="not enough memory"):
        with_room(ClusterConfig(instance=(InstanceConfig(dram_blocks=10**9),)), directory, quiet)


def test_a_model_of_unknown_size_is_not_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    said: list[str] = []
    assert with_room(ClusterConfig(), tmp_path, said.append) == ClusterConfig()
    assert "whether memory suffices is not known" in said[0]
    # A vLLM server may know the model; its host memory is counted all the same.
    servers = ClusterConfig(instance=(InstanceConfig(engine="vllm", dram="1GiB"),))
    assert with_room(servers, tmp_path, said.append) == servers
    assert len(said) == 1
    many = ClusterConfig(instance=(InstanceConfig(engine="vllm", dram="900TiB"),))
    with pytest.raises(ConfigError, match="not enough memory"):
        with_room(many, tmp_path, said.append)
