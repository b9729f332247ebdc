"""Run scripts and functions in processes of their own, forked from a server that has already imported torch.

Importing torch and transformers takes longer than most tests. A fork differs from a new process only in its hash seed,
and in what modules read at import time, such as `HF_HOME`. `test_scripts.py`, `test_fsdp2.py` and
`test_dataset_on_hub.py` also start scripts from a shell.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from torch.multiprocessing import start_processes


IMPORTED = [
    "accelerate.tracking",
    "matplotlib.pyplot",
    "modeling_m3ret.data.loading",
    "modeling_m3ret.pretraining.saving",
    "modeling_m3ret.evaluation.report.report",
    "torch.distributed.fsdp",
    # used by the library's own workers; modules that cannot be imported are ignored
    *("dataset_scripts.shards", "modeling_m3ret.phantom.dataset"),
    *("modeling_m3ret.space.isolation", "modeling_m3ret.space.uploads", "modeling_m3ret.space.gallery"),
]


@functools.cache
def forks() -> ForkServerContext:
    """Return the context that forks processes from the server, and start the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    forkserver.ensure_running()
    return context


def ranks_environment(ranks: int) -> list[dict[str, str]]:
    """Return the environment variables of `torch.distributed` for each rank, with a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _begin() -> None:
    """Give a fork the state of a new process."""
    multiprocessing.set_start_method(None, force=True)  # the default for its own workers
    torch.seed(), np.random.seed(), random.seed()
    torch.set_num_threads(1)  # like OMP_NUM_THREADS=1, which torch reads at import time


def _be_script(words: Sequence[str], folder: Path, environment: Mapping[str, str], printed: Path) -> None:
    with printed.open("ab") as stream, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()  # inherited from the server
    os.environ.update(environment)
    _begin()
    if "RANK" not in environment and hasattr(os, "sched_setaffinity"):
        # a single process would use all cores; for a tiny model, several threads mostly wait for each other
        cores, worker = sorted(os.sched_getaffinity(0)), environment.get("PYTEST_XDIST_WORKER", "gw0")
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    sys.argv = [*words]
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


def _be_rank(
    rank: int, function: Callable[..., None], environments: Sequence[Mapping[str, str]], arguments: Sequence[object]
) -> None:
    os.environ.update(environments[rank])
    _begin()
    function(rank, *arguments)


def in_ranks(function: Callable[..., None], ranks: int, *arguments: object) -> None:
    """Call `function(rank, *arguments)` in `ranks` processes that can form a process group. Re-raise their errors."""
    forks()
    start_processes(_be_rank, (function, ranks_environment(ranks), arguments), ranks, start_method="forkserver")


# once a rank has failed, the others may take this long to end by themselves
GRACE_SECONDS = 120


class Script:
    """A running script.

    Args:
        words: script and arguments.
        folder: working directory.
        ranks: number of processes, each with the environment of a rank if there are several.
        environment: further environment variables.
    """

    def __init__(self, words: Sequence[str], folder: Path, ranks: int = 1, **environment: str):
        self.printed_to = folder / f"printed-{time.monotonic_ns()}.txt"
        assert not any(name.startswith("HF_") for name in environment), "read at import time, so without effect"
        everything = os.environ | environment
        environments = ranks_environment(ranks) if ranks > 1 else [{}]
        self.processes: list[BaseProcess] = [
            forks().Process(target=_be_script, args=(words, folder, everything | of_rank, self.printed_to))
            for of_rank in environments
        ]
        for process in self.processes:
            process.start()
            atexit.register(process.kill)  # otherwise a failed test would wait for it

    @property
    def printed(self) -> str:
        """Standard output and error of all ranks so far."""
        return self.printed_to.read_text() if self.printed_to.is_file() else ""

    def is_running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def stop(self) -> None:
        """Send SIGTERM to all ranks and their workers, as batch systems do, and again, as launchers then do."""
        for process in self.processes * 2:
            os.killpg(process.pid or 0, signal.SIGTERM)

    def finish(self, timeout: float = 600) -> int:
        """Wait for all ranks. Return 0, or the exit code of the first rank, by number, that failed.

        If a rank fails, the others are killed unless they end within `GRACE_SECONDS`.
        """
        deadline = time.monotonic() + timeout
        running = {process.sentinel: process for process in self.processes}
        failed = False
        while running and (ended := connection.wait(list(running), max(0.0, deadline - time.monotonic()))):
            for sentinel in ended:
                process = running.pop(sentinel)
                process.join()
                if process.exitcode and not failed:
                    failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        for process in running.values():
            process.kill()
            process.join()
        assert failed or not running, f"not finished in {timeout} s: {self.printed}"
        return next((process.exitcode for process in self.processes if process.exitcode), 0)
