"""Embeddings as a Parquet file: one row per scan, and the model that made them in the metadata of the schema.

| column | type | content |
|---|---|---|
| `id`, `patient` | string | pseudonyms; a scan of an unknown patient has a patient of its own |
| `modality`, `anatomy`, `source`, `split` | string | as the collection states them, or empty |
| `labels` | list of strings | as the collection states them |
| `vector` | list of d float32 | the embedding, L2-normalised |

The key `m3ret` of the schema's metadata holds JSON with `format` and `model`, the `ModelFacts`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..atomic_io import atomic_write
from ..errors import InputError
from ..model_facts import ModelFacts
from .index import SCHEMA


FORMAT = 1
KEY = b"m3ret"
VECTOR = "vector"
ROW_GROUP_ROWS = 65_536  # of 768 float32 values: 200 MB, which a reader holds at once


def write_embeddings(path: Path, embeddings: Tensor, metadata: pa.Table, facts: ModelFacts) -> None:
    """Write a Parquet file of embeddings `(n, d)` float32 with one row of metadata each, atomically."""
    flat = pa.array(embeddings.float().contiguous().numpy().reshape(-1))
    table = metadata.append_column(VECTOR, pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1]))
    about = {"format": FORMAT, "model": asdict(facts)}
    table = table.replace_schema_metadata({KEY: json.dumps(about)})
    with atomic_write(path) as stream:
        pq.write_table(table, stream, ROW_GROUP_ROWS, compression="zstd", use_dictionary=metadata.column_names)


def read_embeddings(paths: Sequence[Path]) -> tuple[Tensor, pa.Table, ModelFacts]:
    """Return embeddings `(n, d)` float32, the columns of an index, and the model of one or several files.

    Raises:
        InputError: if a file is missing, was not written by `write_embeddings`, or is of another model than the first.
    """
    vectors, tables, first = [], [], None
    for path in paths:
        table, facts = _read(path)
        first = first or facts
        if facts != first:
            raise InputError(f"{path}: expected embeddings of {first}, as in {paths[0]}, got {facts}.")
        column = table.column(VECTOR).combine_chunks()
        vectors.append(column.flatten().to_numpy().reshape(len(table), column.type.list_size))
        tables.append(table.select(SCHEMA.names).cast(SCHEMA))
    if first is None:
        raise InputError("expected at least one file of embeddings, got none.")
    return torch.from_numpy(np.concatenate(vectors)), pa.concat_tables(tables), first


def _read(path: Path) -> tuple[pa.Table, ModelFacts]:
    expected = f"{path}: expected a Parquet file of `m3ret embed`"
    if not path.is_file():
        raise InputError(f"{expected}, got no such file.")
    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[KEY])
        if about["format"] != FORMAT:
            raise InputError(f"{expected} of format {FORMAT}, got {about['format']}. Write it again, or update m3ret.")
        vector = table.schema.field(VECTOR).type
        is_vector = pa.types.is_fixed_size_list(vector) and vector.value_type == pa.float32()
        if not is_vector or any(table.schema.field(field.name).type != field.type for field in SCHEMA):
            raise TypeError
        if table.column(VECTOR).null_count:
            raise ValueError
        return table, ModelFacts(**about["model"])
    except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{expected}, got another or a damaged file.") from error
