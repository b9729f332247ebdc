"""A gallery to search in: embeddings with what is known of each scan, exact by default, whole on the disk or not there.

The truth are the embeddings (safetensors) and the metadata (Parquet); a manifest says of which model they are and holds
their sha256. An approximate index (`approximate.py`) is built from them, and a file of one is believed only if this
machine wrote it: faiss trusts the bytes it reads.

An index never changes: `add` and `remove` give a new one, so that who searches meanwhile is not disturbed.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic_io import atomic_write_text, sync
from ..model_facts import ModelFacts, sha256_of
from .approximate import AIM, ApproximateSearch, Measured, Method
from .exact import FEW_QUERIES, Hits, bfloat16_rounding, block_type, search_exactly


FORMAT = 1
APPROXIMATE = "approximate.faiss"
CURRENT = "current.json"  # names the version that readers take, and is what a save replaces at last
# up to here a search of everything takes no longer than a person notices: 867,653 x 768 in some 50 ms on two cores
EXACT_UP_TO = 1_000_000
FILTERS_KEPT, FILTERS_KEPT_BYTES = 8, 2**28  # with their embeddings: 13 MiB for 1 % of 867,653 x 768
GATHERED = 0.25  # of the gallery: what is more is searched by reading it all, faster than by copying
COLUMNS = ("id", "patient", "modality", "anatomy", "labels", "source")
SCHEMA = pa.schema([(name, pa.list_(pa.string()) if name == "labels" else pa.string()) for name in COLUMNS])


class IndexFormatError(ValueError):
    """An index that cannot be used: names the place, what was found and what was expected."""


@dataclass(frozen=True)
class MetadataFilter:
    """Which scans may be found: those of these modalities, anatomies and sources (None: of all), and not of these
    patients."""

    modality: Collection[str] | None = None
    anatomy: Collection[str] | None = None
    source: Collection[str] | None = None
    excluded_patients: Collection[str] = ()

    def __post_init__(self) -> None:
        for column in ("modality", "anatomy", "source", "excluded_patients"):
            names = getattr(self, column)
            object.__setattr__(self, column, names if names is None else frozenset(names))

    def rows(self, gallery_size: int, column: Callable[[str], Coded]) -> np.ndarray:
        """Those of a gallery of this size that are allowed, ascending.

        Of the columns that are asked for, the one that leaves the fewest is followed by its lists, the others are
        looked up for these alone.
        """
        asked = {
            name: names for name in ("modality", "anatomy", "source") if (names := getattr(self, name)) is not None
        }
        allowed = np.arange(gallery_size)
        if asked:
            fewest = min(asked, key=lambda name: column(name).count(asked[name]))
            allowed = column(fewest).rows_of(asked.pop(fewest))
        for name, names in asked.items():
            allowed = allowed[column(name).is_in(names, allowed)]
        if self.excluded_patients:
            allowed = allowed[~column("patient").is_in(self.excluded_patients, allowed)]
        return allowed


@dataclass(frozen=True, eq=False)
class Coded:
    """A column of words as numbers: names, and of each row the place of its word in them."""

    names: dict[str, int]
    codes: np.ndarray

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Coded:
        words = column.combine_chunks().dictionary_encode()
        codes = np.asarray(words.indices.fill_null(len(words.dictionary)))
        return cls({name: place for place, name in enumerate(words.dictionary.to_pylist())}, codes)

    @cached_property
    def _lists(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows word by word, and where each word's begin."""
        order = np.argsort(self.codes, kind="stable")
        return order, np.searchsorted(self.codes[order], np.arange(len(self.names) + 1))

    def count(self, names: Collection[str]) -> int:
        _, starts = self._lists
        return sum(int(starts[place + 1] - starts[place]) for place in self._places(names))

    def rows_of(self, names: Collection[str]) -> np.ndarray:
        """Ascending."""
        order, starts = self._lists
        lists = [order[starts[place] : starts[place + 1]] for place in self._places(names)]
        return lists[0] if len(lists) == 1 else np.sort(np.concatenate([order[:0], *lists]))

    def is_in(self, names: Collection[str], rows: np.ndarray) -> np.ndarray:
        """Of each of these rows, whether its word is one of the names."""
        chosen = np.zeros(len(self.names) + 1, dtype=bool)
        chosen[self._places(names)] = True
        return chosen[self.codes[rows]]

    def _places(self, names: Collection[str]) -> list[int]:
        return [self.names[name] for name in names if name in self.names]


@dataclass(frozen=True, eq=False)
class Part:
    """What a filter leaves of a gallery: `(m,)` rows, ascending; their embeddings side by side, None where they are so
    many that the whole gallery is read faster."""

    rows: Tensor
    embeddings: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + (0 if self.embeddings is None else self.embeddings.nbytes)


