"""Finds the directory of the model that a configuration names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from memserve.config import ModelConfig
from memserve.errors import ModelError
from memserve.models.demo import DEMO_MODEL, prepare_demo_model

# Called with one line of text before each step that may take over two seconds.
Progress = Callable[[str], None]

_SAMPLES = 256  # samples per file of weights, evenly spread from its start to its end
_SAMPLE_BYTES = 4096
# Configuration and tokenizer, and weights; never pickled weights (*.bin, *.pt).
_DESCRIPTION_FILES = ["*.json", "*.jinja"]
_WEIGHTS_FILES = ["*.safetensors"]


@dataclass(frozen=True, slots=True)
class ModelDirectory:
    """The directory of a model on this machine, and its names."""

    path: Path  # holds config.json, tokenizer.json and *.safetensors
    name: str  # the model's name in the API
    revision: str | None = None  # commit of a hub model

    @property
    def identity(self) -> str:
        """An id of the weights, independent of their path: the commit, or a digest of samples."""
        return self.revision or weights_digest(self.path)


def weights_digest(directory: Path) -> str:
    """Return the SHA-256 (hex) of the names, sizes and byte samples of a directory's weights; ""
    if it has none.

    Reading all bytes would take as long as loading the model. The digest may miss a change of a
    few weights, but not another training of the same model.
    """
    files = sorted(directory.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as weights:
            for at in range(_SAMPLES):
                weights.seek(max(0, size - _SAMPLE_BYTES) * at // (_SAMPLES - 1))
                digest.update(weights.read(_SAMPLE_BYTES))
    return digest.hexdigest() if files else ""


def resolve_model(
    config: ModelConfig, progress: Progress, *, weights: bool = True
) -> ModelDirectory:
    """Return the model's directory: the demo model, a local directory, or a hub repository.

    Converts the demo model or downloads from the hub on first use; without `weights`, as gateways
    need none, only the other files of a hub repository. Raises ModelError with the
    names that were tried.
    """
    name = config.served_name or config.path
    if config.path == DEMO_MODEL:
        return ModelDirectory(prepare_demo_model(progress), name)
    directory = Path(config.path).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ModelError(f"{directory} is no model directory: it has no config.json")
        return ModelDirectory(directory.resolve(), name)
    if config.path.startswith(("/", "~", ".")) or config.path.count("/") != 1:
        raise ModelError(
            f"no model '{config.path}': neither a directory nor a hub id (owner/name) "
            f"nor '{DEMO_MODEL}'"
        )
    snapshot = _download(config.path, config.revision, progress, weights)
    return ModelDirectory(snapshot, name, revision=snapshot.name)


def pinned(config: ModelConfig, found: ModelDirectory) -> ModelConfig:
    """Return `config` with the revision of `found`, so that other processes find that revision."""
    return msgspec.structs.replace(config, revision=found.revision)


def _download(repo_id: str, revision: str | None, progress: Progress, weights: bool) -> Path:
    # The import takes half a second, and only hub models need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    progress(f"looking for {repo_id} in the hub's cache and on the hub")
    wanted = _DESCRIPTION_FILES + (_WEIGHTS_FILES if weights else [])
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise ModelError(
            f"no directory '{repo_id}' here, and the hub did not serve it: {first_line}"
        ) from error
