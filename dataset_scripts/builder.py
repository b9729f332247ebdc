"""How does an entry of a collection become a row that may leave the machine?

The one base of all sources: it opens, stores and de-identifies a scan, hashes the names, and says on which side of the
split a patient stands. `build.py` runs it shard by shard (`shards.py`); as a `GeneratorBasedBuilder` it can also be
used like any other builder of `datasets`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import DatasetInfo, GeneratorBasedBuilder, Split, SplitGenerator

from dataset_scripts.row_encoding import Row, store_scan
from modeling_m3ret.atomic_io import read_or_create_secret
from modeling_m3ret.data.schema import MODALITIES, SPLITS, features, media_column
from modeling_m3ret.hub import CACHE_FOLDER
from modeling_m3ret.reading_m3ret import M3RetReadError

from .duplicates import perceptual_hash
from .entries import Entry, Source


SHORTEST_SALT = 16  # bytes
# of one scan: a column of Parquet in memory counts its bytes in 31 bits, the small scans before it among them
LARGEST_MEDIA = 2**31 - 2**22


@dataclass(frozen=True)
class BuildOptions:
    """
    validation, test: parts of the patients, where a collection has no official split.
    max_size: slices and frames of more than max_size^2 pixels become as small; null keeps all as they are.
    blank_outside_regions: blank an ultrasound DICOM outside the regions that its header declares.
    """

    validation: float = 0.1
    test: float = 0.1
    max_size: int | None = None
    blank_outside_regions: bool = False

    def __post_init__(self) -> None:
        if not (self.validation >= 0 and self.test >= 0 and self.validation + self.test <= 1):
            raise ValueError(
                f"validation and test are parts of one, which {self.validation} and {self.test} together are not"
            )
        if self.max_size is not None and self.max_size < 16:
            raise ValueError(f"max_size is at least 16, a patch's side, not {self.max_size}")


class Names:
    """Names of a collection -> names that say nothing to who has not the salt, and the same each time to who has.

    HMAC-SHA256 (RFC 2104), 64 bits of it. A plain hash would not do: there are few enough patient ids to try them all.
    """

    def __init__(self, source: str, salt: bytes):
        self.source = source
        self.salt = salt

    def hashed(self, kind: str, name: str) -> str:
        told = f"{self.source}\0{kind}\0{name}".encode(errors="surrogateescape")  # names of files need not be UTF-8
        return hmac.new(self.salt, told, hashlib.sha256).hexdigest()[:16]

    def id(self, entry: Entry) -> str:
        return self.hashed("scan", entry.id)

    def patient(self, entry: Entry) -> str:
        """A scan of no known patient is a patient of its own."""
        return self.hashed("patient", entry.patient) if entry.patient else self.hashed("scan's patient", entry.id)

    def split(self, entry: Entry, options: BuildOptions) -> str:
        """The official one, or by the patient's hash, so that nobody changes sides when data is added."""
        if entry.split is not None:
            return entry.split
        part = int(self.patient(entry), 16) / 2**64
        if part < options.test:
            return "test"
        return "validation" if part < options.test + options.validation else "train"


def read_salt(path: Path | None) -> bytes:
    """The secret that names are hashed with; made where there is none yet, readable by its owner alone.

    path: by default `HF_HOME/m3ret/salt`. Keep it as long as data may be added, and keep it secret.

    Raises:
        ValueError: if the file holds too little to be a secret.
    """
    path = path or CACHE_FOLDER / "salt"
    salt = read_or_create_secret(path)
    if len(salt) < SHORTEST_SALT:
        raise ValueError(f"{path}: found {len(salt)} bytes, expected a secret of at least {SHORTEST_SALT}")
    return salt


@dataclass(frozen=True)
class Failure:
    """An entry that could not be read. Names the file, so it stays on this machine."""

    entry: str
    file: str
    reason: str


@dataclass(frozen=True)
class Built:
    """A row of the schema, and what the report wants to know of it."""

    columns: dict[str, Any]
    digest: str
    picture_hash: str
    burned_in: str | None


