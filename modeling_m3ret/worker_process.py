"""How does a process that works for another one end when that one is killed?"""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """From now on this process ends as soon as the one that started it does, whatever it is at.

    Nobody else ends it: a worker of a pool would write on beside the next run, one that hangs would stay for ever.
    """
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
