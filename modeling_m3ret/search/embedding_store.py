"""Embeddings of a large collection: by several processes, kept on disk, and gone on with where a run was cut.

A collection is embedded in shards of neighbouring records; each is a file that is whole or not there. The folder's name
follows from the weights (the whitening among them), the configuration, the processor, the precision and the records, so
that what was embedded once is found again, whatever the checkpoint is called, and never taken for another model's.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save

from ..atomic_io import atomic_write
from ..configuration_m3ret import M3RetConfig
from ..data.collection import Record
from ..data.parquet import ParquetRow
from ..hub import CACHE_FOLDER
from ..image_processing_m3ret import M3RetImageProcessor
from ..model_facts import model_facts
from ..modeling_m3ret import M3RetModel
from .embedding import MAX_TOKENS, Embedded, embed_records, encoder_embedder, pooled_embedder


SHARD_SCANS = 512  # some minutes of CTs on a CPU are the most that is done twice after an interruption


def fingerprint(records: Sequence[Record]) -> str:
    """Of which scans, and of which bytes: files by their size and time of change, rows by their shard."""
    digest = hashlib.sha256()
    shards: dict[str, str] = {}
    for record in records:
        if isinstance(record.location, ParquetRow):
            shard = record.location.shard
            if shard not in shards:
                shards[shard] = shard if "://" in shard else _state_of(Path(shard))
            where = f"{shards[shard]} {record.location.group} {record.location.row}"
        else:
            where = _state_of(record.location)
        digest.update(f"{record.id}\0{where}\n".encode())
    return digest.hexdigest()


def _state_of(path: Path) -> str:
    try:
        facts = path.stat()
        return f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    except OSError:  # it will be counted as unreadable
        return f"{path} missing"


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
    """Embeddings of all records that can be read, in order, the same on every process; all of them call at once.

    Args:
        model: in evaluation, on its device. name: of the checkpoint. folder: where embeddings are kept, by default
            `HF_HOME/m3ret/embeddings`. dtype: of the encoder's arithmetic; bfloat16 is faster where there is hardware.
        pooled: in place of embeddings the pooled features `(n, pooled)`, neither whitened nor normalised, which a
            whitening is fitted to.
    """
    facts = model_facts(model, processor, name)
    told = {
        "weights": facts.revision,
        # two poolings, or two numbers of heads, have weights of the same shapes: of one seed, untrained, the same ones
        "config": {key: getattr(model.config, key) for key in M3RetConfig.__annotations__},
        "processor": facts.processor,
        "records": fingerprint(records),
        "dtype": str(dtype),
        "shard": SHARD_SCANS,
        "pooled": pooled,
    }
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]
    folder = (folder or CACHE_FOLDER / "embeddings") / key
    folder.mkdir(parents=True, exist_ok=True)
    shards = [
        list(range(start, min(start + SHARD_SCANS, len(records)))) for start in range(0, len(records), SHARD_SCANS)
    ]
    own = shards[accelerator.process_index :: accelerator.num_processes]
    places = [shard_place(folder, shard) for shard in own]
    started, scans = time.perf_counter(), 0
    for shard, place in zip(own, places, strict=True):
        if place.is_file():
            continue
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            embedded = embed_records(
                [pooled_embedder(model) if pooled else encoder_embedder(model)],
                processor,
                [records[index] for index in shard],
                max_tokens=max_tokens,
                num_workers=num_workers,
                progress=accelerator.is_main_process,
            )[0]
        write_shard(place, shard, embedded, records)
        scans += len(shard)
    if scans:
        accelerator.print(
            f"{scans} scans embedded by each process, {scans / (time.perf_counter() - started):.1f} a second"
        )
    accelerator.wait_for_everyone()
    parts = [read_shard(folder, shard, records) for shard in shards]
    embeddings = [part.embeddings for part in parts if len(part.records)]
    return Embedded(
        torch.cat(embeddings) if embeddings else torch.empty(0, 0),
        [record for part in parts for record in part.records],
        [failure for part in parts for failure in part.failures],
    )


def shard_place(folder: Path, shard: Sequence[int]) -> Path:
    return folder / f"{shard[0]:09d}.safetensors"


def write_shard(place: Path, shard: Sequence[int], embedded: Embedded, records: Sequence[Record]) -> None:
    index_of = {records[index].id: index for index in shard}
    rows = torch.tensor([index_of[record.id] for record in embedded.records], dtype=torch.int64)
    content = save(
        {"embeddings": embedded.embeddings.contiguous(), "rows": rows}, {"failures": json.dumps(embedded.failures)}
    )
    with atomic_write(place) as stream:
        stream.write(content)


def read_shard(folder: Path, shard: Sequence[int], records: Sequence[Record]) -> Embedded:
    with safe_open(shard_place(folder, shard), framework="pt") as content:
        rows = content.get_tensor("rows").tolist()
        failures = json.loads(content.metadata()["failures"])
        return Embedded(content.get_tensor("embeddings"), [records[row] for row in rows], failures)
