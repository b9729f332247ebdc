"""The gallery of the page: an index, a thumbnail of each scan, and the records of the scans if they can be opened.

A gallery is embedded once and cached under `HF_HOME/m3ret/galleries`, in a folder whose name is a hash of the model and
the scans; an interrupted run is resumed. The index identifies a scan by its position in the collection, and a patient
by the position of the patient's first scan, so no file of a gallery holds a name of a file or a person; names of scans
that cannot be read are not stored either. Visitors see the row of a scan and what `visible.py` lets them see.
"""

from __future__ import annotations

import io
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TypedDict, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from PIL import Image
from pydantic import BaseModel, ConfigDict
from pydicom.data import get_testdata_file
from torch import Tensor
from tqdm.auto import tqdm

from ..atomic_io import atomic_write, atomic_write_text
from ..data.collection import Record, open_collection
from ..data.schema import CollectionError
from ..hub import CACHE_FOLDER
from ..image_processing_m3ret import M3RetImageProcessor
from ..model_facts import ModelFacts, model_facts
from ..modeling_m3ret import M3RetModel
from ..search.embedding import embed_batches, encoder_embedder
from ..search.embedding_store import cache_key, fingerprint, read_shards, write_shards
from ..search.exact import Hits
from ..search.filters import MetadataFilter
from ..search.index import CURRENT, RetrievalIndex, check_model, damaged
from ..search.thumbnails import THUMBNAIL_SIZE, is_blank, miniature, thumbnail_embedder, to_image
from .calibration import Calibration
from .visible import SAMPLE_SOURCE, visible_columns


DEMO_FOLDER = "space/gallery"  # real scans beside app.py, in this repository and in a Space
DEMO = "phantom:48:1"  # without that folder: six subjects per class, with another seed than models are trained on
PUBLISHED = "gallery"  # folder in a Space
ABOUT = "gallery.json"
THUMBNAILS = "thumbnails.parquet"
SPARE_HITS = 16  # found in addition, to replace blank ones
SHARDS = "shards"  # folder in a gallery that is not complete
SHARD_SCANS = 32  # scans that are embedded again after an interruption: half a minute of CTs on two cores
# real scans of the package pydicom-data without names in their pixels; modality and anatomy as seen by eye
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


Report = Callable[[int, int], object]  # called with the number of embedded scans and of all scans


class About(BaseModel):
    """What a saved gallery states of itself. Visitors see all labels if `show_labels` is set, see `visible.py`."""

    model_config = ConfigDict(strict=True)
    collection: str | None = None  # name by which the records can be opened on another machine
    show_labels: bool = False


class Facts(TypedDict):
    """What visitors may see of a scan."""

    modality: str
    anatomy: str
    labels: list[str]
    source: str


@dataclass
class Gallery:
    """Scans to search in."""

    index: RetrievalIndex
    records: Sequence[Record] | None = None  # one per row of the index; None if the scans cannot be opened
    thumbnails: pa.ChunkedArray | None = None  # WebP picture of each row
    collection: str | None = None  # name by which the records can be opened on another machine
    show_labels: bool = False  # whether visitors see modality, anatomy and labels as they are, see `visible.py`

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def visible(self) -> pa.Table:
        """The columns modality, anatomy, labels and source as visitors may see them."""
        return visible_columns(self.index.metadata, self.show_labels)

    @cached_property
    def calibration(self) -> Calibration:
        """What similarities mean in this gallery."""
        return Calibration.from_index(self.index)

    def facts(self, row: int) -> Facts:
        """Return what visitors may see of a scan."""
        (values,) = self.visible.slice(row, 1).to_pylist()
        return cast(Facts, values)

    def thumbnail(self, row: int) -> Image.Image | None:
        """Return the thumbnail of a scan, or None if the gallery has none."""
        if self.thumbnails is None:
            return None
        with Image.open(io.BytesIO(self.thumbnails[row].as_py()), formats=["WEBP"]) as image:
            return image.convert("RGB")

    @cached_property
    def is_blank(self) -> Callable[[int], bool]:
        """Tells whether the thumbnail of a row shows nothing."""
        return cache(lambda row: (thumbnail := self.thumbnail(row)) is not None and is_blank(thumbnail))

    @cached_property
    def miniature(self) -> Callable[[int], Tensor | None]:
        """Returns the `miniature` of the thumbnail of a row, or None if the gallery has no thumbnails."""
        return cache(lambda row: None if (thumbnail := self.thumbnail(row)) is None else miniature(thumbnail))

    def counts(self, column: str) -> dict[str, int]:
        """Return the distinct values of a visible column with their number of scans, sorted, without empty ones."""
        counts = Counter(self.visible.column(column).to_pylist())
        return {name: counts[name] for name in sorted(counts) if name}

    def search(
        self,
        embedding: Tensor,
        k: int,
        where: MetadataFilter | None = None,
        *,
        query_row: int | None = None,
        exclude_same_patient: bool = False,
    ) -> Hits:
        """Return the k most similar scans of one embedding `(d,)` that are not blank.

        Args:
            query_row: row of the query, if it is a scan of this gallery. It is not a hit of itself.
            exclude_same_patient: leave out other scans of the patient of `query_row`.
        """
        patients = None
        if exclude_same_patient and query_row is not None:
            patients = [self.index.metadata.column("patient")[query_row].as_py() or ""]
        if where == MetadataFilter():
            where = None  # so that an approximate index is used
        spare = SPARE_HITS
        while True:
            count = min(k + spare, len(self))
            hits = self.index.search(embedding[None], count, where=where, query_patients=patients)
            rows = hits.rows[0].tolist()
            kept = torch.tensor([row >= 0 and row != query_row and not self.is_blank(row) for row in rows])
            if kept.sum() >= k or count == len(self) or -1 in rows:
                return Hits(hits.scores[:, kept][:, :k], hits.rows[:, kept][:, :k])
            spare *= 4

    def save(self, folder: Path) -> None:
        """Write the gallery to a folder, complete once `gallery.json` is there."""
        self.index.save(folder)
        if self.thumbnails is not None:
            with atomic_write(folder / THUMBNAILS) as stream:
                pq.write_table(pa.table({"webp": self.thumbnails}), stream, compression="none")
        about = About(collection=self.collection, show_labels=self.show_labels)
        atomic_write_text(folder / ABOUT, about.model_dump_json())


