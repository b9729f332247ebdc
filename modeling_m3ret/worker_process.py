"""How does a process that works for another begin without importing everything again, and end when that is killed?"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.context import BaseContext

import torch


TELLS_SENDER = hasattr(signal, "sigwaitinfo")


def worker_context(imported: Sequence[str]) -> BaseContext:
    """How workers begin: as forks of one process that has the modules `imported` and does nothing else.

    Not of this one, whose threads a fork would copy half alive. The imports take seconds and are shared by all workers
    of this process's life, whoever asked first; what the others need then, each worker imports by itself. Where there
    is no such thing (Windows), each begins anew.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(imported))
    return context


def begin_worker() -> None:
    """One thread of torch, since the workers are the parallelism, and an end as soon as the parent ends."""
    torch.set_num_threads(1)
    end_with_parent()


def end_with_parent() -> None:
    """From now on this process ends as soon as the one that started it does, whatever it is at.

    Nobody else ends it: a worker of a pool would write on beside the next run, one that hangs would stay for ever.
    """
    threading.Thread(target=_wait_and_end, daemon=True).start()


@contextlib.contextmanager
def sigterm_left_to_parent() -> Iterator[None]:
    """Processes that are forked within have SIGTERM blocked in all their threads, whichever library starts those.

    To each belongs an `end_for_parent_alone`. Where signals don't tell their sender (macOS, Windows) nothing changes.
    """
    if not TELLS_SENDER:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_for_parent_alone() -> None:
    """From now on a SIGTERM ends this process, forked by `sigterm_left_to_parent`, if its parent sent it.

    From anyone else it is the parent's business: a scheduler sends it to all processes of a run, and the parent needs
    its workers until it has saved.
    """
    if TELLS_SENDER:
        threading.Thread(target=_wait_for_parents_signal, daemon=True).start()


def _wait_for_parents_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _wait_and_end() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
