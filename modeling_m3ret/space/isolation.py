"""What visitors send is decoded in processes of its own: one that hangs, crashes or swells is replaced, the page stays.

Decoders of video and DICOM are native code. A file made to break one would else end the whole page, and a few that
keep one busy for ever would leave no reader to the others.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from ..reading_m3ret import M3RetReadError


READERS = 2  # at a time
READ_SECONDS = 60.0  # 500 JPEG 2000 slices take some 20 s on two cores

Result = TypeVar("Result")


class IsolatedReaders:
    """
    Args:
        seconds: how long a visitor waits, the time in which all readers are busy with others included.
    """

    def __init__(self, processes: int = READERS, seconds: float = READ_SECONDS):
        self.processes, self.seconds = processes, seconds
        self._free, self._changing = threading.Semaphore(processes), threading.Lock()
        # forks of a process that has the readers imported and runs nothing else, so that each is there at once
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, "modeling_m3ret.space.uploads"])
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPool:
        pool = ProcessPool(self.processes, context=self._context)
        pool.schedule(_nothing)  # so that it starts now, and not with the first visitor
        return pool

    def read(self, name: str, function: Callable[..., Result], *arguments: object) -> Result:
        """`function(*arguments)` in one of the processes.

        Args:
            name: of what is read, for messages. function: of a module. What it takes and gives is pickled.

        Raises:
            M3RetReadError: if it raises that, ends its process, or takes too long, which ends its process.
        """
        until = time.monotonic() + self.seconds
        # waited for here: what the pool was given is begun, even if nobody waits for it any more
        if not self._free.acquire(timeout=self.seconds):
            raise self._took_too_long(name)
        try:
            reading = self._begin(function, arguments)
            try:
                return reading.result(max(0.0, until - time.monotonic()))
            except TimeoutError as error:
                reading.cancel()  # which ends the process
                raise self._took_too_long(name) from error
            except (ProcessExpired, BrokenProcessPool) as error:
                raise M3RetReadError(
                    name, "a file on which its reader broke down", "one that can be decoded"
                ) from error
        finally:
            self._free.release()

    def _begin(self, function: Callable[..., Result], arguments: tuple[object, ...]) -> ProcessFuture[Result]:
        with self._changing:
            if not self._pool.active:  # a process ended while it had nothing to do
                self._pool.stop()
                self._pool = self._new_pool()
            return self._pool.schedule(function, arguments)

    def _took_too_long(self, name: str) -> M3RetReadError:
        return M3RetReadError(name, f"a scan that took more than {self.seconds:g} s to read", "one that is read sooner")

    def close(self) -> None:
        """End the processes, whatever they do."""
        self._pool.stop()
        self._pool.join()


def _nothing() -> None:
    pass
