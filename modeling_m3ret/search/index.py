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
from dataclasses import asdict, dataclass
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
from ..data.schema import require_words
from ..errors import InputError
from ..model_facts import ModelFacts, sha256_of
from .approximate import BLOCK_ROWS, TARGET_RECALL, ApproximateSearch, ApproximateSettings, Method
from .exact import Hits, check_queries, search_exactly
from .filters import FILTER_COLUMNS, MetadataFilter, StringColumn


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


class IndexFormatError(InputError):
    """An index cannot be used.

    Attributes:
        location: folder of the index, or name of the collection.
        reason: kind of failure. "damaged" indices break their own format; "unsupported" ones are of another version or
            another program; "unfinished" ones were not built to their end.
        file: name of the missing or damaged file, if it is one file.
    """

    def __init__(
        self,
        location: object,
        reason: Literal["not_found", "damaged", "unsupported", "unfinished", "other_model"],
        details: str,
        file: str | None = None,
    ):
        super().__init__(f"{location}: {details}")
        self.location, self.reason, self.file = str(location), reason, file


@dataclass
class RetrievalIndex:
    """A gallery that can be searched. Create it with `build` or `load`."""

    embeddings: Tensor  # (n, d) float16 of norm 1, possibly memory-mapped
    metadata: pa.Table  # COLUMNS, one row per scan
    facts: ModelFacts  # model that made the embeddings
    approximate: ApproximateSearch | None = None  # used by searches without a filter, if present

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
            method: "auto" is exact up to a million scans and rabitq above.
            target_recall: recall@10 that an approximate search is tuned to.

        Raises:
            InputError: if the sizes do not match, ids are missing or repeated, or an embedding is zero or not finite.
        """
        gallery, metadata = prepare_gallery(embeddings, metadata)
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
            InputError: if the shapes do not match, a query is zero or not finite, or k is not positive.
        """
        check_queries(queries, self.embeddings.shape[1], k, query_patients)
        queries = torch.nn.functional.normalize(queries.float(), dim=-1)
        excluded = None
        if query_patients is not None:
            patients = self._columns["patient"]
            excluded = [_nonzero(patients.is_in([patient] if patient else [])) for patient in query_patients]
        if where is None:
            if self.approximate is not None:
                return self.approximate.search(queries, k, excluded)
            return search_exactly(self.embeddings, queries, k, excluded)
        mask = where.mask(self._columns)
        if np.count_nonzero(mask) > MAX_COPIED_FRACTION * len(self):
            return search_exactly(self.embeddings, queries, k, excluded, torch.from_numpy(mask))
        rows = _nonzero(mask)
        # numpy's take copies whole rows, in half the time of indexing a tensor
        copied = torch.from_numpy(self.embeddings.numpy().take(rows, axis=0))
        if excluded is not None:
            excluded = [torch.isin(rows, left_out).nonzero().flatten() for left_out in excluded]
        hits = search_exactly(copied, queries, k, excluded)
        return Hits(hits.scores, torch.cat([rows, torch.tensor([-1])])[hits.rows])  # -1, no hit, stays -1

    def lookup(self, rows: Tensor) -> list[dict[str, Any]]:
        """Return the metadata of rows that a search found; rows of -1 are skipped."""
        return self.metadata.take(pa.array(rows[rows >= 0].flatten().tolist(), pa.int64())).to_pylist()

    @cached_property
    def _columns(self) -> dict[str, StringColumn]:
        return {name: StringColumn(self.metadata.column(name)) for name in ("patient", *FILTER_COLUMNS)}

    # ---- changes ----------------------------------------------------------------------------------------------------

    def add(self, embeddings: Tensor, metadata: pa.Table) -> RetrievalIndex:
        """Return a new index with further scans. An approximate index is not retrained, but tuned again.

        Arguments and errors are those of `build`; an id that is in the index already is an InputError.
        """
        added, metadata = prepare_gallery(embeddings, metadata, self.embeddings.shape[1])
        gallery = torch.cat([self.embeddings, added])
        metadata = complete_metadata(pa.concat_tables([self.metadata, metadata]), len(gallery))
        approximate = self.approximate.extend(gallery) if self.approximate else None
        return RetrievalIndex(gallery, metadata, self.facts, approximate)

    def remove(self, ids: Collection[str]) -> RetrievalIndex:
        """Return a new index without these scans; unknown ids are ignored. An approximate index is built again."""
        removed = pa.array(sorted(require_words("ids", ids)), pa.string())
        remaining = ~np.asarray(pc.is_in(self.metadata.column("id"), value_set=removed))
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
        try:
            manifest = self._write_version(version)
        except BaseException:  # such as a full disk
            shutil.rmtree(version, ignore_errors=True)
            raise
        older = [path for path in folder.glob("version-*") if path != version]
        atomic_write_text(folder / CURRENT, json.dumps(manifest, indent=2) + "\n")
        for path in older:
            shutil.rmtree(path, ignore_errors=True)

    def _write_version(self, version: Path) -> dict[str, Any]:
        """Write the files of a version into its folder, and return the manifest."""
        save_file({"embeddings": self.embeddings.contiguous()}, version / EMBEDDINGS)
        pq.write_table(self.metadata, version / METADATA, compression="zstd")
        files = {}
        for name in (EMBEDDINGS, METADATA):
            sync(version / name)
            files[name] = sha256_of(version / name)
        if self.approximate is not None:
            self.approximate.save(version / APPROXIMATE, files[EMBEDDINGS])
        sync(version)
        return {
            "format": FORMAT,
            "version": version.name,
            "scans": len(self),
            "dimension": self.embeddings.shape[1],
            "model": asdict(self.facts),
            "files": files,
            "approximate": self.approximate.settings.to_dict() if self.approximate else None,
        }

    @classmethod
    def load(cls, folder: Path, expected: ModelFacts | None = None, *, verify: bool = True) -> RetrievalIndex:
        """Load the current version of an index.

        Args:
            folder: as given to `save`.
            expected: model of the queries; an index of another model is refused. None accepts any.
            verify: compare the files with their SHA-256 and check that embeddings are finite, which reads them once.
                Without it the embeddings are mapped and read when they are searched.

        Raises:
            IndexFormatError: if the index is missing, damaged, of an unsupported format, or of another model.
        """
        manifest = _read_manifest(folder)
        version, files = folder / manifest["version"], manifest["files"]
        facts = ModelFacts(**manifest["model"])
        check_model(folder, facts, expected)
        for name, digest in files.items():
            if not (version / name).is_file():
                raise damaged(folder, f"{name} is missing.", name)
            if verify and sha256_of(version / name) != digest:
                raise damaged(folder, f"{name} is damaged: its SHA-256 differs from the manifest.", name)
        try:
            with safe_open(version / EMBEDDINGS, framework="pt") as tensors:
                embeddings = tensors.get_tensor("embeddings")
            metadata = pq.read_table(version / METADATA)
        except Exception as error:  # the readers raise many types
            raise damaged(folder, f"cannot read the index ({type(error).__name__}).") from error
        shape = (manifest["scans"], manifest["dimension"])
        matches = embeddings.shape == shape and embeddings.dtype == torch.float16 and len(metadata) == shape[0]
        if not matches or metadata.schema != SCHEMA:
            raise damaged(
                folder,
                f"files do not match the manifest: expected embeddings {shape} torch.float16 and {shape[0]} rows of "
                f"metadata, got {tuple(embeddings.shape)} {embeddings.dtype} and {len(metadata)} rows with the columns "
                f"{metadata.schema.names}.",
            )
        if verify and not all(block.isfinite().all() for block in embeddings.split(BLOCK_ROWS)):
            raise damaged(folder, f"{EMBEDDINGS} holds values that are not finite.", EMBEDDINGS)
        approximate = None
        if manifest["approximate"]:
            settings = ApproximateSettings.from_dict(manifest["approximate"])
            approximate = ApproximateSearch.load(version / APPROXIMATE, embeddings, files[EMBEDDINGS], settings)
        return cls(embeddings, metadata, facts, approximate)


