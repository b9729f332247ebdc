"""A search index on disk: embeddings with metadata, searched exactly by default.

The embeddings (safetensors) and the metadata (Parquet) are the source of truth; a manifest names their model and holds
their SHA-256. An approximate index (`approximate.py`) is derived from them. An index is immutable: `add` and `remove`
return a new one, so open readers are unaffected.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
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
from ..errors import InputError
from ..model_facts import ModelFacts, sha256_of
from .approximate import TARGET_RECALL, ApproximateSearch, ApproximateSettings, Method
from .exact import FEW_QUERIES, Hits, bfloat16_rounding, block_dtype, search_exactly
from .filters import FilterCache, FilteredRows, MetadataFilter, StringColumn


FORMAT = 1
EMBEDDINGS = "embeddings.safetensors"
METADATA = "metadata.parquet"
APPROXIMATE = "approximate.faiss"
CURRENT = "current.json"  # manifest; names the version that readers open, and is replaced last
# largest gallery that is searched exactly by default: 867,653 x 768 takes about 50 ms on two cores
EXACT_UP_TO = 1_000_000
MAX_COPIED_FRACTION = 0.25  # of the gallery; a filter that leaves more is faster to apply as a mask
COLUMNS = ("id", "patient", "modality", "anatomy", "labels", "source")
SCHEMA = pa.schema([(name, pa.list_(pa.string()) if name == "labels" else pa.string()) for name in COLUMNS])


Reason = Literal["not_found", "damaged", "unsupported", "unfinished", "other_model"]


class IndexFormatError(InputError):
    """An index cannot be used.

    Attributes:
        location: folder of the index, or name of the collection.
        reason: kind of failure. "damaged" indices break their own format; "unsupported" ones are of another version or
            another program; "unfinished" ones were not built to their end.
        file: name of the missing or damaged file, if it is one file.
    """

    def __init__(self, location: object, reason: Reason, details: str, file: str | None = None):
        super().__init__(f"{location}: {details}")
        self.location, self.reason, self.file = str(location), reason, file


@dataclass
class RetrievalIndex:
    """A gallery that can be searched. Create it with `build` or `load`.

    Attributes:
        embeddings: `(n, d)` float16 of norm 1, possibly memory-mapped.
        metadata: table with `COLUMNS`, one row per scan.
        facts: model that made the embeddings.
        approximate: used by searches without a filter, if present.
        filter_cache: rows of the latest filters.
    """

    embeddings: Tensor
    metadata: pa.Table
    facts: ModelFacts
    approximate: ApproximateSearch | None = None
    filter_cache: FilterCache = field(default_factory=FilterCache, repr=False)
    _rounding: float | None = field(default=None, repr=False)
    _columns: dict[str, StringColumn] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        embeddings: Tensor,
        metadata: pa.Table,
        facts: ModelFacts,
        method: Method | Literal["exact", "auto"] = "auto",
        target_recall: float = TARGET_RECALL,
    ) -> RetrievalIndex:
        """Build an index in memory.

        Args:
            embeddings: `(n, d)` of any norm except zero; stored as float16 of norm 1.
            metadata: one row per scan with a unique `id`; missing `COLUMNS` are filled with empty values.
            facts: model that made the embeddings.
            method: "exact", "ivf", "rabitq" or "hnsw"; "auto" is exact up to a million scans and rabitq above.
            target_recall: recall@10 that an approximate search is tuned to.

        Raises:
            ValueError: if the sizes do not match, ids are missing or repeated, or an embedding is zero or not finite.
        """
        gallery = normalize_to_float16(embeddings)
        metadata = complete_metadata(metadata, len(gallery))
        if method == "auto":
            method = "exact" if len(gallery) <= EXACT_UP_TO else "rabitq"
        approximate = None
        if method != "exact" and len(gallery):
            approximate = ApproximateSearch.build(gallery, method, target_recall)
        return cls(gallery, metadata, facts, approximate)

    def __len__(self) -> int:
        return len(self.embeddings)

    # ---- search -----------------------------------------------------------------------------------------------------

    def search(
        self,
        queries: Tensor,
        k: int = 10,
        *,
        where: MetadataFilter | None = None,
        query_patients: Sequence[str] | None = None,
    ) -> Hits:
        """Return the k most similar scans of each query.

        With a filter the search is exact; otherwise it is as the index was built.

        Args:
            queries: `(q, d)` of any norm.
            k: number of hits, at least 1.
            where: only scans that match are found.
            query_patients: patient of each query, whose scans are left out; "" leaves out none.

        Raises:
            ValueError: if the shapes do not match or k is not positive.
        """
        check_queries(queries, self.embeddings.shape[1], query_patients)
        if k < 1:
            raise ValueError(f"k must be positive: got {k}.")
        queries = torch.nn.functional.normalize(queries.float(), dim=-1)
        excluded = self._rows_of_patients(query_patients)
        if where is None and self.approximate is not None:
            return _search_approximately(self.approximate, queries, k, excluded)
        filtered = None if where is None else self._filter(where)
        if filtered is None or len(filtered.rows) == len(self):
            return search_exactly(self.embeddings, queries, k, excluded, self._max_rounding(queries))
        if filtered.embeddings is None:
            mask = _mask(filtered.rows, len(self))
            return search_exactly(self.embeddings, queries, k, excluded, self._max_rounding(queries), mask)
        if excluded is not None:
            excluded = [_positions(filtered.rows, rows) for rows in excluded]
        hits = search_exactly(filtered.embeddings, queries, k, excluded)
        if not len(filtered.rows):
            return hits
        return Hits(hits.scores, torch.where(hits.rows < 0, -1, filtered.rows[hits.rows.clamp(min=0)]))

    def lookup(self, rows: Tensor) -> list[dict[str, Any]]:
        """Return the metadata of rows that a search found; rows of -1 are skipped."""
        return self.metadata.take(pa.array(rows[rows >= 0].flatten().tolist())).to_pylist()

    def _max_rounding(self, queries: Tensor) -> float:
        if self._rounding is None:
            if len(queries) <= FEW_QUERIES or block_dtype() != torch.bfloat16:
                return 1.0  # not used, and measuring it takes longer than the search
            self._rounding = bfloat16_rounding(self.embeddings)
        return self._rounding

    def _filter(self, where: MetadataFilter) -> FilteredRows:
        filtered = self.filter_cache.get(where)
        if filtered is None:
            rows = where.matching_rows(len(self), self._column)
            embeddings = None
            if len(rows) <= MAX_COPIED_FRACTION * len(self):
                # numpy's take copies whole rows, in half the time of indexing a tensor
                embeddings = torch.from_numpy(self.embeddings.numpy().take(rows, axis=0))
            filtered = FilteredRows(torch.from_numpy(rows), embeddings)
            self.filter_cache.put(where, filtered)
        return filtered

    def _column(self, name: str) -> StringColumn:
        column = self._columns.get(name)
        if column is None:
            column = self._columns[name] = StringColumn.encode(self.metadata.column(name))
        return column

    def _rows_of_patients(self, patients: Sequence[str] | None) -> list[Tensor] | None:
        if patients is None:
            return None
        column = self._column("patient")
        return [torch.from_numpy(column.rows_of([patient] if patient else [])) for patient in patients]

    # ---- changes ----------------------------------------------------------------------------------------------------

    def add(self, embeddings: Tensor, metadata: pa.Table) -> RetrievalIndex:
        """Return a new index with further scans. An approximate index is not retrained, but tuned again.

        Args:
            embeddings: `(m, d)`, as for `build`.
            metadata: one row per added scan, as for `build`.

        Raises:
            ValueError: as `build`, or if an id is in the index already.
        """
        added = RetrievalIndex.build(embeddings, metadata, self.facts, "exact")
        gallery = torch.cat([self.embeddings, added.embeddings])
        metadata = complete_metadata(pa.concat_tables([self.metadata, added.metadata]), len(gallery))
        approximate = self.approximate.extend(gallery) if self.approximate else None
        return RetrievalIndex(gallery, metadata, self.facts, approximate)

    def remove(self, ids: Collection[str]) -> RetrievalIndex:
        """Return a new index without some scans. An approximate index is built again.

        Args:
            ids: of the scans to remove; unknown ids are ignored.
        """
        remaining = ~np.asarray(pc.is_in(self.metadata.column("id"), value_set=pa.array(list(ids), pa.string())))
        gallery = self.embeddings[torch.from_numpy(np.flatnonzero(remaining))]
        approximate = None
        if self.approximate and len(gallery):
            settings = self.approximate.settings
            approximate = ApproximateSearch.build(gallery, settings.method, settings.target_recall)
        return RetrievalIndex(gallery, self.metadata.filter(pa.array(remaining)), self.facts, approximate)

    # ---- on disk ----------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write a new version into a folder, then replace the manifest, which makes it the current one.

        An interrupted save leaves the previous version current. Older versions are deleted; open readers are
        unaffected.
        """
        folder.mkdir(parents=True, exist_ok=True)
        version = folder / f"version-{uuid.uuid4().hex[:12]}"
        version.mkdir()
        save_file({"embeddings": self.embeddings.contiguous()}, version / EMBEDDINGS)
        pq.write_table(self.metadata, version / METADATA, compression="zstd")
        files = {}
        for name in (EMBEDDINGS, METADATA):
            sync(version / name)
            files[name] = sha256_of(version / name)
        if self.approximate is not None:
            self.approximate.save(version / APPROXIMATE, files[EMBEDDINGS])
        sync(version)
        manifest = {
            "format": FORMAT,
            "version": version.name,
            "scans": len(self),
            "dimension": self.embeddings.shape[1],
            "model": asdict(self.facts),
            "files": files,
            "approximate": self.approximate.settings.to_dict() if self.approximate else None,
        }
        older = [path for path in folder.glob("version-*") if path != version]
        atomic_write_text(folder / CURRENT, json.dumps(manifest, indent=2) + "\n")
        for path in older:
            shutil.rmtree(path, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path, expected: ModelFacts | None = None, *, verify: bool = True) -> RetrievalIndex:
        """Load the current version of an index.

        Args:
            folder: as given to `save`.
            expected: model of the queries; an index of another model is refused. None accepts any.
            verify: compare the files with their SHA-256, which reads them once. Without it the embeddings are mapped
                and read when they are searched.

        Raises:
            IndexFormatError: if the index is missing, damaged, of an unsupported format, or of another model.
        """
        manifest = _read_manifest(folder)
        version = folder / manifest["version"]
        facts = ModelFacts(**manifest["model"])
        check_model(folder, facts, expected)
        for name, digest in manifest["files"].items():
            if not (version / name).is_file():
                raise IndexFormatError(folder, "damaged", f"{name} is missing. Build the index again.", name)
            if verify and sha256_of(version / name) != digest:
                raise IndexFormatError(
                    folder,
                    "damaged",
                    f"{name} is damaged: its SHA-256 differs from the manifest. Build the index again.",
                    name,
                )
        try:
            with safe_open(version / EMBEDDINGS, framework="pt") as tensors:
                embeddings = tensors.get_tensor("embeddings")
            metadata = pq.read_table(version / METADATA)
        except Exception as error:  # the readers raise many types
            raise IndexFormatError(
                folder, "damaged", f"cannot read the index ({type(error).__name__}). Build the index again."
            ) from error
        shape = (manifest["scans"], manifest["dimension"])
        if embeddings.shape != shape or embeddings.dtype != torch.float16 or len(metadata) != shape[0]:
            raise IndexFormatError(
                folder,
                "damaged",
                f"files do not match the manifest: expected embeddings {shape} torch.float16 and {shape[0]} rows of "
                f"metadata, got {tuple(embeddings.shape)} {embeddings.dtype} and {len(metadata)} rows. "
                "Build the index again.",
            )
        approximate = None
        if manifest["approximate"]:
            settings = ApproximateSettings.from_dict(manifest["approximate"])
            approximate = ApproximateSearch.load(version / APPROXIMATE, embeddings, manifest["files"][EMBEDDINGS])
            if approximate is None:
                approximate = ApproximateSearch.build(embeddings, settings.method, settings.target_recall)
        return cls(embeddings, metadata, facts, approximate)


