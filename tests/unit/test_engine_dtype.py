"""`dtype = "auto"`: the same on all machines of a kind, however busy they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memserve import cpu
from memserve.cpu import cpu_flags, cpu_name
from memserve.engine.dtype import choose_dtype

X86 = """processor\t: 0
model name\t: AMD EPYC 9R14
flags\t\t: fpu avx2 {more}

processor\t: 1
model name\t: another
flags\t\t: none
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd {more}\n"


@pytest.mark.parametrize(
    ("cpuinfo", "dtype"),
    [
        (X86.format(more="avx512f avx512_bf16"), torch.bfloat16),
        (X86.format(more="amx_bf16 amx_tile"), torch.bfloat16),
        (X86.format(more="avx512f avx512_vnni"), torch.float32),
        (ARM.format(more="i8mm bf16"), torch.bfloat16),
        (ARM.format(more="i8mm"), torch.float32),
        ("", torch.float32),
    ],
)
def test_bfloat16_needs_instructions_for_it(
    cpuinfo: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo, encoding="utf-8")
    monkeypatch.setattr(cpu, "_CPUINFO", path)
    assert choose_dtype(torch.device("cpu")) is dtype


def test_what_a_cpu_does_not_tell_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu, "_CPUINFO", path)
    assert cpu_flags() == frozenset()
    assert cpu_name()  # the machine type
    path.write_text(X86.format(more=""), encoding="utf-8")
    assert (cpu_name(), cpu_flags()) == ("AMD EPYC 9R14", {"fpu", "avx2"})