def check_format(location: object, found: object, file: str | None = None) -> None:
    """Raise IndexFormatError if the format of an index is not supported."""
    if found != FORMAT:
        details = f"unsupported index format: expected {FORMAT}, got {found}. Build the index again, or update m3ret."
        raise IndexFormatError(location, "unsupported", details, file)


def check_model(location: object, found: ModelFacts, expected: ModelFacts | None) -> None:
    """Raise IndexFormatError if an index is of another model than expected."""
    if expected is not None and found != expected:
        details = (
            f"embeddings of another model: expected {expected}, got {found}. Build the index again with this model."
        )
        raise IndexFormatError(location, "other_model", details)


def prepare_gallery(embeddings: Tensor, metadata: pa.Table, dimension: int | None = None) -> tuple[Tensor, pa.Table]:
    """Return embeddings as float16 of norm 1 with their complete metadata.

    Raises:
        InputError: if they do not match each other or the dimension of an index, or cannot be searched.
    """
    gallery = normalize_to_float16(embeddings)
    if dimension not in (None, gallery.shape[1]):
        raise InputError(f"embeddings do not match: expected (n, {dimension}), got {tuple(gallery.shape)}.")
    return gallery, complete_metadata(metadata, len(gallery))


def normalize_to_float16(embeddings: Tensor) -> Tensor:
    """Return embeddings `(n, d)` as float16 of norm 1.

    Raises:
        InputError: if the shape is wrong, or an embedding is zero or not finite.
    """
    if embeddings.ndim != 2:
        raise InputError(f"embeddings have a wrong shape: expected (n, d), got {tuple(embeddings.shape)}.")
    if not embeddings.isfinite().all():
        raise InputError("embeddings are not finite: expected finite values, got NaN or infinity. Check the weights.")
    normalized = torch.empty(embeddings.shape, dtype=torch.float16)
    for start in range(0, len(embeddings), 65536):
        block = embeddings[start : start + 65536].float()
        norms = block.norm(dim=1, keepdim=True)
        if (norms == 0).any():
            raise InputError("an embedding cannot be normalised: expected a norm above 0, got 0. Remove its scan.")
        normalized[start : start + 65536] = (block / norms).half()
    return normalized


