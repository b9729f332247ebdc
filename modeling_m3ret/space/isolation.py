"""Decode each scan in a separate process, so that a file that hangs or crashes its decoder does not stop the page.

Decoders of video and DICOM are native code. A malformed file could otherwise crash the whole server, and a few slow
files could block every other visitor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError
from typing import Any, TypeVar, cast

from pebble import ProcessExpired
from pebble.concurrent import process

from ..reading_m3ret import M3RetReadError
from ..worker_process import exit_with_parent, worker_context


MAX_READERS = 2  # processes at a time
READ_SECONDS = 60.0  # 500 JPEG 2000 slices take about 20 s on two cores

# modules that a reader needs, and those that app.py imports, which each process imports again
PRELOADED = ["modeling_m3ret.space.uploads", "modeling_m3ret.space.gallery", "modeling_m3ret.command_line"]

Result = TypeVar("Result")


class IsolatedReaders:
    """Run read functions in separate processes. `seconds` limits a read, including the time until a process is free."""

    def __init__(self, max_readers: int = MAX_READERS, seconds: float = READ_SECONDS):
        self.seconds = seconds
        self._free = threading.Semaphore(max_readers)
        # One process per scan: the processes of a pool share pipes and locks, so one that dies can block the others.
        # Each is forked from a server process that has the readers imported, which takes about 0.1 s.
        context: Any = worker_context([__name__, *PRELOADED])
        self._start = process(context=context)(_read)  # type: ignore[call-overload]  # its stubs call it `mp_context`
        # the imports take seconds: start the server process now, not when the first visitor arrives
        threading.Thread(target=self.read, args=("", bool), name="m3ret-reader", daemon=True).start()

    def read(self, name: str, function: Callable[..., Result], *arguments: object) -> Result:
        """Return `function(*arguments)`, computed in a separate process.

        Args:
            name: Name of the scan, for error messages.
            function: Module-level function. Its arguments and its result are pickled.

        Raises:
            M3RetReadError: If the function raises it, its process dies, or is killed because of the time limit.
        """
        deadline = time.monotonic() + self.seconds
        if not self._free.acquire(timeout=self.seconds):
            raise self._timeout(name)
        try:
            reading = self._start(function, *arguments)
            try:
                return cast(Result, reading.result(max(0.0, deadline - time.monotonic())))
            except TimeoutError as error:
                reading.cancel()  # kills the process
                raise self._timeout(name) from error
            except ProcessExpired as error:
                expected = "a complete scan in a supported format"
                raise M3RetReadError(name, "undecodable", expected, "a crash of its decoder") from error
        finally:
            self._free.release()

    def _timeout(self, name: str) -> M3RetReadError:
        return M3RetReadError(name, "timeout", f"at most {self.seconds:g} s", "a scan that takes longer to read")


def _read(function: Callable[..., Result], *arguments: object) -> Result:
    exit_with_parent()
    return function(*arguments)
