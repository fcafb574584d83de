"""Compiling happens once for a machine, when what needs it is made, and only there."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memserve import compiled
from memserve.scheduler import choosing, kernels, look_ups
from memserve.scheduler.compiled import prepare

_KERNEL = """
from memserve.compiled import Kernels

own = Kernels("a test")

@own.inlined
def twice(x):
    return 2 * x

@own.compiled("float64(float64)")
def kernel(x):
    return twice(x) + 1
"""
_USE = """
import sys
sys.path.insert(0, sys.argv[1])
import kept
assert "numba" not in sys.modules
kept.own.prepare()
assert kept.kernel.run(3.0) == 7.0
print(sum(kept.kernel.run.stats.cache_hits.values()))
"""


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_next_process_loads_what_one_compiled(tmp_path: Path) -> None:
    (tmp_path / "kept.py").write_text(_KERNEL)
    assert python(_USE, str(tmp_path)).split() == ["0"]
    assert python(_USE, str(tmp_path)).split() == ["1"]
    # The functions that a kernel calls stand in its file, so that it never runs older ones.
    (tmp_path / "kept.py").write_text(_KERNEL.replace("2 * x", "x + x + 0"))
    assert python(_USE, str(tmp_path)).split() == ["0"]


def test_without_a_folder_each_process_compiles_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # numba finds a place by the function's file: here there is none.
    names: dict[str, Any] = {}
    exec(compile(_KERNEL, "<nowhere>", "exec"), names)
    assert names["kernel"].run(1.0) == 3.0  # as Python
    with caplog.at_level(logging.WARNING, compiled.__name__):
        names["own"].prepare()
    assert "no folder can be written" in caplog.text
    assert names["kernel"].run(3.0) == 7.0
    assert names["kernel"].run is not names["kernel"].python


def test_other_types_are_refused_instead_of_compiled() -> None:
    prepare()
    scores = np.zeros(3)
    per_instance, per_candidate, weights = (scores,) * 5, (scores,) * 3, (1.0,) * 5
    slots = np.zeros(3, dtype=np.int64)
    choosing.weigh.run(slots, per_instance, per_candidate, weights, scores)
    with pytest.raises(TypeError):  # slots are integers
        choosing.weigh.run(scores, per_instance, per_candidate, weights, scores)
    with pytest.raises(TypeError):
        choosing.weigh.run(slots, (slots,) * 5, per_candidate, weights, scores)


def test_everything_is_prepared_together() -> None:
    prepare()
    for module in (choosing, kernels, look_ups):
        for value in vars(module).values():
            if isinstance(value, compiled.Compiled):
                assert value.run is not value.python


def test_only_deciding_imports_numba() -> None:
    python(
        "import sys, memserve.cli, memserve.gateway.global_router, memserve.sim.cluster\n"
        "from memserve.scheduler.cost_model import recompute_cost\n"
        "from memserve.scheduler.hardware import cost_model\n"
        "assert recompute_cost(cost_model('h800', 'llama2-13b', tp=2), 16)(1000) > 0\n"
        "assert 'numba' not in sys.modules"
    )
