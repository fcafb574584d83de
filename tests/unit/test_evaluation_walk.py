"""What a request passes: the recorder of a process, and what is counted of its records."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from evaluation.walk.run import RECORDER, Stop, Walk, WalkResult, walk_table
from tests.fakes import until

PROGRAM = """
import sys
from memserve import tokens, types
for line in sys.stdin:
    if line.startswith("tokens"):
        tokens.from_ids([1, 2])
    else:
        types.new_epoch()
    print("done", flush=True)
"""


def test_a_process_records_what_it_calls_between_two_signals(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(RECORDER), *filter(None, sys.path))),
        "WALK_DIRECTORY": str(tmp_path),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None

        def do(what: str) -> None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(what + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"

        do("types")
        process.send_signal(signal.SIGUSR1)
        do("tokens")
        process.send_signal(signal.SIGUSR2)
        file = tmp_path / str(process.pid)
        do("types")  # a signal is handled at the next call of Python's
        until(file.exists)
        process.stdin.close()
    lines = file.read_text(encoding="utf-8").splitlines()
    assert "tokens.py\tfrom_ids" in lines
    assert not any("new_epoch" in line for line in lines)


def test_a_walk_counts_modules_and_classes_once() -> None:
    gateway = (
        Stop("gateway/app.py", "GatewayApp.handle"),
        Stop("gateway/app.py", "GatewayApp._accept.<locals>.build"),
        Stop("radix.py", "follow"),
    )
    instance = (
        Stop("radix.py", "RadixTree.follow"),
        Stop("gateway/run.py", "with_siblings.<locals>.done"),
    )
    walk = Walk("colocated", {"gateway": gateway, "colocated-0": instance})
    assert walk.modules == {"gateway/app.py", "radix.py", "gateway/run.py"}
    assert walk.classes == {"gateway/app.py:GatewayApp", "radix.py:RadixTree"}
    table = walk_table(WalkResult((walk,)))
    assert [list(column.cells) for column in table.columns][1:] == [
        ["gateway", "colocated-0", "all"],
        ["2", "2", "3"],
        ["1", "1", "2"],
        ["3", "2", "5"],
    ]
