"""The memory that is free is that of the tightest limit around this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from memserve.host_memory import host_memory, shown_bytes

GIB = 1024**3
MEMINFO = f"MemTotal: {64 * GIB // 1024} kB\nMemFree: 5 kB\nMemAvailable: {48 * GIB // 1024} kB\n"


def machine(root: Path, groups: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(MEMINFO)
    (root / "proc/self/cgroup").write_text(groups)
    return root


def group(root: Path, path: str, limit: object, used: object, stat: str = "") -> None:
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


def test_without_limits_it_is_the_machines(tmp_path: Path) -> None:
    memory = host_memory(machine(tmp_path, "0::/\n"))
    assert memory is not None
    assert (memory.free, memory.total) == (48 * GIB, 64 * GIB)
    assert str(memory) == "48.0 GiB of 64.0 GiB are free on this machine"
    assert host_memory(tmp_path / "nowhere") is None


def test_a_control_group_counts_with_what_it_can_drop(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/user/app\n")
    group(root, "user/app", "max", 9 * GIB)
    group(root, "user", 16 * GIB, 10 * GIB, f"anon 5\ninactive_file {2 * GIB}\n")
    memory = host_memory(root)
    assert memory is not None
    assert (memory.free, memory.total) == (8 * GIB, 16 * GIB)
    assert "this container" in str(memory)
    group(root, "user/app", 4 * GIB, 5 * GIB)  # over its limit
    assert (memory := host_memory(root)) is not None
    assert memory.free == 0


def test_a_containers_own_view_has_its_group_at_the_root(tmp_path: Path) -> None:
    root = machine(tmp_path, "")
    group(root, "", 4 * GIB, 1 * GIB)
    for path in ("/not-in-view", "/../../outside", "/"):
        (root / "proc/self/cgroup").write_text(f"0::{path}\n")
        assert (memory := host_memory(root)) is not None
        assert memory.free == 3 * GIB, path


def test_version_1_has_a_folder_and_names_of_its_own(tmp_path: Path) -> None:
    root = machine(tmp_path, "5:cpu:/x\n4:memory,other:/app\n0::/\n")
    folder = root / "sys/fs/cgroup/memory/app"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(6 * GIB))
    (folder / "memory.usage_in_bytes").write_text(str(1 * GIB))
    (folder / "memory.stat").write_text(f"total_inactive_file {GIB // 2}\n")
    (folder.parent / "memory.limit_in_bytes").write_text("9223372036854771712")
    (folder.parent / "memory.usage_in_bytes").write_text("1")
    assert (memory := host_memory(root)) is not None
    assert memory.free == 5 * GIB + GIB // 2


@pytest.mark.parametrize("text", ["", "max", "-5", "1e9", "\x00", "٣"])
def test_what_is_no_number_is_no_limit(tmp_path: Path, text: str) -> None:
    root = machine(tmp_path, "0::/\nnonsense\n::\n")
    group(root, "", text, 5)
    assert (memory := host_memory(root)) is not None
    assert memory.free == 48 * GIB


def test_this_machine_tells() -> None:
    assert (memory := host_memory()) is not None
    assert 0 < memory.free <= memory.total


def test_sizes_have_the_unit_that_fits() -> None:
    assert [shown_bytes(n) for n in (5, 1536, 200 * 1024, 1.5 * GIB, 117 * GIB, 2048 * GIB)] == [
        "5 bytes",
        "1.5 KiB",
        "200 KiB",
        "1.5 GiB",
        "117 GiB",
        "2.0 TiB",
    ]
