"""Start worker processes cheaply, and end them together with the process that started them.

Workers are forked from a server process that has already imported the heavy modules (multiprocessing's forkserver).
DataLoader workers are forked from the training process instead, unless another start method is chosen;
`block_sigterm_in_workers` keeps a SIGTERM that is sent to the whole process group from ending them before the run has
saved.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext

import torch


HAS_SIGWAITINFO = hasattr(signal, "sigwaitinfo")  # not on macOS and Windows; reports the sender of a signal


def worker_context(preload: Sequence[str]) -> BaseContext:
    """Return a multiprocessing context whose workers are forked from a server process with preloaded modules.

    Forking this process instead would copy its threads in an undefined state. There is one server per process: its
    first worker decides which modules are preloaded, and later workers import the rest themselves. A module that cannot
    be imported is skipped. Without forkserver support (Windows) workers are spawned.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def initialise_worker() -> None:
    """Limit torch to one thread, since the workers are the parallelism, and end this worker with its parent."""
    torch.set_num_threads(1)
    exit_with_parent()


def exit_with_parent() -> None:
    """End this process as soon as the process that started it ends, whatever it is doing.

    Without this, the workers of a killed process would keep running and could write into the files of the next run.
    SIGTERM is unblocked, because the process may have inherited a mask from a forkserver that a loader started.
    """
    if HAS_SIGWAITINFO:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_after_parent, daemon=True).start()


@contextlib.contextmanager
def block_sigterm_in_workers() -> Iterator[None]:
    """Block SIGTERM in all threads of the processes started inside this block, threads started by libraries included.

    Each of these processes must call `exit_on_sigterm_from_parent`. A forkserver that is started inside this block
    passes the mask on. If the forkserver was running before, SIGTERM is blocked only by that call, and not in threads
    that libraries started on import. Has no effect where the sender of a signal is unknown (macOS, Windows).
    """
    if not HAS_SIGWAITINFO:
        yield
        return
    resource_tracker.ensure_running()  # before Python 3.12, starting it unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_on_sigterm_from_parent() -> None:
    """End this process, started inside `block_sigterm_in_workers`, on a SIGTERM from its parent only.

    A scheduler sends SIGTERM to all processes of a run. The parent handles it, and needs its workers until it has
    saved.
    """
    if HAS_SIGWAITINFO:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a forkserver may not have passed the mask on
        threading.Thread(target=_wait_for_sigterm_from_parent, daemon=True).start()


def _wait_for_sigterm_from_parent() -> None:
    parent = multiprocessing.parent_process()  # not os.getppid(), which may be a forkserver
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def _exit_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
