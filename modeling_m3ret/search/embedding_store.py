"""Cached embeddings: computed in shards by one or several processes, and resumed after an interruption.

A collection is embedded in shards of consecutive records. A shard is one safetensors file, written atomically. The
name of a cache folder is a hash of all that determines the embeddings: weights, configuration, processor, precision and
records. So embeddings are found again under any name of the checkpoint, and never confused with another model's.

No file in the cache holds a name, a path or an id of a scan: rows are indices into the caller's list of records, and an
unreadable scan has no row. Delete `HF_HOME/m3ret/embeddings` to clear the cache.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save
from tqdm.auto import tqdm

from ..atomic_io import atomic_write
from ..configuration_m3ret import M3RetConfig
from ..data.collection import Record
from ..data.parquet import ParquetRow
from ..hub import CACHE_FOLDER
from ..image_processing_m3ret import M3RetImageProcessor
from ..model_facts import model_facts
from ..modeling_m3ret import M3RetModel
from .embedding import MAX_TOKENS, Embedded, Embedder, embed_records, encoder_embedder, pooled_embedder


logger = logging.getLogger(__name__)

FORMAT = 3  # of the shard files, and of what is read from a scan; part of the cache key
SHARD_SCANS = 512  # scans that are embedded again after an interruption: some minutes of CTs on a CPU


def embed_collection(
    model: M3RetModel,
    processor: M3RetImageProcessor,
    records: Sequence[Record],
    accelerator: Accelerator,
    *,
    name: str,
    folder: Path | None = None,
    dtype: torch.dtype = torch.float32,
    max_tokens: int = MAX_TOKENS,
    num_workers: int = 0,
    pooled: bool = False,
) -> Embedded:
    """Embed all readable records, in order, or read the embeddings from the cache.

    All processes must call it together; each embeds a part of the shards, and all return the same.

    Args:
        model: encoder in evaluation mode, on its device.
        folder: of the cache; by default `HF_HOME/m3ret/embeddings`.
        dtype: bfloat16 runs the encoder under autocast, which is faster on hardware that supports it.
        max_tokens, num_workers: as for `embed_records`.
        pooled: return pooled features `(n, pooled_size)`, neither whitened nor normalised, for fitting a whitening.
    """
    facts = asdict(model_facts(model, processor, name))
    del facts["model"]
    key = cache_key(
        **facts,
        # two poolings, or two numbers of heads, have weights of the same shapes and, untrained, of the same values
        config={field: getattr(model.config, field) for field in M3RetConfig.__annotations__},
        records=fingerprint(records),
        dtype=str(dtype),
        shard=SHARD_SCANS,
        pooled=pooled,
    )
    folder = (folder or CACHE_FOLDER / "embeddings") / key
    embedder = pooled_embedder(model) if pooled else encoder_embedder(model)
    start = time.perf_counter()
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        embedded = write_shards(
            {"embeddings": embedder},
            processor,
            records,
            folder,
            SHARD_SCANS,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            max_tokens=max_tokens,
            num_workers=num_workers,
            progress=accelerator.is_main_process,
        )
    if embedded:
        rate = embedded / (time.perf_counter() - start)
        accelerator.print(f"embedded {embedded:,} scans per process, {rate:.1f} scans/s")
    accelerator.wait_for_everyone()
    return read_shards(["embeddings"], records, folder, SHARD_SCANS)["embeddings"]


def cache_key(**parts: object) -> str:
    """Return the name of a cache folder: a hash of JSON-serialisable values and of the file format."""
    serialized = json.dumps({**parts, "format": FORMAT}, sort_keys=True)
    return hashlib.sha256(serialized.encode()).hexdigest()[:24]


def fingerprint(records: Sequence[Record]) -> str:
    """Return a hash of the records' ids and contents: size and modification time of files, shard and row of rows."""
    digest = hashlib.sha256()
    state = functools.cache(_file_state)  # a shard holds many records
    for record in records:
        location = record.location
        if isinstance(location, ParquetRow):
            shard = location.shard if "://" in location.shard else state(Path(location.shard))
            content = f"{shard} {location.group} {location.row}"
        else:
            content = state(location)
        content += f" {record.intensity}" if record.intensity else ""
        digest.update(f"{record.id}\0{content}\n".encode())
    return digest.hexdigest()


def _file_state(path: Path) -> str:
    try:
        state = path.stat()
    except OSError:  # the scan will be counted as unreadable
        return f"{path} missing"
    return f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"


def write_shards(
    embedders: Mapping[str, Embedder],
    processor: M3RetImageProcessor,
    records: Sequence[Record],
    folder: Path,
    shard_scans: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    max_tokens: int = MAX_TOKENS,
    num_workers: int = 0,
    description: str = "embedding",
    progress: bool = True,
    log_failures: bool = True,
) -> int:
    """Embed those shards of a collection that are not in the folder yet.

    Args:
        embedders: by name; they share each decode.
        folder: of the shards; created if needed.
        rank: index of this process; it embeds every `world_size`-th shard.
        max_tokens, num_workers: as for `embed_records`.
        description: title of the progress bar.
        log_failures: log why a scan cannot be read, with its path. Not for logs that others read.

    Returns:
        The number of scans that this call embedded or could not read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(records, shard_scans)[rank::world_size]
    missing = [shard for shard in shards if not _shard_path(folder, shard).is_file()]
    total, remaining = sum(map(len, shards)), sum(map(len, missing))
    hidden = not (progress and missing)
    with tqdm(total=total, initial=total - remaining, desc=description, unit="scan", disable=hidden) as bar:
        for shard in missing:
            scans = [records[index] for index in shard]
            embedded = embed_records(
                list(embedders.values()), processor, scans, max_tokens=max_tokens, num_workers=num_workers, bar=bar
            )
            for failure in embedded[0].failures if log_failures else ():
                logger.warning("cannot read a scan: %s", failure)
            index_of = {record.id: index for record, index in zip(scans, shard, strict=True)}
            tensors = {name: one.embeddings.contiguous() for name, one in zip(embedders, embedded, strict=True)}
            # the index of each row's record
            tensors["rows"] = torch.tensor([index_of[record.id] for record in embedded[0].records], dtype=torch.int64)
            with atomic_write(_shard_path(folder, shard)) as stream:
                stream.write(save(tensors))
    return remaining


def read_shards(names: Sequence[str], records: Sequence[Record], folder: Path, shard_scans: int) -> dict[str, Embedded]:
    """Read all shards of a collection, as `write_shards` wrote them.

    Returns:
        For each embedder the embeddings of the readable records, in order, and a line for each record that is not
        readable.
    """
    tensors = [load_file(_shard_path(folder, shard)) for shard in _shards(records, shard_scans)]
    rows = [row for shard in tensors for row in shard["rows"].tolist()]
    readable = set(rows)
    failures = [f"{record.id}: cannot be read" for row, record in enumerate(records) if row not in readable]
    filled = [shard for shard in tensors if len(shard["rows"])]
    found = [records[row] for row in rows]
    return {
        name: Embedded(torch.cat([shard[name] for shard in filled]) if filled else torch.empty(0, 0), found, failures)
        for name in names
    }


def _shards(records: Sequence[Record], shard_scans: int) -> list[range]:
    return [range(start, min(start + shard_scans, len(records))) for start in range(0, len(records), shard_scans)]


def _shard_path(folder: Path, shard: range) -> Path:
    return folder / f"{shard.start:09d}.safetensors"
