"""The gallery that is searched: an index, a small picture of each scan, and where the scans lie, if they do.

It is embedded once and kept under `HF_HOME/m3ret/galleries`, in a folder whose name follows from the model and the
scans; when that is interrupted, the next start goes on with it. The index calls a scan by its place in the collection
and a patient by the place of the first scan, so that no name of a file or a person is in it. Visitors are told a scan's
row, and nothing else by which it could be found.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..atomic_io import atomic_write
from ..data.collection import Record, open_collection
from ..data.schema import CollectionError
from ..hub import CACHE_FOLDER
from ..image_processing_m3ret import M3RetImageProcessor
from ..model_facts import ModelFacts, model_facts
from ..modeling_m3ret import M3RetModel
from ..search.embedding import Embedded, embed_records, encoder_embedder
from ..search.embedding_store import fingerprint, read_shard, shard_place, write_shard
from ..search.exact import Hits
from ..search.index import IndexFormatError, MetadataFilter, RetrievalIndex
from ..search.thumbnails import THUMBNAIL_SIZE, thumbnail_embedder, to_image


DEMO = "phantom:48:1"  # six subjects a class; another seed than the phantom of training, so that no scan is known
PUBLISHED = "gallery"  # the folder of a Space
ABOUT = "gallery.json"
THUMBNAILS = "thumbnails.parquet"
SHARD_SCANS = 32  # half a minute of CTs on two cores is the most that is done twice after an interruption
# real scans of the package pydicom-data whose pixels name nobody: modality and anatomy, as one sees them
SAMPLES = {
    "RG1_UNCR.dcm": ("xray", "chest"),
    "RG3_UNCR.dcm": ("xray", "leg"),
    "JPGLosslessP14SV1_1s_1f_8b.dcm": ("ultrasound", "heart"),
    "color3d_jpeg_baseline.dcm": ("ultrasound", "heart"),
    "693_UNCR.dcm": ("ct", "head"),
    "eCT_Supplemental.dcm": ("ct", "head"),
    "MR2_UNCR.dcm": ("mri", "shoulder"),
    "MR-SIEMENS-DICOM-WithOverlays.dcm": ("mri", "abdomen"),
}


class Facts(TypedDict):
    """What may be shown of a scan."""

    modality: str
    anatomy: str
    labels: list[str]
    source: str


@dataclass
class Gallery:
    """records: of each row of the index; None where only embeddings are here. thumbnails: WebP of each row, or None.
    collection: a name by which the records can be opened elsewhere, None where they can't."""

    index: RetrievalIndex
    records: Sequence[Record] | None = None
    thumbnails: pa.ChunkedArray | None = None
    collection: str | None = None

    def __len__(self) -> int:
        return len(self.index)

    def facts(self, row: int) -> Facts:
        (told,) = self.index.metadata.slice(row, 1).to_pylist()
        return Facts(
            modality=told["modality"] or "",
            anatomy=told["anatomy"] or "",
            labels=told["labels"] or [],
            source=told["source"] or "",
        )

    def thumbnail(self, row: int) -> Image.Image | None:
        if self.thumbnails is None:
            return None
        with Image.open(io.BytesIO(self.thumbnails[row].as_py()), formats=["WEBP"]) as image:
            return image.convert("RGB")

    def names(self, column: str) -> list[str]:
        """Those that a column of the metadata holds, in order, without the empty one."""
        return sorted(name for name in set(self.index.metadata.column(column).to_pylist()) if name)

    def search(
        self,
        embedding: Tensor,
        k: int,
        where: MetadataFilter | None = None,
        *,
        query_row: int | None = None,
        exclude_same_patient: bool = False,
    ) -> Hits:
        """Return the k most similar scans of one embedding.

        Args:
            embedding: `(d,)`.
            k: number of hits.
            where: only scans that match this filter are found.
            query_row: row of the query, if it is a scan of this gallery. It is not a hit of itself.
            exclude_same_patient: leave out other scans of the query's patient, which only `query_row` tells.
        """
        patients = None
        if exclude_same_patient and query_row is not None:
            patients = [self.index.metadata.column("patient")[query_row].as_py() or ""]
        count = k + (query_row is not None)
        hits = self.index.search(embedding[None], count, where=where, query_patients=patients)
        found = hits.rows[0] >= 0
        if query_row is not None:
            found &= hits.rows[0] != query_row
        return Hits(hits.scores[:, found][:, :k], hits.rows[:, found][:, :k])

    def save(self, folder: Path) -> None:
        self.index.save(folder)
        if self.thumbnails is not None:
            with atomic_write(folder / THUMBNAILS) as stream:
                pq.write_table(pa.table({"webp": self.thumbnails}), stream, compression="none")
        with atomic_write(folder / ABOUT) as stream:
            stream.write(json.dumps({"collection": self.collection}).encode())


