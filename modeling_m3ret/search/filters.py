"""Metadata filters: which rows of a gallery match, found without a scan of the gallery.

Columns are dictionary-encoded once, with the rows of each value. The rows of the latest filters are cached.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from torch import Tensor


MAX_CACHED_FILTERS = 8
MAX_CACHED_BYTES = 2**28  # rows and embeddings of cached filters; 13 MiB for 1 % of 867,653 x 768
FILTER_COLUMNS = ("modality", "anatomy", "source")


@dataclass(frozen=True, eq=False)
class StringColumn:
    """A column of strings as integer codes.

    Attributes:
        code_of: code of each value.
        codes: `(n,)` code of each row; null has the largest code of all.
    """

    code_of: dict[str, int]
    codes: np.ndarray

    @classmethod
    def encode(cls, column: pa.ChunkedArray) -> StringColumn:
        """Encode an Arrow column."""
        encoded = column.combine_chunks().dictionary_encode()
        codes = np.asarray(encoded.indices.fill_null(len(encoded.dictionary)))
        return cls({value: code for code, value in enumerate(encoded.dictionary.to_pylist())}, codes)

    @cached_property
    def _rows_by_code(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows sorted by code, and where each code's rows start."""
        order = np.argsort(self.codes, kind="stable")
        return order, np.searchsorted(self.codes[order], np.arange(len(self.code_of) + 1))

    def count(self, values: Collection[str]) -> int:
        """Return the number of rows with one of these values."""
        _, starts = self._rows_by_code
        return sum(int(starts[code + 1] - starts[code]) for code in self._codes(values))

    def rows_of(self, values: Collection[str]) -> np.ndarray:
        """Return the rows with one of these values, ascending."""
        order, starts = self._rows_by_code
        lists = [order[starts[code] : starts[code + 1]] for code in self._codes(values)]
        return lists[0] if len(lists) == 1 else np.sort(np.concatenate([order[:0], *lists]))

    def is_in(self, values: Collection[str], rows: np.ndarray) -> np.ndarray:
        """Return for each of these rows whether it has one of the values."""
        chosen = np.zeros(len(self.code_of) + 1, dtype=bool)
        chosen[self._codes(values)] = True
        return chosen[self.codes[rows]]

    def _codes(self, values: Collection[str]) -> list[int]:
        return [self.code_of[value] for value in values if value in self.code_of]


@dataclass(frozen=True)
class MetadataFilter:
    """Restricts a search to some scans.

    Attributes:
        modality, anatomy, source: allowed values; None allows all, an empty collection none.
        excluded_patients: patients whose scans are left out.
    """

    modality: Collection[str] | None = None
    anatomy: Collection[str] | None = None
    source: Collection[str] | None = None
    excluded_patients: Collection[str] = ()

    def __post_init__(self) -> None:
        for name in (*FILTER_COLUMNS, "excluded_patients"):
            values = getattr(self, name)
            object.__setattr__(self, name, values if values is None else frozenset(values))

    def allowed_values(self) -> dict[str, Collection[str]]:
        """Return the allowed values by column, without columns that allow all."""
        return {name: values for name in FILTER_COLUMNS if (values := getattr(self, name)) is not None}

    def matching_rows(self, gallery_size: int, column: Callable[[str], StringColumn]) -> np.ndarray:
        """Return the rows that match, ascending.

        Args:
            gallery_size: number of rows.
            column: returns a column by name.
        """
        allowed = self.allowed_values()
        rows = np.arange(gallery_size)
        if allowed:  # the most selective column gives the rows, the others are checked for these only
            most_selective = min(allowed, key=lambda name: column(name).count(allowed[name]))
            rows = column(most_selective).rows_of(allowed.pop(most_selective))
        for name, values in allowed.items():
            rows = rows[column(name).is_in(values, rows)]
        if self.excluded_patients:
            rows = rows[~column("patient").is_in(self.excluded_patients, rows)]
        return rows


@dataclass(frozen=True, eq=False)
class FilteredRows:
    """Rows of a gallery that match a filter.

    Attributes:
        rows: `(m,)` int64, ascending.
        embeddings: `(m, d)` contiguous copy; None if the rows are so many that a mask is faster.
    """

    rows: Tensor
    embeddings: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + (0 if self.embeddings is None else self.embeddings.nbytes)


class FilterCache:
    """The latest filters with their rows, bounded in number and bytes. Safe to use from several threads."""

    def __init__(self) -> None:
        self._entries: dict[MetadataFilter, FilteredRows] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, where: MetadataFilter) -> bool:
        return where in self._entries

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values())

    def get(self, where: MetadataFilter) -> FilteredRows | None:
        return self._entries.get(where)

    def put(self, where: MetadataFilter, filtered: FilteredRows) -> None:
        """Add an entry and drop the oldest ones beyond the bounds. An entry too large for the cache is not added."""
        available = MAX_CACHED_BYTES - filtered.nbytes
        if available < 0:
            return
        with self._lock:
            entries = self._entries
            used = sum(entry.nbytes for entry in entries.values())
            while entries and (len(entries) >= MAX_CACHED_FILTERS or used > available):
                used -= entries.pop(next(iter(entries))).nbytes
            entries[where] = filtered
