"""Test worker processes: forked from one server, single-threaded, ended with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from modeling_m3ret.worker_process import HAS_SIGWAITINFO, initialise_worker, worker_context


pytestmark = pytest.mark.slow  # starts processes

ROOT = Path(__file__).parents[1]
KILLED_WITH_WORKER = """
import os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from modeling_m3ret.worker_process import initialise_worker, worker_context
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=worker_context([]), initializer=initialise_worker)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 3600)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def describe_worker() -> tuple[int, int, int]:
    return os.getpid(), os.getppid(), torch.get_num_threads()


def test_workers_of_two_pools_are_single_threaded_forks_of_one_server() -> None:
    described = []
    for _ in range(2):
        with ProcessPoolExecutor(1, mp_context=worker_context([__name__]), initializer=initialise_worker) as pool:
            described.append(pool.submit(describe_worker).result())
    (first, first_parent, first_threads), (second, second_parent, second_threads) = described
    assert first != second
    assert first_parent == second_parent != os.getpid()
    assert first_threads == second_threads == 1


def test_worker_ends_with_a_killed_parent(tmp_path: Path) -> None:
    """The worker inherits the standard output of its parent, so `subprocess.run` returns only after both have ended."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED_WITH_WORKER)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True, check=False, timeout=900
    )
    assert ran.returncode == -signal.SIGKILL
    assert int(ran.stdout) > 0  # the worker had started


AFTER_A_LOADER = """
import signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, forkserver, get_context
from modeling_m3ret.worker_process import block_sigterm_in_workers, exit_with_parent, initialise_worker
if __name__ == "__main__":
    context = get_context("forkserver")
    with block_sigterm_in_workers():
        forkserver.ensure_running()
    for function in (exit_with_parent, initialise_worker):
        pool = ProcessPoolExecutor(1, mp_context=context, initializer=function)
        pool.submit(time.sleep, 0).result()
        (worker,) = active_children()
        worker.terminate()
        worker.join(300)
        # the pool waits for it too; whoever comes second finds no exit status, which multiprocessing reports as 255
        assert worker.exitcode in (-signal.SIGTERM, 255), worker.exitcode
    print("ended")
"""


@pytest.mark.skipif(not HAS_SIGWAITINFO, reason="a loader blocks no signal on this platform")
def test_workers_of_pools_end_on_sigterm_although_a_loader_started_the_forkserver(tmp_path: Path) -> None:
    script = tmp_path / "after.py"
    script.write_text(AFTER_A_LOADER)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=900
    )
    assert ran.stdout == "ended\n"