def open_gallery(what: str | None, model: M3RetModel, processor: M3RetImageProcessor, name: str) -> Gallery:
    """The gallery `what`: the folder of an index, a collection as `open_collection` takes it, or None for the one that
    was published with this Space, else the demo.

    Args:
        name: of the model.

    Raises:
        IndexFormatError, CollectionError: if there is none, or it is another model's.
    """
    if what is None and (Path(PUBLISHED) / ABOUT).is_file():
        what = PUBLISHED
    if what is not None and (Path(what) / "current.json").is_file():
        return _load(Path(what), model_facts(model, processor, name))
    collection = what or DEMO
    records = open_collection(collection)
    if what is None:
        records = [*records, *sample_records()]
    elsewhere = None if Path(collection).exists() else collection
    return embed_gallery(records, model, processor, name, elsewhere)


def embed_gallery(
    records: Sequence[Record],
    model: M3RetModel,
    processor: M3RetImageProcessor,
    name: str,
    collection: str | None = None,
    folder: Path | None = None,
) -> Gallery:
    """The gallery of these records, embedded now or before; what can't be read is left out.

    Args:
        folder: where galleries are kept, by default `HF_HOME/m3ret/galleries`.

    Raises:
        CollectionError: if no scan can be read.
    """
    facts = model_facts(model, processor, name)
    told = json.dumps([facts.revision, facts.processor, fingerprint(records), THUMBNAIL_SIZE, SHARD_SCANS])
    folder = (folder or CACHE_FOLDER / "galleries") / hashlib.sha256(told.encode()).hexdigest()[:24]
    if (folder / ABOUT).is_file():  # needs no lock, which a folder that is only read does not allow
        return _embed_or_load(folder, facts, records, model, processor, collection)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # another start waits until this one has embedded it
        return _embed_or_load(folder, facts, records, model, processor, collection)


def _embed_or_load(
    folder: Path,
    facts: ModelFacts,
    records: Sequence[Record],
    model: M3RetModel,
    processor: M3RetImageProcessor,
    collection: str | None,
) -> Gallery:
    if (folder / ABOUT).is_file():
        shutil.rmtree(folder / "shards", ignore_errors=True)  # of a start that ended between saving and this
        kept = _load(folder, facts, records)
        kept.collection = collection
        return kept
    embedded, pictures = _embed_in_shards(records, model, processor, folder / "shards")
    if not embedded.records:
        raise CollectionError(f"found no scan that can be read among {len(records)}, expected a gallery")
    place_of = {record.id: place for place, record in enumerate(records)}
    places = [place_of[record.id] for record in embedded.records]
    index = RetrievalIndex.build(embedded.embeddings, _metadata(records, places), facts)
    gallery = Gallery(index, embedded.records, pa.chunked_array([pictures]), collection)
    gallery.save(folder)
    shutil.rmtree(folder / "shards")
    return gallery


