"""What a process used, against one that uses a known amount."""

from __future__ import annotations

import os
import subprocess
import sys

from memserve.bench.processes import ProcessMeter

_WORK = """
import sys, time
print("ready", flush=True)
sys.stdin.readline()
block = bytearray(64_000_000)
while time.process_time() < 0.3:
    pass
print("done", flush=True)
sys.stdin.readline()
"""


def test_cpu_time_and_peak_memory_of_another_process() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _WORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        child.stdout.readline()
        meter = ProcessMeter({"child": child.pid, "me": os.getpid()})
        print("go", file=child.stdin, flush=True)
        child.stdout.readline()
        used = {figures.name: figures for figures in meter.read()}
        child.stdin.close()
    assert used["child"].cpu_seconds > 0.1
    assert used["child"].peak_bytes > 64_000_000
    assert set(used) == {"child", "me"}


def test_a_process_that_has_ended_is_left_out() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    meter = ProcessMeter({"child": child.pid})
    child.communicate(b"\n")
    assert meter.read() == ()
    assert ProcessMeter({"child": child.pid}).read() == ()
