"""Scans that are open: read again and again while somebody looks at them, and put away when memory is needed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar


Kept = TypeVar("Kept")


@dataclass
class Shelf(Generic[Kept]):
    """The things used last, up to so many bytes; at least the newest one. For any number of threads."""

    most_bytes: int
    _kept: OrderedDict[str, tuple[Kept, int]] = field(default_factory=OrderedDict, repr=False)
    _bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def put(self, key: str, thing: Kept, size: int) -> None:
        with self._lock:
            if key in self._kept:
                self._bytes -= self._kept.pop(key)[1]
            self._kept[key] = thing, size
            self._bytes += size
            while self._bytes > self.most_bytes and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1][1]

    def drop(self, key: str) -> None:
        with self._lock:
            if key in self._kept:
                self._bytes -= self._kept.pop(key)[1]

    def get(self, key: str) -> Kept | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]