def check_gallery(source: str | None) -> None:
    """Raise a `CollectionError` if `open_gallery` would not find this gallery. Needs no model."""
    if source is not None and not (Path(source) / CURRENT).is_file():
        open_collection(source)


def open_gallery(
    source: str | None,
    model: M3RetModel,
    processor: M3RetImageProcessor,
    name: str,
    show_labels: bool = False,
    *,
    project: Path = Path(),
    report: Report | None = None,
) -> Gallery:
    """Open a gallery, and embed it if needed, with a model of this name.

    Args:
        source: folder of an index, or a collection as `open_collection` takes it. None opens the gallery published with
            this Space, or else the demo.
        project: folder that may hold the real scans of the demo; otherwise it is the phantom.

    Raises:
        IndexFormatError: if the index is damaged or of another model.
        CollectionError: if there is no such collection, or no scan of it can be read.
    """
    if source is None and (Path(PUBLISHED) / ABOUT).is_file():
        source = PUBLISHED
    if source is not None and (Path(source) / CURRENT).is_file():
        gallery = _load(Path(source), model_facts(model, processor, name))
        gallery.show_labels |= show_labels
        return gallery
    if source is None:
        portable: str | None = DEMO_FOLDER if (project / DEMO_FOLDER).is_dir() else DEMO
        demo = open_collection(project / DEMO_FOLDER if portable == DEMO_FOLDER else DEMO)
        records: Sequence[Record] = [*demo, *sample_records()]
    else:
        portable = None if Path(source).exists() else source
        records = open_collection(source)
    gallery = embed_gallery(records, model, processor, name, portable, report=report)
    gallery.show_labels = show_labels
    return gallery


def embed_gallery(
    records: Sequence[Record],
    model: M3RetModel,
    processor: M3RetImageProcessor,
    name: str,
    collection: str | None = None,
    folder: Path | None = None,
    report: Report | None = None,
) -> Gallery:
    """Return the gallery of some records, from the cache if possible. Scans that cannot be read are left out.

    Raises:
        CollectionError: if no scan can be read.
    """
    facts = model_facts(model, processor, name)
    key = cache_key(
        weights=facts.revision,
        processor=facts.processor,
        records=fingerprint(records),
        thumbnail=THUMBNAIL_SIZE,
        shard=SHARD_SCANS,
    )
    folder = (folder or CACHE_FOLDER / "galleries") / key
    if not (folder / ABOUT).is_file():  # a complete gallery is read without a lock, so it may be read-only
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # another process waits, and then reads this one's result
            if not (folder / ABOUT).is_file():
                _embed(records, model, processor, facts, collection, folder, report)
    shutil.rmtree(folder / SHARDS, ignore_errors=True)
    gallery = _load(folder, facts, records)
    gallery.collection = collection
    index = gallery.index  # words of a manifest may have changed since
    metadata = _metadata(records, gallery.records or ())
    gallery.index = RetrievalIndex(index.embeddings, metadata, index.facts, index.approximate)
    return gallery


