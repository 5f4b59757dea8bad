"""What this process may use of its machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actstore import machine

HOST = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MINE = len(os.sched_getaffinity(0))
V2 = "0::/\n"
NESTED = "0::/user.slice/job 7.scope\n"
V1 = "9:name=systemd:/\n4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n"


def mounted(root: Path, groups: str, files: dict[str, str]) -> Path:
    """Give a root with control groups that this process is in."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        ("", {}, HOST),
        (V2, {"sys/fs/cgroup/memory.max": "max\n"}, HOST),
        (V2, {"sys/fs/cgroup/memory.max": "1048576\n"}, 1 << 20),
        (V2, {"sys/fs/cgroup/memory.max": f"{HOST * 2}\n"}, HOST),
        (NESTED, {"sys/fs/cgroup/user.slice/memory.max": "4096\n",
                  "sys/fs/cgroup/user.slice/job 7.scope/memory.max": "8192\n"}, 4096),
        (V1, {"sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "4096\n"}, 4096),
        (V1, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "4096\n"}, 4096),
        (V1, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, HOST),
    ],
)  # fmt: skip
def test_memory_is_the_hosts_or_the_least_that_a_group_allows(
    groups: str, files: dict[str, str], wanted: int, tmp_path: Path
) -> None:
    assert machine.memory(mounted(tmp_path, groups, files)) == wanted


@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        ("", {}, MINE),
        (V2, {"sys/fs/cgroup/cpu.max": "max 100000\n"}, MINE),
        (V2, {"sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        (V2, {"sys/fs/cgroup/cpu.max": "1000 100000\n"}, 1),
        (V2, {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, min(MINE, 2)),
        (NESTED, {"sys/fs/cgroup/user.slice/cpu.max": "50000 100000\n"}, 1),
        (V1, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
              "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 1),
        (V1, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
              "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, MINE),
    ],
)  # fmt: skip
def test_cores_are_those_of_the_affinity_and_no_more_than_a_group_s_quota(
    groups: str, files: dict[str, str], wanted: int, tmp_path: Path
) -> None:
    assert machine.cores(mounted(tmp_path, groups, files)) == wanted


def test_a_process_that_is_bound_to_a_core_has_one() -> None:
    code = (
        "import os; from actstore import machine\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "print(machine.cores())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, check=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.stdout == "1\n"
