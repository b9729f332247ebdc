"""A CPU process gets its share of the cores, and keeps the memory that it freed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


COUNT_FAULTS = """
import resource, sys, torch
from modeling_m3ret.cpu import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    for _ in range(20):
        torch.empty(64 * 2**20 // 4).fill_(1.0)  # 64 MiB, freed at once
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_not_faulted_in_again() -> None:
    """Twenty blocks of 64 MiB are 327,680 pages of 4 KiB when each is mapped anew, and none when they are kept."""

    def faults(mode: str) -> int:
        ran = subprocess.run([sys.executable, "-c", COUNT_FAULTS, mode], capture_output=True, text=True, check=True)
        return int(ran.stdout)

    kept, given_back = faults("keep"), faults("give back")
    assert kept < 1000
    assert given_back > 10 * max(kept, 1)


@pytest.mark.parametrize("processes", [1, 2, 1000])
def test_processes_share_the_cores(processes: int) -> None:
    code = f"""
import torch
from modeling_m3ret.cpu import prepare_cpu
prepare_cpu({processes})
print(torch.get_num_threads())
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as launchers set it
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert int(ran.stdout) == max(1, (cores or 1) // processes)
