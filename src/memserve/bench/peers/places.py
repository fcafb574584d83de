"""Where peers are installed: each in a virtual environment of its own, because their
dependencies contradict each other and ours."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("build/peers")  # of the working directory, as everything that is built
HINT = "run `make peers`"


def python_of(peer: str, root: Path = ROOT) -> Path:
    """The peer's Python, whether it is there or not."""
    return root / peer / "bin" / "python"


def marker_of(peer: str, root: Path = ROOT) -> Path:
    """Written last: an environment without it is unfinished."""
    return root / peer / ".installed"


def why_missing(peer: str, root: Path = ROOT) -> str | None:
    """None for a peer that is installed."""
    if marker_of(peer, root).exists():
        return None
    return f"not installed in {root / peer}: {HINT}"


def index_script() -> Path:
    """What peers' Pythons run; it needs nothing that is ours."""
    return Path(__file__).with_name("index_process.py")
