"""The evaluation of memserve: no part of the product, and not in its wheel."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_SOURCE = Path(__file__).parents[1]


def with_evaluation(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a process that imports this package, which is not installed."""
    paths = (str(_SOURCE), environment.get("PYTHONPATH", ""))
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
