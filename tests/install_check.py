"""`make install-check`: builds sdist and wheel, installs the wheel into an environment of its own,
and serves the demo model from it.

Needs a package index, about 3 GB and some minutes. Nothing of the checkout can be imported by what
is checked: it runs elsewhere, and without PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import venv
import zipfile
from collections.abc import Mapping
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "install-check"
START_SECONDS = 300.0  # converting the demo model, compiling and measuring, on a busy machine
STOP_SECONDS = 60.0
ASK_SECONDS = 60.0


def main() -> None:
    """Run all steps; exit with 1 at the first that fails."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    wheel = build()
    binaries = install(wheel)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONPATH" and not name.startswith("MEMSERVE_")
    }
    environment["XDG_CACHE_HOME"] = str(WORK / "cache")  # nothing is there from another run
    environment["MEMSERVE_RUNTIME_DIR"] = str(WORK / "runtime")
    said = run([binaries / "memserve", "--version"], environment)
    version = wheel.name.split("-")[1]
    require(said.strip() == f"memserve {version}", f"memserve --version says {said!r}")
    serve(binaries / "memserve", environment)
    shutil.rmtree(WORK)
    say("all is well")


def build() -> Path:
    """Return the wheel, built from the sdist."""
    say("building sdist and wheel")
    tools = environment_in(WORK / "tools")
    run([tools / "python", "-m", "pip", "install", "--quiet", "build"])
    run([tools / "python", "-m", "build", "--outdir", WORK / "dist", ROOT])
    (sdist,), (wheel,) = (WORK / "dist").glob("*.tar.gz"), (WORK / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("README.md", "LICENSE", "docs/install.md", "constraints.txt", "Makefile"):
        require(needed in held, f"{needed} is not in the sdist")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(n) for n in names if n.endswith(".dist-info/METADATA"))
    for name in names:
        require(name.startswith(("memserve/", "memserve-")), f"{name} is in the wheel")
    for needed in ("py.typed", "gateway/html/landing.html", "bench/templates/page.html"):
        require(f"memserve/{needed}" in names, f"{needed} is not in the wheel")
    fields = message_from_bytes(metadata)
    for name in ("Summary", "Description-Content-Type", "Classifier", "License-Expression"):
        require(fields[name] is not None, f"the wheel's metadata has no {name}")
    return wheel


def install(wheel: Path) -> Path:
    """Install the wheel with the demo model; return the folder of its programs."""
    say(f"installing {wheel.name} (minutes, for torch)")
    binaries = environment_in(WORK / "venv")
    pip: list[str | Path] = [binaries / "python", "-m", "pip"]
    constraint = ROOT / "constraints.txt"
    run([*pip, "install", "--quiet", "--constraint", constraint, f"{wheel}[demo]"])
    run([*pip, "check"])
    return binaries


def serve(program: Path, environment: Mapping[str, str]) -> None:
    """Start a cluster, find it, ask for its page and for a completion, and stop it."""
    say("starting a cluster with the demo model")
    flags = ["--port", "0", "--count", "1", "--hbm-blocks", "256", "--dram-blocks", "64"]
    with (WORK / "up.err").open("w") as errors:
        up = subprocess.Popen(
            [program, "up", *flags],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=WORK,
        )
    try:
        assert up.stdout is not None
        line = next((line for line in up.stdout if " on http://" in line), None)
        require(line is not None, "memserve up ends:\n" + (WORK / "up.err").read_text())
        assert line is not None
        url = line.partition(" on ")[2].partition(";")[0]
        require("<title>memserve" in ask(f"{url}/").decode(), "the page at / is another one")
        body = {"model": "demo", "prompt": "The capital of France is", "max_tokens": 8}
        answer = json.loads(ask(f"{url}/v1/completions", json.dumps(body).encode()))
        require(answer["usage"]["completion_tokens"] == 8, f"no completion: {answer}")
        say(f"The capital of France is{answer['choices'][0]['text']!r}")
        found = json.loads(run([program, "cluster", "list", "--json"], environment))
        states = [member["state"] for member in found["instances"]]
        require(states == ["ready"], f"memserve cluster list: {found}")
        up.terminate()
        code = up.wait(STOP_SECONDS)
        require(code == 0, f"memserve up ends with {code}")
    finally:
        up.kill()
        up.wait()
    require(not list((WORK / "runtime").glob("gateway-*")), "files of the cluster are left")


def environment_in(path: Path) -> Path:
    """Make a virtual environment; return the folder of its programs."""
    venv.create(path, with_pip=True)
    return path / "bin"


def ask(url: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=ASK_SECONDS) as answer:
        data: bytes = answer.read()
        return data


def run(command: list[str | Path], environment: Mapping[str, str] | None = None) -> str:
    """Return what a program prints; exit with what it says if it fails."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=WORK, env=environment
    )
    if done.returncode:
        fail(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def require(good: bool, otherwise: str) -> None:
    if not good:
        fail(otherwise)


def fail(why: str) -> None:
    print(f"install-check: {why}", file=sys.stderr)
    sys.exit(1)


def say(line: str) -> None:
    print(f"==> {line}", flush=True)


if __name__ == "__main__":
    main()