class ScanBuilder(GeneratorBasedBuilder):
    """One collection as a builder of `datasets`. Nothing is downloaded: it runs where the data is.

    Args:
        salt: see `read_salt`. cache_dir: where `download_and_prepare` would write by default.
    """

    def __init__(
        self,
        source: Source,
        root: Path,
        *,
        salt: bytes,
        options: BuildOptions = BuildOptions(),
        cache_dir: str | None = None,
    ):
        self.source = source
        self.root = root
        self.options = options
        self.names = Names(source.name, salt)
        # datasets keeps what was prepared by this hash: other scans, options or names are another data set
        told = f"{root.resolve()} {options} {source.title} {sorted(vars(source).items())}"
        super().__init__(cache_dir=cache_dir, dataset_name=source.name, hash=self.names.hashed("cache", told))

    def _info(self) -> DatasetInfo:
        source = self.source
        return DatasetInfo(
            description=source.title,
            features=features(),
            homepage=source.homepage,
            license=source.licence,
            citation=source.citation,
        )

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        return [
            SplitGenerator(name=Split(split), gen_kwargs={"entries": entries})
            for split, entries in self.split_entries().items()
            if entries
        ]

    def _generate_examples(self, entries: Sequence[Entry]) -> Iterator[tuple[str, dict[str, Any]]]:
        for entry in entries:
            built = self.build_row(entry)
            if isinstance(built, Built):
                yield built.columns["id"], built.columns

    def split_entries(self) -> dict[str, list[Entry]]:
        """The entries of each split, in the order of their hashed ids: a shard, and any part of one, is a mix.

        What is for evaluation only is all in the test split, which no training reads. Where only some scans of a
        patient have an official split, the others follow them.

        Raises:
            SourceError: if the folder is not this collection.
        """
        found = list(self.source.entries(self.root))
        official = {entry.patient: entry.split for entry in found if entry.patient and entry.split is not None}
        splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
        for entry in found:
            split = entry.split or official.get(entry.patient) or self.names.split(entry, self.options)
            splits["test" if self.source.evaluation_only else split].append(entry)
        return {split: sorted(entries, key=self.names.id) for split, entries in splits.items()}

    def build_row(self, entry: Entry) -> Built | Failure:
        """Open, store and hash one scan. Whatever is wrong with it, the build goes on."""
        if not entry.modality:
            return self._failure(
                entry, f"found nothing that says which it is of {', '.join(MODALITIES)}; see --modality"
            )
        try:
            row = store_scan(
                self.source.open(entry),
                max_size=self.options.max_size,
                blank_outside=self.options.blank_outside_regions,
            )
        except M3RetReadError as error:
            return self._failure(entry, error.detail)
        except Exception as error:  # a decoder's own, or a file that went away
            return self._failure(entry, f"found damaged or unsupported data ({type(error).__name__})")
        size = len(row.columns[media_column(row.columns)]["bytes"])
        if size > LARGEST_MEDIA:
            return self._failure(entry, f"found {size:,} bytes; expected at most {LARGEST_MEDIA:,}, see --max_size")
        return Built(
            columns=self._columns(entry, row),
            digest=row.digest,
            picture_hash=perceptual_hash(row.picture),
            burned_in=row.burned_in,
        )

    def _columns(self, entry: Entry, row: Row) -> dict[str, Any]:
        return {
            "image": None,
            "video": None,
            "volume": None,
            **row.columns,
            "id": self.names.id(entry),
            "modality": MODALITIES.index(entry.modality),
            "anatomy": entry.anatomy or None,
            "labels": list(entry.labels),
            "patient": self.names.patient(entry),
            "source": self.source.title,
            "licence": entry.licence or self.source.licence,
        }

    def _failure(self, entry: Entry, reason: str) -> Failure:
        first = os.path.relpath(entry.files[0], self.root)
        more = f" and {len(entry.files) - 1} more" if len(entry.files) > 1 else ""
        return Failure(self.names.id(entry), first + more, reason)
