"""Decode scans in separate processes, so that a file that hangs or crashes its decoder does not stop the page.

Decoders of video and DICOM are native code. A malformed file could otherwise crash the whole server, and a few slow
files could block every other visitor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError
from queue import Empty, LifoQueue
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

from ..reading_m3ret import M3RetReadError
from ..worker_process import exit_with_parent, worker_context


MAX_READERS = 2  # processes at a time
READ_SECONDS = 60.0  # 500 JPEG 2000 slices take about 20 s on two cores
MAX_READS = 100  # of one process, whose memory may grow with each; starting another takes 0.15 s

# modules that a reader needs, and those that app.py imports, which each process imports again
PRELOADED = ["modeling_m3ret.space.uploads", "modeling_m3ret.space.gallery", "modeling_m3ret.command_line"]

Result = TypeVar("Result")


class IsolatedReaders:
    """Run read functions in separate processes. `seconds` limits a read, including the time until a process is free."""

    def __init__(self, max_readers: int = MAX_READERS, seconds: float = READ_SECONDS):
        self.seconds = seconds
        # Forked from a server process that has the readers imported.
        self._context: Any = worker_context([__name__, *PRELOADED])
        # Each process has a pool of its own: those of one pool share pipes and locks; one that dies can block others.
        self._free: LifoQueue[ProcessPool] = LifoQueue()  # the last one used is warm
        for _ in range(max_readers):
            self._free.put(self._pool())
        # the imports take seconds: start the server process now, not when the first visitor arrives
        threading.Thread(target=self.read, args=("", bool), name="m3ret-reader", daemon=True).start()

    def read(self, name: str, function: Callable[..., Result], *arguments: object) -> Result:
        """Return `function(*arguments)`, computed in a separate process.

        Raises:
            M3RetReadError: If the function raises it, its process dies, or is killed because of the time limit.
        """
        deadline = time.monotonic() + self.seconds
        try:
            pool = self._free.get(timeout=self.seconds)
        except Empty:
            raise self._timeout(name) from None
        if not pool.active:  # its process was killed while it had nothing to do
            pool = self._pool()
        is_intact = False
        try:
            remaining = max(0.01, deadline - time.monotonic())
            reading = pool.schedule(function, arguments, timeout=remaining)
            try:
                result: Result = reading.result(remaining + 1)
                is_intact = True
                return result
            except TimeoutError as error:
                raise self._timeout(name) from error
            except ProcessExpired as error:
                expected = "a complete scan in a supported format"
                raise M3RetReadError(name, "undecodable", expected, "a crash of its decoder") from error
            except M3RetReadError:
                is_intact = True
                raise
        finally:
            if not is_intact:
                pool.stop()
                threading.Thread(target=pool.join, daemon=True).start()  # waits until its process is killed
                pool = self._pool()
            self._free.put(pool)

    def _pool(self) -> ProcessPool:
        """Return a pool of one process, which starts with the first read."""
        return ProcessPool(1, MAX_READS, exit_with_parent, context=self._context)

    def _timeout(self, name: str) -> M3RetReadError:
        return M3RetReadError(name, "timeout", f"at most {self.seconds:g} s", "a scan that takes longer to read")
