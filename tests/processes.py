"""Scripts in processes of their own, that need not import everything again: forks of one process that has.

An import of torch and transformers takes longer than most of what these tests run. Whatever a process has to itself it
has here too, but for its hash seed and what modules read when they are imported (`HF_HOME`, say), which forks share;
`test_scripts.py`, `test_fsdp2.py` and `test_dataset_on_hub.py` start some as a shell does.
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
from multiprocessing import forkserver
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
    "modeling_m3ret.evaluation.report.pictures",
    "torch.distributed.fsdp",
    # of the library's own workers; one that can't be imported is left out
    *("dataset_scripts.shards", "modeling_m3ret.phantom.dataset"),
    *("modeling_m3ret.space.isolation", "modeling_m3ret.space.uploads", "modeling_m3ret.space.gallery"),
]


@functools.cache
def forks() -> ForkServerContext:
    """How a process is started as a fork of the one that has everything imported, which begins to do so now."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    forkserver.ensure_running()
    return context


def ranks_environment(ranks: int) -> list[dict[str, str]]:
    """What `torch.distributed` reads in each rank, at a port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _begin() -> None:
    """What a fresh process would have by itself."""
    multiprocessing.set_start_method(None, force=True)  # its workers start as by default, not as it was started
    torch.seed(), np.random.seed(), random.seed()
    torch.set_num_threads(1)  # OMP_NUM_THREADS=1, which is read only when torch is loaded


def _be_script(words: Sequence[str], folder: Path, environment: Mapping[str, str], printed: Path) -> None:
    with printed.open("ab") as stream, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()  # those of the process that was forked are from when it began
    os.environ.update(environment)
    _begin()
    if "RANK" not in environment and hasattr(os, "sched_setaffinity"):
        # a lone process takes all cores; for a tiny model, two threads on a busy machine do little but wait
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
    """`function(rank, *arguments)` in so many processes that can find each other; what one raises is raised here."""
    forks()
    start_processes(_be_rank, (function, ranks_environment(ranks), arguments), ranks, start_method="forkserver")


class Script:
    """A running script: `ranks` processes of it, each a rank where there are several. words: script and arguments."""

    def __init__(self, words: Sequence[str], folder: Path, ranks: int = 1, **environment: str):
        self.printed_to = folder / f"printed-{time.monotonic_ns()}.txt"
        assert not any(name.startswith("HF_") for name in environment), "read when it is imported"
        everything = os.environ | environment
        of_ranks = ranks_environment(ranks) if ranks > 1 else [{}]
        self.processes: list[BaseProcess] = [
            forks().Process(target=_be_script, args=(words, folder, everything | of_rank, self.printed_to))
            for of_rank in of_ranks
        ]
        for process in self.processes:
            process.start()
            atexit.register(process.kill)  # a test that fails before it has ended would wait for it

    @property
    def printed(self) -> str:
        """What all ranks wrote so far, to standard output and error."""
        return self.printed_to.read_text() if self.printed_to.is_file() else ""

    def is_running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def stop(self) -> None:
        """With SIGTERM to all, their workers too, as batch systems do, and once more, as launchers then do."""
        for process in self.processes * 2:
            os.killpg(process.pid or 0, signal.SIGTERM)

    def finish(self, timeout: float = 600) -> int:
        """Its exit status, that of the first rank that failed; the others end with it, as under a launcher."""
        deadline = time.monotonic() + timeout
        codes: list[int | None] = [None]
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.02)
            codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        assert None not in codes or any(codes), f"not finished in {timeout} s: {self.printed}"
        return next((code for code in codes if code), 0)