def _embed(
    records: Sequence[Record],
    model: M3RetModel,
    processor: M3RetImageProcessor,
    facts: ModelFacts,
    collection: str | None,
    folder: Path,
    report: Report | None,
) -> None:
    """Embed a gallery in shards and save it."""
    embedders = {"embeddings": encoder_embedder(model), "thumbnails": thumbnail_embedder(processor)}
    names, shards = list(embedders), folder / SHARDS
    embed = partial(embed_batches, list(embedders.values()), processor)

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if report is not None:
                report(int(self.n + (n or 0)), len(records))
            return super().update(n)

    with Bar(total=len(records), desc="embedding the gallery", unit="scan") as bar:
        write_shards(names, embed, records, shards, SHARD_SCANS, bar=bar, log_failures=False)
    embedded = read_shards(names, records, shards, SHARD_SCANS)
    readable = embedded["embeddings"].records
    if not readable:
        problem = f"no scan of the gallery can be read: expected at least one of {len(records)}, got none."
        raise CollectionError(f"{problem} Check the files.")
    index = RetrievalIndex.build(embedded["embeddings"].embeddings, _metadata(records, readable), facts)
    thumbnails = pa.chunked_array([[_webp(pixels) for pixels in embedded["thumbnails"].embeddings]])
    Gallery(index, readable, thumbnails, collection).save(folder)


def sample_records() -> list[Record]:
    """Return real scans of the package `pydicom-data`; none if it is not installed."""
    return [
        Record(f"pydicom-data-{number}", Path(path), modality, anatomy, "", "", source=SAMPLE_SOURCE)
        for number, (file, (modality, anatomy)) in enumerate(SAMPLES.items())
        if (path := get_testdata_file(file, download=False))
    ]


def _load(folder: Path, facts: ModelFacts, records: Sequence[Record] | None = None) -> Gallery:
    index = RetrievalIndex.load(folder)
    # names may differ: folders are renamed, and a Space gives its model another name
    check_model(folder, replace(index.facts, model=facts.model), facts)
    try:
        about = About.model_validate_json((folder / ABOUT).read_bytes()) if (folder / ABOUT).is_file() else About()
    except ValueError as error:
        expected = "expected a name or null as collection, and true or false as show_labels"
        raise damaged(folder, f"{ABOUT} is not valid: {expected}.", ABOUT) from error
    thumbnails = None
    if (folder / THUMBNAILS).is_file():
        try:
            thumbnails = pq.read_table(folder / THUMBNAILS).column("webp").cast(pa.binary())
        except (pa.ArrowException, KeyError, OSError) as error:
            raise damaged(folder, f"cannot read {THUMBNAILS} ({type(error).__name__}).", THUMBNAILS) from error
        if len(thumbnails) != len(index):
            details = f"{THUMBNAILS} does not match the index: expected {len(index)} rows, got {len(thumbnails)}."
            raise damaged(folder, details, THUMBNAILS)
    if records is None and about.collection is not None:
        records = open_collection(about.collection)
    if records is not None:
        record_of = {str(position): record for position, record in enumerate(records)}
        ids = index.metadata.column("id").to_pylist()
        found = [record_of[id] for id in ids if id in record_of]
        if len(found) < len(ids):
            expected = f"expected {len(ids)} of its scans, got {len(found)}."
            raise damaged(folder, f"the collection {about.collection} does not match the index: {expected}")
        records = found
    return Gallery(index, records, thumbnails, about.collection, about.show_labels)


def _metadata(records: Sequence[Record], readable: Sequence[Record]) -> pa.Table:
    """Return the index's metadata of the readable records; positions in the collection replace ids and patients."""
    position_of = {record.id: str(position) for position, record in enumerate(records)}
    patient_of = {record.group: position_of[record.id] for record in reversed(readable)} | {"": ""}
    labels = [[label for label in record.label.split("|") if label] for record in readable]
    return pa.table(
        {
            "id": [position_of[record.id] for record in readable],
            "patient": [patient_of[record.group] for record in readable],
            "modality": [record.modality for record in readable],
            "anatomy": [record.anatomy for record in readable],
            "labels": pa.array(labels, pa.list_(pa.string())),
            "source": [record.source for record in readable],
        }
    )


def _webp(pixels: Tensor) -> bytes:
    stream = io.BytesIO()
    to_image(pixels.view(3, THUMBNAIL_SIZE, THUMBNAIL_SIZE)).save(stream, "WEBP", quality=80)
    return stream.getvalue()