def complete_metadata(metadata: pa.Table, rows: int) -> pa.Table:
    """Return a table with exactly `COLUMNS` in the types of `SCHEMA`; missing columns are filled with empty values.

    Raises:
        InputError: if the number of rows or a column's type is wrong, or ids are missing or repeated.
    """
    if len(metadata) != rows:
        raise InputError(f"metadata does not match embeddings: expected {rows} rows, got {len(metadata)}.")
    if "id" not in metadata.column_names:
        raise InputError(f"metadata is incomplete: expected a column id, got {metadata.column_names}.")
    ids = metadata.column("id")
    if ids.null_count or len(pc.unique(ids)) != rows:
        got = f"{len(pc.unique(ids.drop_null()))} and {ids.null_count} nulls"
        raise InputError(f"ids repeat or are null: expected {rows} different ids, got {got}.")
    for column in COLUMNS:
        if column not in metadata.column_names:
            empty = pa.array([[] if column == "labels" else ""] * rows, SCHEMA.field(column).type)
            metadata = metadata.append_column(column, empty)
    metadata = metadata.select(COLUMNS)
    try:
        return metadata.cast(SCHEMA)  # a column of nulls only has a type of its own, which joins no other
    except pa.ArrowException as error:
        types = dict(zip(COLUMNS, map(str, metadata.schema.types), strict=True))
        raise InputError(
            f"metadata has wrong column types: expected strings, and lists of strings in labels, got {types}."
        ) from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / CURRENT).read_text(encoding="utf-8"))
        check_format(folder, manifest["format"], CURRENT)
        name = manifest["version"]
        if manifest["files"].keys() != {EMBEDDINGS, METADATA} or os.sep in name or ".." in name:
            raise ValueError("unexpected file names")  # never read files outside the folder
        if not all(type(manifest[key]) is int and manifest[key] >= 0 for key in ("scans", "dimension")):
            raise ValueError("unexpected sizes")
        texts = (name, *manifest["files"].values(), *asdict(ModelFacts(**manifest["model"])).values())
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("unexpected types")
        if manifest["approximate"]:
            ApproximateSettings.from_dict(manifest["approximate"])
        return manifest
    except OSError as error:
        raise IndexFormatError(folder, "not_found", f"no index found: expected a file {CURRENT}.", CURRENT) from error
    except IndexFormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(folder, f"{CURRENT} is not a valid index manifest.", CURRENT) from error


def damaged(folder: Path, details: str, file: str | None = None) -> IndexFormatError:
    """Return the error of a damaged index."""
    return IndexFormatError(folder, "damaged", f"{details} Build the index again.", file)


def _nonzero(mask: np.ndarray) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask))