def check_model(location: object, found: ModelFacts, expected: ModelFacts | None) -> None:
    """Raise IndexFormatError if an index is of another model than expected."""
    if expected is not None and found != expected:
        raise IndexFormatError(
            location,
            "other_model",
            f"embeddings of another model: expected {expected}, got {found}. Build the index again with this model.",
        )


def check_queries(queries: Tensor, dimension: int, patients: Sequence[str] | None) -> None:
    """Raise ValueError unless queries are `(q, dimension)`, with one patient each if patients are given."""
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise ValueError(f"queries do not match the index: expected (q, {dimension}), got {tuple(queries.shape)}.")
    if patients is not None and len(patients) != len(queries):
        raise ValueError(
            f"query_patients does not match queries: expected {len(queries)} patients, got {len(patients)}."
        )


def normalize_to_float16(embeddings: Tensor) -> Tensor:
    """Return embeddings `(n, d)` as float16 of norm 1.

    Raises:
        ValueError: if the shape is wrong, or an embedding is zero or not finite.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings have a wrong shape: expected (n, d), got {tuple(embeddings.shape)}.")
    if not embeddings.isfinite().all():
        raise ValueError("embeddings are not finite: the model's weights may have diverged.")
    normalized = torch.empty(embeddings.shape, dtype=torch.float16)
    for start in range(0, len(embeddings), 65536):
        block = embeddings[start : start + 65536].float()
        norms = block.norm(dim=1, keepdim=True)
        if (norms == 0).any():
            raise ValueError("an embedding is zero and cannot be normalised: remove its scan.")
        normalized[start : start + 65536] = (block / norms).half()
    return normalized


def complete_metadata(metadata: pa.Table, rows: int) -> pa.Table:
    """Return a table with exactly `COLUMNS` in the types of `SCHEMA`; missing columns are filled with empty values.

    Raises:
        ValueError: if the number of rows or a column's type is wrong, or ids are missing or repeated.
    """
    if len(metadata) != rows:
        raise ValueError(f"metadata does not match embeddings: expected {rows} rows, got {len(metadata)}.")
    if "id" not in metadata.column_names:
        raise ValueError(f"metadata has no column id: got {metadata.column_names}.")
    ids = metadata.column("id")
    if ids.null_count or len(pc.unique(ids)) != rows:
        raise ValueError(f"ids must be unique and not null: got {len(pc.unique(ids))} different ids in {rows} rows.")
    for column in COLUMNS:
        if column not in metadata.column_names:
            empty = pa.array([[] if column == "labels" else ""] * rows, SCHEMA.field(column).type)
            metadata = metadata.append_column(column, empty)
    metadata = metadata.select(COLUMNS)
    try:
        return metadata.cast(SCHEMA)  # a column of nulls only has a type of its own, which joins no other
    except pa.ArrowException as error:
        types = dict(zip(COLUMNS, map(str, metadata.schema.types), strict=True))
        raise ValueError(
            f"metadata has wrong column types: expected strings, and lists of strings in labels, got {types}."
        ) from error


def _search_approximately(
    approximate: ApproximateSearch, queries: Tensor, k: int, excluded: list[Tensor] | None
) -> Hits:
    """Search without the excluded rows of each query, which are found first and then left out."""
    if not excluded:
        return approximate.search(queries, k)
    hits = approximate.search(queries, k + max(len(rows) for rows in excluded))
    allowed = torch.stack([~torch.isin(found, rows) for found, rows in zip(hits.rows, excluded, strict=True)])
    order = torch.argsort((~allowed).int(), dim=1, stable=True)[:, :k]  # allowed hits first, in their order
    missing = ~allowed.gather(1, order)
    scores = hits.scores.gather(1, order).masked_fill(missing, -torch.inf)
    return Hits(scores, hits.rows.gather(1, order).masked_fill(missing, -1))


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / CURRENT).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise IndexFormatError(
                folder,
                "unsupported",
                f"unsupported index format: expected {FORMAT}, got {manifest['format']}. "
                "Build the index again, or update m3ret.",
                CURRENT,
            )
        name = manifest["version"]
        if set(manifest["files"]) != {EMBEDDINGS, METADATA} or os.sep in name or ".." in name:
            raise ValueError("unexpected file names")  # never read files outside the folder
        ModelFacts(**manifest["model"])
        if manifest["approximate"]:
            ApproximateSettings.from_dict(manifest["approximate"])
        return manifest
    except OSError as error:
        raise IndexFormatError(folder, "not_found", f"no index found: expected a file {CURRENT}.", CURRENT) from error
    except IndexFormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexFormatError(
            folder, "damaged", f"{CURRENT} is not a valid index manifest. Build the index again.", CURRENT
        ) from error


def _mask(rows: Tensor, size: int) -> Tensor:
    """Return a bool mask `(size,)` that is true for these rows."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[rows] = True
    return mask


def _positions(ascending: Tensor, wanted: Tensor) -> Tensor:
    """Return the positions in an ascending list of those wanted values that it contains."""
    if not len(ascending):
        return wanted[:0]
    positions = torch.searchsorted(ascending, wanted).clamp(max=len(ascending) - 1)
    return positions[ascending[positions] == wanted]
