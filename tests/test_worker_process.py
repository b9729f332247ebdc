"""Workers begin as forks of a process that has everything imported, have one thread, and are not left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from modeling_m3ret.worker_process import initialise_worker, worker_context


ROOT = Path(__file__).parents[1]
LEAVES_WORKERS = """
import os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from modeling_m3ret.worker_process import initialise_worker, worker_context
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=worker_context([]), initializer=initialise_worker)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def what_it_is() -> tuple[int, int, int]:
    return os.getpid(), os.getppid(), torch.get_num_threads()


def test_workers_of_two_pools_are_forks_of_one_process_with_one_thread() -> None:
    found = []
    for _ in range(2):
        with ProcessPoolExecutor(1, mp_context=worker_context([__name__]), initializer=initialise_worker) as pool:
            found.append(pool.submit(what_it_is).result())
    (first, server, threads), (second, same_server, again) = found
    assert first != second
    assert server == same_server != os.getpid()
    assert threads == again == 1


def test_a_worker_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(LEAVES_WORKERS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert ran.returncode < 0
    deadline = time.monotonic() + 10
    while is_there(int(ran.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
