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
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from ..atomic_io import atomic_write
from ..configuration_m3ret import M3RetConfig
from ..data.collection import Record
from ..data.parquet import ParquetRow
from ..hub import CACHE_FOLDER
from ..image_processing_m3ret import M3RetImageProcessor
from ..model_facts import model_facts
from ..modeling_m3ret import M3RetModel
from .embedding import MAX_TOKENS, BatchEmbedder, Embedded, embed_batches, encoder_embedder, pooled_embedder


logger = logging.getLogger(__name__)

FORMAT = 3  # of the shard files, and of what is read from a scan; part of the cache key
# Scans that are embedded again after an interruption, and the unit in which processes share the work: a minute of CTs
# on a CPU. A shard of a ViT-B has 200 kB.
SHARD_SCANS = 64


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
    bar: Any = None,
) -> Embedded:
    """Embed all readable records with an encoder, see `embed_cached`.

    Args:
        model: encoder in evaluation mode, on its device.
        dtype: bfloat16 runs the encoder under autocast, which is faster on hardware that supports it.
        max_tokens, num_workers: as for `embed_batches`.
        pooled: return pooled features `(n, pooled_size)`, neither whitened nor normalised, for fitting a whitening.
    """
    facts = asdict(model_facts(model, processor, name))
    del facts["model"]
    identity = {
        **facts,
        # two poolings, or two numbers of heads, have weights of the same shapes and, untrained, of the same values
        "config": {field: getattr(model.config, field) for field in M3RetConfig.__annotations__},
        "dtype": str(dtype),
        "pooled": pooled,
    }
    embedder = pooled_embedder(model) if pooled else encoder_embedder(model)
    embed = partial(embed_batches, [embedder], processor, max_tokens=max_tokens, num_workers=num_workers)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return embed_cached(embed, records, accelerator, identity, folder=folder, bar=bar)


def embed_cached(
    embed: BatchEmbedder,
    records: Sequence[Record],
    accelerator: Accelerator,
    identity: Mapping[str, object],
    *,
    folder: Path | None = None,
    bar: Any = None,
) -> Embedded:
    """Embed all readable records, in order, or read the embeddings from the cache.

    All processes must call it together; each embeds a part of the shards, and all return the same.

    Args:
        embed: of one embedder.
        identity: JSON-serialisable description of all that determines the embedding of a scan.
        folder: of the cache; by default `HF_HOME/m3ret/embeddings`.
        bar: tqdm bar to advance by the number of records, instead of showing one.
    """
    key = cache_key(**identity, records=fingerprint(records), shard=SHARD_SCANS)
    folder = (folder or CACHE_FOLDER / "embeddings") / key
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    if bar is None:
        bar = tqdm(total=len(records), desc="embedding", unit="scan", disable=not accelerator.is_main_process)
    else:
        bar = nullcontext(bar)  # its owner closes it
    with bar as shown:
        done = shown.n
        write_shards(["embeddings"], embed, records, folder, SHARD_SCANS, bar=shown, **ranks)
        accelerator.wait_for_everyone()
        shown.update(done + len(records) - shown.n)  # shards that other processes finished since
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
            files = location if isinstance(location, tuple) else (location,)
            content = "\0".join(map(state, files))
        content += f" {record.intensity}" if record.intensity else ""
        digest.update(f"{record.id}\0{content}\n".encode(errors="surrogateescape"))  # file names may not be UTF-8
    return digest.hexdigest()


def _file_state(path: Path) -> str:
    try:
        state = path.stat()
    except OSError:  # the scan will be counted as unreadable
        return f"{path} missing"
    return f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"


def write_shards(
    names: Sequence[str],
    embed: BatchEmbedder,
    records: Sequence[Record],
    folder: Path,
    shard_scans: int,
    *,
    bar: Any,
    rank: int = 0,
    world_size: int = 1,
    log_failures: bool = True,
) -> None:
    """Embed those shards of a collection that are not in the folder yet.

    Args:
        names: of the embedders.
        folder: of the shards; created if needed.
        bar: tqdm bar to advance, also by shards that are in the folder already or that other processes finish.
        rank: index of this process; it embeds every `world_size`-th shard.
        log_failures: log why a scan cannot be read, with its file name. Not for logs that others read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = _missing(folder, _shards(records, shard_scans))
    own = deque(shard for shard in missing if shard.start // shard_scans % world_size == rank)
    others = [shard for shard in missing if shard not in own]
    bar.update(len(records) - sum(map(len, missing)))
    todo = [row for shard in own for row in shard]
    rows: list[int] = []  # embedded, but not written yet
    vectors: list[list[Tensor]] = [[] for _ in names]
    seen = 0
    for batch in embed([records[row] for row in todo]) if todo else ():
        bar.update(len(batch))
        for _, failure in batch.failures if log_failures else ():
            logger.warning("cannot read a scan: %s", failure)
        rows += [todo[row] for row in batch.rows]
        for waiting, part in zip(vectors, batch.vectors, strict=bool(batch.rows)):
            waiting.append(part)
        seen += len(batch)
        while own and todo[seen - 1] >= own[0].stop - 1:
            shard = own.popleft()
            count = bisect_left(rows, shard.stop)
            joined = [torch.cat(waiting) if waiting else torch.empty(0, 0) for waiting in vectors]
            tensors = {name: values[:count].clone() for name, values in zip(names, joined, strict=True)}
            # the index of each row's record
            tensors["rows"] = torch.tensor(rows[:count], dtype=torch.int64)
            with atomic_write(_shard_path(folder, shard)) as stream:
                stream.write(save(tensors))
            rows = rows[count:]
            vectors = [[values[count:]] if rows else [] for values in joined]
            unfinished = _missing(folder, others)
            bar.update(sum(map(len, others)) - sum(map(len, unfinished)))
            others = unfinished


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


def _missing(folder: Path, shards: Sequence[range]) -> list[range]:
    present = {path.name for path in folder.iterdir()} if shards else set()
    return [shard for shard in shards if _shard_path(folder, shard).name not in present]


def _shard_path(folder: Path, shard: range) -> Path:
    return folder / f"{shard.start:09d}.safetensors"
