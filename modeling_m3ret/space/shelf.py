"""Scans that are open: read again and again while somebody looks at them, and put away when memory is needed."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar


Kept = TypeVar("Kept")


@dataclass
class _Place(Generic[Kept]):
    thing: Kept
    size: int
    used: float


@dataclass
class Shelf(Generic[Kept]):
    """The things used last, up to so many bytes; at least the newest one. For any number of threads."""

    most_bytes: int
    _kept: OrderedDict[str, _Place[Kept]] = field(default_factory=OrderedDict, repr=False)  # used last comes last
    _bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def put(self, key: str, thing: Kept, size: int) -> None:
        with self._lock:
            if key in self._kept:
                self._bytes -= self._kept.pop(key).size
            self._kept[key] = _Place(thing, size, time.monotonic())
            self._bytes += size
            while self._bytes > self.most_bytes and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].size

    def drop(self, key: str) -> None:
        with self._lock:
            if key in self._kept:
                self._bytes -= self._kept.pop(key).size

    def drop_unused(self, seconds: float) -> None:
        """What nobody asked for so long."""
        with self._lock:
            while self._kept and time.monotonic() - next(iter(self._kept.values())).used >= seconds:
                self._bytes -= self._kept.popitem(last=False)[1].size

    def get(self, key: str) -> Kept | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            self._kept[key].used = time.monotonic()
            return self._kept[key].thing
