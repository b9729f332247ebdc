"""A dictionary-encoded column of strings with the rows of each value, so that filters need no scan of the gallery."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa


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