@dataclass
class RetrievalIndex:
    """Build with `build`, read with `load`.

    embeddings: `(n, d)` float16 of norm 1, possibly a map of the file. metadata: a row each, with `COLUMNS`.
    approximate: what searches without a filter go through, if there is one.
    """

    embeddings: Tensor
    metadata: pa.Table
    facts: ModelFacts
    approximate: ApproximateSearch | None = None
    _rounding: float | None = field(default=None, repr=False)
    _coded: dict[str, Coded] = field(default_factory=dict, repr=False)
    _filters: dict[MetadataFilter, Part] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        embeddings: Tensor,
        metadata: pa.Table,
        facts: ModelFacts,
        method: Method | Literal["exact", "auto"] = "auto",
        aim: float = AIM,
    ) -> RetrievalIndex:
        """
        Args:
            embeddings: `(n, d)`, of any norm but zero; kept as directions, in float16.
            metadata: a row each with `id`, all different; of the other `COLUMNS` what is missing is empty.
            method: `exact`, or one of `approximate.py`; `auto` is exact up to a million scans, `rabitq` above.
            aim: recall@10 that an approximate search shall reach.

        Raises:
            ValueError: if they do not fit, ids repeat, or an embedding has no direction.
        """
        gallery = directions(embeddings)
        metadata = with_all_columns(metadata, len(gallery))
        if method == "auto":
            method = "exact" if len(gallery) <= EXACT_UP_TO else "rabitq"
        approximate = ApproximateSearch.build(gallery, method, aim) if method != "exact" and len(gallery) else None
        return cls(gallery, metadata, facts, approximate)

    def __len__(self) -> int:
        return len(self.embeddings)

    # ------------------------------------------------------------------------------------------------------ searching

    def search(
        self,
        queries: Tensor,
        k: int = 10,
        *,
        where: MetadataFilter | None = None,
        query_patients: Sequence[str] | None = None,
    ) -> Hits:
        """The k most similar scans of each query: with a filter always exactly, else as this index was built.

        Args:
            queries: `(q, d)` of any norm.
            query_patients: patient of each query, whose other scans are left out; "" to leave out none.

        Raises:
            ValueError: if shapes do not fit, or k is not positive.
        """
        if queries.ndim != 2 or queries.shape[1] != self.embeddings.shape[1] or k < 1:
            raise ValueError(
                f"queries {tuple(queries.shape)} do not fit {self.embeddings.shape[1]} dimensions, or k is {k}"
            )
        if where == MetadataFilter():
            where = None
        expect_of_each_query(query_patients, queries)
        queries = torch.nn.functional.normalize(queries.float(), dim=-1)
        if where is None and self.approximate is not None:
            return self._approximately(queries, k, self._own_rows(query_patients))
        own = self._own_rows(query_patients)
        part = None if where is None else self._part(where)
        if part is None or len(part.rows) == len(self):
            return search_exactly(self.embeddings, queries, k, own, self._bfloat16_rounding(queries))
        if part.embeddings is None:
            return search_exactly(
                self.embeddings, queries, k, own, self._bfloat16_rounding(queries), _mask(part.rows, len(self))
            )
        if own is not None:  # rows of the whole -> rows of the part
            own = [_places(part.rows, rows) for rows in own]
        hits = search_exactly(part.embeddings, queries, k, own)
        if not len(part.rows):
            return hits
        return Hits(hits.scores, torch.where(hits.rows < 0, -1, part.rows[hits.rows.clamp(min=0)]))

    def _approximately(self, queries: Tensor, k: int, own: list[Tensor] | None) -> Hits:
        assert self.approximate is not None
        if not own:
            return self.approximate.search(queries, k)
        hits = self.approximate.search(queries, k + max(len(rows) for rows in own))
        foreign = torch.stack([~torch.isin(found, rows) for found, rows in zip(hits.rows, own, strict=True)])
        order = torch.argsort((~foreign).int(), dim=1, stable=True)[:, :k]  # foreign ones first, as they came
        missing = ~foreign.gather(1, order)
        scores = hits.scores.gather(1, order).masked_fill(missing, -torch.inf)
        return Hits(scores, hits.rows.gather(1, order).masked_fill(missing, -1))

    def rows(self, found: Tensor) -> list[dict[str, Any]]:
        """The metadata of rows that a search found, without those that are -1."""
        return self.metadata.take(pa.array(found[found >= 0].flatten().tolist())).to_pylist()

    def _bfloat16_rounding(self, queries: Tensor) -> float:
        if self._rounding is None:
            if len(queries) <= FEW_QUERIES or block_type() != torch.bfloat16:
                return 1.0  # which is not looked at; and a pass over all rows takes longer than a search
            self._rounding = bfloat16_rounding(self.embeddings)
        return self._rounding

    def _part(self, where: MetadataFilter) -> Part:
        """What a filter leaves; the latest are remembered, since who searches asks again."""
        part = self._filters.get(where)
        if part is None:
            rows = where.rows(len(self), self._column)
            embeddings = None
            if len(rows) <= GATHERED * len(self):
                # numpy's take copies whole rows, in half the time of indexing a tensor
                embeddings = torch.from_numpy(self.embeddings.numpy().take(rows, axis=0))
            part = Part(torch.from_numpy(rows), embeddings)
            kept = list(self._filters.items())  # another thread that searches may change them meanwhile
            room = FILTERS_KEPT_BYTES - part.nbytes
            if room >= 0:  # else others would leave for what is not kept
                while kept and (len(kept) >= FILTERS_KEPT or sum(old.nbytes for _, old in kept) > room):
                    self._filters.pop(kept.pop(0)[0], None)
                self._filters[where] = part
        return part

    def _column(self, name: str) -> Coded:
        coded = self._coded.get(name)
        if coded is None:
            coded = self._coded[name] = Coded.of(self.metadata.column(name))
        return coded

    def _own_rows(self, query_patients: Sequence[str] | None) -> list[Tensor] | None:
        if query_patients is None:
            return None
        column = self._column("patient")
        return [torch.from_numpy(column.rows_of([patient] if patient else [])) for patient in query_patients]

    # ------------------------------------------------------------------------------------------------------- changing

    def add(self, embeddings: Tensor, metadata: pa.Table) -> RetrievalIndex:
        """A new index with these scans too. An approximate one is not trained anew, but its recall measured again."""
        more = RetrievalIndex.build(embeddings, metadata, self.facts, "exact")
        gallery = torch.cat([self.embeddings, more.embeddings])
        metadata = with_all_columns(pa.concat_tables([self.metadata, more.metadata]), len(gallery))
        approximate = self.approximate.with_more(gallery) if self.approximate else None
        return RetrievalIndex(gallery, metadata, self.facts, approximate)

    def remove(self, ids: Collection[str]) -> RetrievalIndex:
        """A new index without these scans; ids that it does not have are passed over. An approximate one is built
        anew."""
        kept = ~np.asarray(pc.is_in(self.metadata.column("id"), value_set=pa.array(list(ids), pa.string())))
        gallery = self.embeddings[torch.from_numpy(np.flatnonzero(kept))]
        measured = self.approximate.measured if self.approximate else None
        approximate = None
        if measured and len(gallery):
            approximate = ApproximateSearch.build(gallery, measured.method, measured.aim)
        return RetrievalIndex(gallery, self.metadata.filter(pa.array(kept)), self.facts, approximate)

    # ------------------------------------------------------------------------------------------------ saving, loading

    def save(self, folder: Path) -> None:
        """Write a version of its own into `folder`, then have `current.json` name it: readers see the old one or this.

        An older version is removed; who has it open reads on.
        """
        folder.mkdir(parents=True, exist_ok=True)
        version = folder / f"version-{uuid.uuid4().hex[:12]}"
        version.mkdir()
        save_file({"embeddings": self.embeddings.contiguous()}, version / "embeddings.safetensors")
        pq.write_table(self.metadata, version / "metadata.parquet", compression="zstd")
        files = {}
        for name in ("embeddings.safetensors", "metadata.parquet"):
            sync(version / name)
            files[name] = sha256_of(version / name)
        if self.approximate is not None:
            self.approximate.save(version / APPROXIMATE, files["embeddings.safetensors"])
        sync(version)
        manifest = {
            "format": FORMAT,
            "version": version.name,
            "scans": len(self),
            "dimension": self.embeddings.shape[1],
            "model": asdict(self.facts),
            "files": files,
            "approximate": asdict(self.approximate.measured) if self.approximate else None,
        }
        before = folder / CURRENT
        old = [path for path in folder.glob("version-*") if path != version]
        atomic_write_text(before, json.dumps(manifest, indent=2) + "\n")
        for path in old:
            shutil.rmtree(path, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path, expected: ModelFacts | None = None, *, verify: bool = True) -> RetrievalIndex:
        """
        Args:
            expected: whose embeddings the queries will be; others are refused. verify: compare the files with their
                sha256, which reads them once; else the embeddings are mapped, and read when they are searched.

        Raises:
            IndexFormatError: if there is none, a file is missing, cut or changed, or it is another model's.
        """
        manifest = _read_manifest(folder)
        version = folder / manifest["version"]
        facts = ModelFacts(**manifest["model"])
        if expected is not None and facts != expected:
            raise IndexFormatError(f"{folder}: found embeddings of {facts}, expected those of {expected}")
        for name, digest in manifest["files"].items():
            path = version / name
            if not path.is_file():
                raise IndexFormatError(f"{folder}: found no {name}, expected the one of the manifest")
            if verify and sha256_of(path) != digest:
                raise IndexFormatError(f"{folder}: found {name} changed or cut, expected the one of the manifest")
        try:
            with safe_open(version / "embeddings.safetensors", framework="pt") as tensors:
                embeddings = tensors.get_tensor("embeddings")
            metadata = pq.read_table(version / "metadata.parquet")
        except Exception as error:  # of the formats' readers
            raise IndexFormatError(
                f"{folder}: found files that can't be read ({type(error).__name__}), expected whole ones"
            ) from error
        shape = (manifest["scans"], manifest["dimension"])
        if embeddings.shape != shape or embeddings.dtype != torch.float16 or len(metadata) != shape[0]:
            raise IndexFormatError(
                f"{folder}: found {tuple(embeddings.shape)} {embeddings.dtype} and {len(metadata)} rows, "
                f"expected {shape} float16, and as many rows"
            )
        approximate = None
        if told := manifest["approximate"]:
            digest = manifest["files"]["embeddings.safetensors"]
            approximate = ApproximateSearch.load(version / APPROXIMATE, embeddings, digest)
            if approximate is None:  # from another machine, or cut
                approximate = ApproximateSearch.build(embeddings, Measured(**told).method, Measured(**told).aim)
        return cls(embeddings, metadata, facts, approximate)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / CURRENT).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise IndexFormatError(f"{folder}: found format {manifest['format']}, expected {FORMAT}")
        name = manifest["version"]
        if set(manifest["files"]) != {"embeddings.safetensors", "metadata.parquet"} or os.sep in name or ".." in name:
            raise ValueError("names of other files")
        ModelFacts(**manifest["model"])
        if manifest["approximate"]:
            Measured(**manifest["approximate"])
        return manifest
    except OSError as error:
        raise IndexFormatError(f"{folder}: found no {CURRENT}, expected an index") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, IndexFormatError):
            raise
        raise IndexFormatError(f"{folder}: found a {CURRENT} that is none, expected an index's manifest") from error


