"""Test the CPU settings of a process: its share of the cores, the reuse of freed memory, and its precision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_m3ret.cpu import available_cores
from modeling_m3ret.pretraining.distributed import supported_precision


slow = pytest.mark.slow  # starts processes

ROOT = Path(__file__).parents[1]
# loads the file without the package, whose import takes seconds
LOAD = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("cpu", sys.argv[1])
cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cpu)
"""
COUNT_FAULTS = """
import resource
torch.set_num_threads(1)
if sys.argv[2] == "keep":
    assert cpu.keep_freed_memory()
def step():
    for _ in range(20):
        torch.empty(64 * 2**20 // 4).fill_(1.0)  # 64 MiB, freed at once
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", LOAD + code, str(ROOT / "modeling_m3ret" / "cpu.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_kept_memory_causes_no_page_faults() -> None:
    """Twenty blocks of 64 MiB have 327,680 pages of 4 KiB, each of which faults when the block is mapped again."""
    kept, returned = int(run(COUNT_FAULTS, "keep")), int(run(COUNT_FAULTS, "default"))
    assert kept < 1000
    assert returned > 10 * max(kept, 1)


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),  # half a core
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "999900000 100000\n"}, None),  # more than the machine has
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "no numbers here\n"}, None),
        ({}, None),
    ],
)
def test_a_container_uses_no_more_cores_than_its_quota(
    files: dict[str, str], allowed: int | None, tmp_path: Path
) -> None:
    """Without a quota these are the cores of the affinity, which the standard library counts."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert available_cores(tmp_path) == (allowed or cores)


@slow
def test_processes_share_the_cores_of_their_machine() -> None:
    """`OMP_NUM_THREADS` does not limit them, and `LOCAL_WORLD_SIZE` counts the processes of this machine."""
    shares = """
import os
for processes in (1, 2, 1000):
    cpu.prepare_cpu(processes)
    print(torch.get_num_threads())
os.environ["LOCAL_WORLD_SIZE"] = "1"
cpu.prepare_cpu(1000)
print(torch.get_num_threads())
"""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert [int(line) for line in run(shares).split()] == [max(1, cores // processes) for processes in (1, 2, 1000, 1)]


@pytest.mark.parametrize(
    ("capabilities", "requested", "launched", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, "bf16", None, "bf16"),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": True}, "bf16", None, "bf16"),
        ({"neon": True, "bf16": True}, "bf16", None, "bf16"),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "bf16", None, "no"),
        ({"neon": True, "bf16": False}, None, "bf16", "no"),
        ({"avx2": True}, "no", "bf16", "no"),
        ({"avx2": True}, None, "no", None),
        ({"avx2": True}, None, None, None),
        ({"avx512_bf16": True}, None, "bf16", None),
    ],
)
def test_bfloat16_needs_instructions_of_the_cpu(
    capabilities: dict[str, bool],
    requested: str | None,
    launched: str | None,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert supported_precision(requested) == expected
    replaces = (requested or launched) == "bf16" and expected == "no"
    assert len(caplog.records) == replaces


def test_an_accelerator_trains_in_bfloat16_whatever_the_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert supported_precision("bf16") == "bf16"