def _embed_in_shards(
    records: Sequence[Record], model: M3RetModel, processor: M3RetImageProcessor, folder: Path
) -> tuple[Embedded, list[bytes]]:
    """Embeddings and WebP pictures of the scans that can be read. Shards that are in the folder are not made again."""
    kinds = {kind: folder / kind for kind in ("embeddings", "pictures")}
    for kept in kinds.values():
        kept.mkdir(parents=True, exist_ok=True)
    embedders = [encoder_embedder(model), thumbnail_embedder(processor)]
    parts: list[Embedded] = []
    pictures: list[bytes] = []
    with tqdm(total=len(records), desc="embedding the gallery", unit="scan") as bar:
        for start in range(0, len(records), SHARD_SCANS):
            shard = range(start, min(start + SHARD_SCANS, len(records)))
            if not all(shard_place(kept, shard).is_file() for kept in kinds.values()):
                encoded, drawn = embed_records(embedders, processor, records[shard.start : shard.stop], progress=False)
                for kept, part in zip(kinds.values(), (encoded, drawn), strict=True):
                    part.failures.clear()  # they hold names
                    write_shard(shard_place(kept, shard), shard, part, records)
            parts.append(read_shard(kinds["embeddings"], shard, records))
            pictures += [_webp(pixels) for pixels in read_shard(kinds["pictures"], shard, records).embeddings]
            bar.update(len(shard))
    readable = [part for part in parts if part.records]
    embeddings = torch.cat([part.embeddings for part in readable]) if readable else torch.empty(0, 0)
    return Embedded(embeddings, [record for part in readable for record in part.records]), pictures


def sample_records() -> list[Record]:
    """Real scans of the installed package `pydicom-data`; none where it isn't."""
    found = importlib.util.find_spec("data_store")
    if found is None or not found.submodule_search_locations:
        return []
    folder = Path(next(iter(found.submodule_search_locations))) / "data"
    return [
        Record(f"pydicom-data-{number}", folder / file, modality, anatomy, "", "", source="pydicom-data (real)")
        for number, (file, (modality, anatomy)) in enumerate(SAMPLES.items())
        if (folder / file).is_file()
    ]


def _load(folder: Path, facts: ModelFacts, records: Sequence[Record] | None = None) -> Gallery:
    index = RetrievalIndex.load(folder)
    # not by the model's name: a folder may have been renamed, and a Space names it anew
    if (index.facts.revision, index.facts.processor) != (facts.revision, facts.processor):
        raise IndexFormatError(f"{folder}: found embeddings of {index.facts}, expected those of {facts}")
    collection = None
    if (folder / ABOUT).is_file():
        collection = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["collection"]
    thumbnails = None
    if (folder / THUMBNAILS).is_file():
        thumbnails = pq.read_table(folder / THUMBNAILS).column("webp")
        if len(thumbnails) != len(index):
            raise IndexFormatError(f"{folder}: found {len(thumbnails)} thumbnails, expected {len(index)}")
    if records is None and collection is not None:
        records = open_collection(collection)
    if records is not None:
        places = [int(place) for place in index.metadata.column("id").to_pylist()]
        if max(places) >= len(records):
            raise IndexFormatError(f"{folder}: found {len(records)} scans in {collection}, expected {max(places) + 1}")
        records = [records[place] for place in places]
    return Gallery(index, records, thumbnails, collection)


def _metadata(records: Sequence[Record], places: Sequence[int]) -> pa.Table:
    kept = [records[place] for place in places]
    first: dict[str, int] = {}
    for place, record in zip(places, kept, strict=True):
        first.setdefault(record.group, place)
    return pa.table(
        {
            "id": [str(place) for place in places],
            "patient": [str(first[record.group]) if record.group else "" for record in kept],
            "modality": [record.modality for record in kept],
            "anatomy": [record.anatomy for record in kept],
            "labels": pa.array([[label for label in r.label.split("|") if label] for r in kept], pa.list_(pa.string())),
            "source": [record.source for record in kept],
        }
    )


def _webp(pixels: Tensor) -> bytes:
    stream = io.BytesIO()
    to_image(pixels.view(3, THUMBNAIL_SIZE, THUMBNAIL_SIZE)).save(stream, "WEBP", quality=80)
    return stream.getvalue()