def _mask(rows: Tensor, of: int) -> Tensor:
    """`(of,)` bool."""
    mask = torch.zeros(of, dtype=torch.bool)
    mask[rows] = True
    return mask


def _places(ascending: Tensor, wanted: Tensor) -> Tensor:
    """Where those of the wanted rows that are among the others stand there."""
    places = torch.searchsorted(ascending, wanted).clamp(max=max(0, len(ascending) - 1))
    return places[ascending[places] == wanted] if len(ascending) else wanted[:0]


def expect_of_each_query(query_patients: Sequence[str] | None, queries: Tensor) -> None:
    if query_patients is not None and len(query_patients) != len(queries):
        raise ValueError(f"found {len(query_patients)} patients, expected one of each of {len(queries)} queries")


def directions(embeddings: Tensor) -> Tensor:
    """Embeddings `(n, d)` as float16 of norm 1. Raises ValueError for one that is not finite or all zeros."""
    if embeddings.ndim != 2 or not embeddings.isfinite().all():
        raise ValueError(f"embeddings {tuple(embeddings.shape)} are (n, d) and finite")
    kept = torch.empty(embeddings.shape, dtype=torch.float16)
    for start in range(0, len(embeddings), 65536):
        block = embeddings[start : start + 65536].float()
        norms = block.norm(dim=1, keepdim=True)
        if (norms == 0).any():
            raise ValueError("an embedding of zeros has no direction")
        kept[start : start + 65536] = (block / norms).half()
    return kept


def with_all_columns(metadata: pa.Table, rows: int) -> pa.Table:
    """`COLUMNS` of so many scans, empty where they are missing. Raises ValueError unless each has an id of its own."""
    if len(metadata) != rows or "id" not in metadata.column_names:
        raise ValueError(f"metadata has {len(metadata)} rows of {metadata.column_names}, expected {rows} with an id")
    ids = metadata.column("id")
    if ids.null_count or len(pc.unique(ids)) != rows:
        raise ValueError("ids of a gallery are all there and all different")
    for column in COLUMNS:
        if column not in metadata.column_names:
            empty = pa.array([[] if column == "labels" else ""] * rows, SCHEMA.field(column).type)
            metadata = metadata.append_column(column, empty)
    metadata = metadata.select(COLUMNS)
    try:
        return metadata.cast(SCHEMA)  # one that was all null, say, has a type of its own, and joins no other
    except pa.ArrowException as error:
        found = dict(zip(COLUMNS, map(str, metadata.schema.types), strict=True))
        raise ValueError(f"metadata has columns {found}, expected strings, and lists of them as labels") from error
