"""Metadata filters: which rows of a gallery may be found."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from ..data.schema import clean, find_modality, fold, nearest, require_words
from ..errors import InputError


FILTER_COLUMNS = ("modality", "anatomy", "source")


class StringColumn:
    """A column of strings as integer codes, which are compared 50 times as fast; null has the code -1."""

    def __init__(self, column: pa.ChunkedArray):
        encoded = column.combine_chunks().dictionary_encode()
        self.codes = np.asarray(encoded.indices.fill_null(-1))
        self.code_of = {value: code for code, value in enumerate(encoded.dictionary.to_pylist())}

    def is_in(self, values: Collection[str]) -> np.ndarray:
        """Return whether each row has one of the values: `(n,)` bool."""
        chosen = np.zeros(len(self.code_of) + 1, dtype=bool)  # of each code; the last is that of null
        chosen[[self.code_of[value] for value in values if value in self.code_of]] = True
        return chosen[self.codes]

    @cached_property
    def spellings(self) -> dict[str, list[str]]:
        """The values of the column by their folded form."""
        return self._grouped(fold)

    @cached_property
    def cleaned(self) -> dict[str, list[str]]:
        """The values of the column by their form without invisible characters and surplus spaces."""
        return self._grouped(clean)

    def _grouped(self, form: Callable[[str], str]) -> dict[str, list[str]]:
        values: dict[str, list[str]] = {}
        for value in self.code_of:
            values.setdefault(form(value or ""), []).append(value)
        return values


@dataclass(frozen=True)
class MetadataFilter:
    """Restricts a search to scans with these values and without these patients.

    None allows all values, an empty collection none. Case does not matter; synonyms of a modality ("MR") are allowed.
    Patients are compared as manifests are read: spaces around a name do not matter, but case does.

    Raises:
        InputError: if a value is not a collection of strings. A single string would be read as its letters.
    """

    modality: Collection[str] | None = None
    anatomy: Collection[str] | None = None
    source: Collection[str] | None = None
    excluded_patients: Collection[str] = ()

    def __post_init__(self) -> None:
        for name in (*FILTER_COLUMNS, "excluded_patients"):
            values = getattr(self, name)
            if values is not None or name == "excluded_patients":
                words = require_words(name, values)
                if name == "modality":
                    words |= {modality for word in words if (modality := find_modality(word))}
                elif name == "anatomy":
                    words |= set(map(fold, words))  # as in a collection
                elif name == "excluded_patients":
                    words |= set(map(clean, words))  # as in a collection
                object.__setattr__(self, name, words)

    def allowed_values(self) -> dict[str, Collection[str]]:
        """Return the allowed values by column, without columns that allow all."""
        return {name: values for name in FILTER_COLUMNS if (values := getattr(self, name)) is not None}

    def mask(self, columns: Mapping[str, StringColumn]) -> np.ndarray:
        """Return whether each row matches: `(n,)` bool. `columns` are `FILTER_COLUMNS` and "patient".

        Raises:
            InputError: if a value does not occur in its column. A known modality that no scan has is allowed.
        """
        patients = columns["patient"].cleaned
        for patient in self.excluded_patients:
            if patient and clean(patient) not in patients:
                raise InputError(
                    f"unknown patient in a filter: expected one of {len(patients)} patients of this index, got "
                    f"{patient!r}. {nearest(clean(patient), patients)}"
                )
        left_out = {spelling for patient in self.excluded_patients for spelling in patients.get(clean(patient), ())}
        masks = [~columns["patient"].is_in(left_out)]
        for name, values in self.allowed_values().items():
            spellings = columns[name].spellings
            for value in values:
                if value and fold(value) not in spellings and not (name == "modality" and find_modality(value)):
                    raise InputError(
                        f"unknown {name} in a filter: expected one of {len(spellings)} values of this index, got "
                        f"{value!r}. {nearest(fold(value), spellings)}"
                    )
            masks.append(columns[name].is_in([word for value in values for word in spellings.get(fold(value), ())]))
        return np.logical_and.reduce(masks)
