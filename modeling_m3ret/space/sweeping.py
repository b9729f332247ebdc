"""Nothing of a visitor stays: files of the upload folder go when they are old, open scans when nobody looks at them.

Gradio's own `delete_cache` removes what it has counted, and leaves what it has not: the part of an upload that was
refused for its size, and an empty file for each one that a page took in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path


SECONDS_KEPT = (
    1800.0  # of uploads, open scans and the pictures made from them: a page that is open longer has them itself
)
EVERY_SECONDS = 300.0


def sweep(folder: Path, seconds: float) -> None:
    """Remove the files that were last written so long ago, and the folders that have been empty so long."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what lies in a folder comes before it
        with suppress(OSError):  # another one was faster, or a folder is not empty
            if time.time() - path.lstat().st_mtime < seconds:
                continue  # a new empty folder is one that somebody is about to write into
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()


def keep_sweeping(
    folder: Path, remembered: Sequence[set[str]], put_away_unused: Callable[[float], object]
) -> threading.Event:
    """Sweep now and then, in a thread that ends with the process, or when the event is set.

    Args:
        remembered: paths of files, from which those that are gone are taken out: Gradio adds each one that it wrote.
        put_away_unused: given seconds, see `Searching`.
    """
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(EVERY_SECONDS):
            put_away_unused(SECONDS_KEPT)
            with suppress(OSError):  # a folder went while it was listed: the next time
                sweep(folder, SECONDS_KEPT)
            for paths in remembered:
                paths.difference_update([path for path in paths.copy() if not Path(path).exists()])

    threading.Thread(target=work, name="m3ret-sweeper", daemon=True).start()
    return stop
