"""Helm, as a library in a process of its own: `python -m tests.helm` in an environment that has
helm-sdkpy reads one command a line, as JSON, and writes what it came to.

The library has no dry run, so a chart is installed, into a `KubeApi`. Its environment is made by
`make helm`: the package asks for a newer Python than it needs.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]
RELEASE = "mine"
NAMESPACE = "serving"
PYTHON = ROOT / "build/helm/bin/python"


def helm_python() -> str | None:
    """Return a Python that has helm-sdkpy; None: `make helm` was not run."""
    if PYTHON.exists():
        return str(PYTHON)
    return sys.executable if importlib.util.find_spec("helm_sdkpy") else None


class HelmError(Exception):
    """What Helm says."""


class Helm:
    """The library's process. A context manager."""

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HELM_DRIVER": "memory"},  # where it keeps its releases
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def install(self, kubeconfig: str, chart: Path, values: dict[str, Any]) -> Any:
        """Install the release RELEASE in NAMESPACE, or upgrade it; return it, with its
        `manifest`."""
        return self._ask("install", kubeconfig=kubeconfig, chart=str(chart), values=values)

    def lint(self, kubeconfig: str, chart: Path) -> Any:
        return self._ask("lint", kubeconfig=kubeconfig, chart=str(chart))

    def _ask(self, action: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"action": action, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise HelmError(answer["error"])
        return answer["result"]


async def _run(asked: dict[str, Any], places: dict[str, Any]) -> Any:
    import helm_sdkpy

    place = places.get(asked["kubeconfig"])
    if place is None:
        place = helm_sdkpy.Configuration(namespace=NAMESPACE, kubeconfig=asked["kubeconfig"])
        places[asked["kubeconfig"]] = place
    if asked["action"] == "lint":
        return await helm_sdkpy.Lint(place).run(asked["chart"])
    upgrade = helm_sdkpy.Upgrade(place)
    return await upgrade.run(RELEASE, asked["chart"], asked["values"], install=True, wait=False)


def main() -> None:
    import helm_sdkpy

    places: dict[str, Any] = {}  # by kubeconfig, with the releases there
    for line in sys.stdin:
        try:
            said = {"result": asyncio.run(_run(json.loads(line), places))}
        except helm_sdkpy.HelmError as error:
            said = {"error": str(error)}
        print(json.dumps(said, default=str), flush=True)


if __name__ == "__main__":
    main()
