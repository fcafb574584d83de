"""A model's directory is whole or absent, and what cannot be found is said in one line."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path

import pytest

from memserve.config import ModelConfig
from memserve.errors import ModelError
from memserve.models import demo
from memserve.models.demo import prepare_demo_model
from memserve.models.resolve import resolve_model


def silent(_: str) -> None:
    pass


def test_a_local_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    found = resolve_model(ModelConfig(path=str(tmp_path)), silent)
    assert (found.path, found.name) == (tmp_path, str(tmp_path))
    assert resolve_model(ModelConfig(path=str(tmp_path), served_name="m"), silent).name == "m"


def test_weights_are_known_wherever_they_lie(tmp_path: Path) -> None:
    def identity(name: str, *weights: bytes) -> str:
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        for number, data in enumerate(weights):
            (directory / f"model-{number}.safetensors").write_bytes(data)
        return resolve_model(ModelConfig(path=str(directory)), silent).identity

    weights = bytes(range(256)) * 40_000  # 10 MB
    own = identity("here", weights, b"x")
    assert own == identity("there", weights, b"x")
    trained = bytes(byte ^ 1 for byte in weights)
    others = [(trained, b"x"), (weights, b"y"), (weights[:-1], b"x"), (weights,), (b"x", weights)]
    found = {identity(f"other{number}", *each) for number, each in enumerate(others)}
    assert own not in found
    assert len(found) == len(others)
    assert identity("none") == ""
    middle = weights[: 1 << 22] + trained[1 << 22 : 1 << 23] + weights[1 << 23 :]
    assert identity("middle", middle, b"x") != own


@pytest.mark.parametrize("path", ["/no/such/model", "./model", "a-name", "a/b/c"])
def test_what_can_be_no_hub_id_is_refused_without_asking_the_hub(path: str) -> None:
    with pytest.raises(ModelError, match=f"no model '{path}'"):
        resolve_model(ModelConfig(path=path), silent)


@pytest.mark.parametrize("weights", [True, False])
def test_a_gateway_downloads_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: bool
) -> None:
    import huggingface_hub

    asked: list[list[str]] = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = resolve_model(ModelConfig(path="owner/name"), silent, weights=weights)
    assert (found.path, found.revision) == (tmp_path, tmp_path.name)
    assert {"*.json", "*.jinja"} <= set(asked[0])
    assert ("*.safetensors" in asked[0]) is weights


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(ModelConfig(path=str(tmp_path)), silent)


def test_a_hub_model_that_cannot_be_had_offline_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"'owner/name'.*hub"):
        resolve_model(ModelConfig(path="owner/name"), silent)


def test_the_demo_model_names_the_extra_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"memserve\[demo\]"):
        prepare_demo_model(silent)


class Conversion:
    """Stands in for the slow conversion; counts its runs, and fails when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.runs = 0
        self.fail = False
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
        monkeypatch.setattr(demo, "_assemble", lambda gguf: None)
        monkeypatch.setattr(demo, "_run_conversion", self._run)

    def _run(self, gguf: Path, converted: Path) -> None:
        self.runs += 1
        converted.mkdir()
        if self.fail:
            raise ModelError("half written")
        (converted / "config.json").write_text("{}")


def test_a_failed_or_killed_conversion_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = Conversion(monkeypatch, tmp_path)
    conversion.fail = True
    with pytest.raises(ModelError, match="half written"):
        prepare_demo_model(silent)
    models = tmp_path / "memserve" / "models"
    assert not [path for path in models.iterdir() if path.is_dir()]
    (models / f"{demo._DIRECTORY}.unfinished-killed").mkdir()

    conversion.fail = False
    target = prepare_demo_model(silent)
    assert [path for path in models.iterdir() if path.is_dir()] == [target]


def test_several_processes_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversion = Conversion(monkeypatch, tmp_path)
    threads = [threading.Thread(target=prepare_demo_model, args=(silent,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert conversion.runs == 1
