"""Each scan is decoded in a process of its own: one that hangs, crashes or swells ends alone, and the page stays.

Decoders of video and DICOM are native code. A file made to break one would else end the whole page, and a few that
keep one busy for ever would leave no reader to the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError
from typing import Any, TypeVar

from pebble import ProcessExpired
from pebble.concurrent import process

from ..reading_m3ret import M3RetReadError
from ..worker_process import exit_with_parent, worker_context


READERS = 2  # at a time
READ_SECONDS = 60.0  # 500 JPEG 2000 slices take some 20 s on two cores

# by `uploads`, and by the script that shows the page, which Python imports again in each process
IMPORTED = ["modeling_m3ret.space.uploads", "modeling_m3ret.space.gallery", "modeling_m3ret.space.quickstart"]

Result = TypeVar("Result")


class IsolatedReaders:
    """
    Args:
        seconds: how long a visitor waits, the time in which all readers are busy with others included.
    """

    def __init__(self, at_once: int = READERS, seconds: float = READ_SECONDS):
        self.seconds = seconds
        self._free = threading.Semaphore(at_once)
        # A process for each scan, since those of a pool share pipes and locks, and with them their ends. It is a fork
        # of one that has the readers imported and does nothing else: there in a tenth of a second.
        context: Any = worker_context([__name__, *IMPORTED])
        self._begin = process(context=context)(_read)  # type: ignore[call-overload]  # its types say `mp_context`
        # the imports take seconds: now, and not when the first visitor comes
        threading.Thread(target=self.read, args=("", _nothing), name="m3ret-reader", daemon=True).start()

    def read(self, name: str, function: Callable[..., Result], *arguments: object) -> Result:
        """`function(*arguments)` in a process of its own.

        Args:
            name: of what is read, for messages. function: of a module. What it takes and gives is pickled.

        Raises:
            M3RetReadError: if it raises that, ends its process, or takes too long, which ends its process.
        """
        until = time.monotonic() + self.seconds
        if not self._free.acquire(timeout=self.seconds):
            raise self._took_too_long(name)
        try:
            reading = self._begin(function, *arguments)
            try:
                result: Result = reading.result(max(0.0, until - time.monotonic()))
            except TimeoutError as error:
                reading.cancel()  # which ends the process
                raise self._took_too_long(name) from error
            except ProcessExpired as error:
                raise M3RetReadError(
                    name, "undecodable", "a complete scan in a supported format", "a crash of its decoder"
                ) from error
        finally:
            self._free.release()
        return result

    def _took_too_long(self, name: str) -> M3RetReadError:
        return M3RetReadError(name, "timeout", f"at most {self.seconds:g} s", "a scan that takes longer to read")


def _read(function: Callable[..., Result], *arguments: object) -> Result:
    exit_with_parent()
    return function(*arguments)


def _nothing() -> None:
    pass
