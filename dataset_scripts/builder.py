"""Turn entries of a collection into de-identified rows: open, encode, hash the names, assign the split.

`build.py` runs a `ScanBuilder` shard by shard (`shards.py`). As a `GeneratorBasedBuilder`, it can also be used like any
other builder of `datasets`.
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

from dataset_scripts.row_encoding import EncodedScan, encode_scan
from modeling_m3ret.atomic_io import read_or_create_secret
from modeling_m3ret.data.schema import MEDIA, MODALITIES, SPLITS, features, media_column
from modeling_m3ret.data.table import count_similar, splits_of_patients
from modeling_m3ret.errors import InputError
from modeling_m3ret.hub import CACHE_FOLDER
from modeling_m3ret.reading_m3ret import M3RetReadError

from .duplicates import perceptual_hash
from .entries import Entry, Source


MIN_SALT_BYTES = 16
# Arrow addresses the bytes of a column with 31 bits; 4 MiB are left for the small scans in the same row group.
MAX_MEDIA_BYTES = 2**31 - 2**22


@dataclass(frozen=True)
class BuildOptions:
    """Options that change the rows of a dataset."""

    validation: float = 0.1  # fraction of patients in the validation split, if there is no official split
    test: float = 0.1  # the same for the test split
    max_size: int | None = None  # slices and frames of more than max_size**2 pixels are reduced to that area
    blank_outside_regions: bool = False  # blank an ultrasound DICOM outside the regions that its header declares

    def __post_init__(self) -> None:
        if not (self.validation >= 0 and self.test >= 0 and self.validation + self.test <= 1):
            raise InputError(
                f"validation and test: expected fractions that sum to at most 1, got {self.validation} and {self.test}."
            )
        if self.max_size is not None and self.max_size < 16:
            raise InputError(f"max_size: expected at least 16, the size of a patch, got {self.max_size}.")


class Pseudonyms:
    """Replace names by pseudonyms that are stable, but cannot be reversed without the salt.

    A pseudonym is the first 64 bits of HMAC-SHA256 (RFC 2104). A plain hash would not suffice, as all patient numbers
    could be tried. Equal names in two collections (`source`) have different pseudonyms.
    """

    def __init__(self, source: str, salt: bytes):
        self.source, self.salt = source, salt

    def pseudonym(self, kind: str, name: str) -> str:
        """Return 16 hexadecimal digits; equal names of different kinds have different pseudonyms."""
        message = f"{self.source}\0{kind}\0{name}".encode(errors="surrogateescape")  # file names may not be UTF-8
        return hmac.new(self.salt, message, hashlib.sha256).hexdigest()[:16]

    def scan(self, entry: Entry) -> str:
        """Return the pseudonym of the scan."""
        return self.pseudonym("scan", entry.id)

    def patient(self, entry: Entry) -> str:
        """Return the pseudonym of the patient; a scan of an unknown patient is a patient of its own."""
        return self.pseudonym("patient", entry.patient) if entry.patient else self.pseudonym("scan's patient", entry.id)

    def split(self, entry: Entry, options: BuildOptions) -> str:
        """Return the official split, or one by the patient's pseudonym, which stays the same when data is added."""
        if entry.split is not None:
            return entry.split
        fraction = int(self.patient(entry), 16) / 2**64
        if fraction < options.test:
            return "test"
        return "validation" if fraction < options.test + options.validation else "train"


def read_salt(path: Path | None) -> bytes:
    """Return the secret salt of the pseudonyms; create it, readable by its owner only, if there is none.

    Args:
        path: by default `HF_HOME/m3ret/salt`. Keep the file secret, and keep it as long as data may be added.
    """
    path = path or CACHE_FOLDER / "salt"
    salt = read_or_create_secret(path)
    if len(salt) < MIN_SALT_BYTES:
        raise InputError(f"{path}: expected a secret of at least {MIN_SALT_BYTES} bytes, got {len(salt)}")
    return salt


@dataclass(frozen=True)
class SkippedEntry:
    """An entry that could not be read, and why. It names the file, so it is never published."""

    entry: str
    file: str
    reason: str


@dataclass(frozen=True)
class BuiltRow:
    """A row of the schema, and what duplicate detection and the report need."""

    columns: dict[str, Any]
    digest: str
    picture_hash: str
    burned_in: str | None


class ScanBuilder(GeneratorBasedBuilder):
    """Build the collection in the folder `root` as a `datasets` builder. It downloads nothing.

    Args:
        salt: see `read_salt`.
        cache_dir: folder into which `download_and_prepare` writes.
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
        self.source, self.root, self.options = source, root, options
        self.pseudonyms = Pseudonyms(source.name, salt)
        # `datasets` caches by this hash, so it must change with the scans, the options and the pseudonyms
        settings = sorted(item for item in vars(source).items() if item[0] != "notes")
        arguments = f"{root.resolve()} {options} {source.title} {settings}"
        cache_hash = self.pseudonyms.pseudonym("cache", arguments)
        super().__init__(cache_dir=cache_dir, dataset_name=source.name, hash=cache_hash)

    def _info(self) -> DatasetInfo:
        source = self.source
        origin = {"homepage": source.homepage, "license": source.licence, "citation": source.citation}
        return DatasetInfo(description=source.title, features=features(), **origin)

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        splits = {Split(split): entries for split, entries in self.split_entries().items() if entries}
        return [SplitGenerator(name, gen_kwargs={"entries": entries}) for name, entries in splits.items()]

    def _generate_examples(self, entries: Sequence[Entry]) -> Iterator[tuple[str, dict[str, Any]]]:
        for entry in entries:
            row = self.build_row(entry)
            if isinstance(row, BuiltRow):
                yield row.columns["id"], row.columns

    def split_entries(self) -> dict[str, list[Entry]]:
        """Return the entries of each split, ordered by pseudonym so that every shard is a random mix.

        If only some scans of a patient have an official split, the patient's other scans follow them. All entries of a
        source for evaluation only are in the test split.
        """
        all_entries = list(self.source.entries(self.root))
        official = splits_of_patients((entry.patient, entry.split or "") for entry in all_entries)
        if similar := count_similar(entry.patient for entry in all_entries):
            self.source.notes["patients who differ from another in case, spaces or zeros only"] = similar
        splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
        for entry in all_entries:
            split = entry.split or official.get(entry.patient) or self.pseudonyms.split(entry, self.options)
            splits["test" if self.source.evaluation_only else split].append(entry)
        return {split: sorted(entries, key=self.pseudonyms.scan) for split, entries in splits.items()}

    def build_row(self, entry: Entry) -> BuiltRow | SkippedEntry:
        """Open and encode one scan. A scan that cannot be read is returned as a `SkippedEntry`, never raised."""
        if not entry.modality:
            reason = f"unknown modality: expected one of {', '.join(MODALITIES)}, got none. Set --modality."
            return self._skip(entry, reason)
        options = self.options
        try:
            scan = encode_scan(self.source.open(entry), options.max_size, options.blank_outside_regions)
        except M3RetReadError as error:
            return self._skip(entry, error.detail)
        except Exception as error:  # raised by a decoder, or because the file was removed
            got = f"got an error of type {type(error).__name__}"
            return self._skip(entry, f"data cannot be decoded: expected a readable scan, {got}.")
        if (size := len(scan.columns[media_column(scan.columns)]["bytes"])) > MAX_MEDIA_BYTES:
            limit = f"at most {MAX_MEDIA_BYTES:,} bytes"
            return self._skip(entry, f"scan is too large: expected {limit}, got {size:,}. Set --max_size.")
        return BuiltRow(self._columns(entry, scan), scan.digest, perceptual_hash(scan.picture), scan.burned_in)

    def _columns(self, entry: Entry, scan: EncodedScan) -> dict[str, Any]:
        return {
            **dict.fromkeys(MEDIA),
            **scan.columns,
            "id": self.pseudonyms.scan(entry),
            "modality": MODALITIES.index(entry.modality),
            "anatomy": entry.anatomy or None,
            "labels": list(entry.labels),
            "patient": self.pseudonyms.patient(entry),
            "source": self.source.title,
            "licence": entry.licence or self.source.licence,
        }

    def _skip(self, entry: Entry, reason: str) -> SkippedEntry:
        first = os.path.relpath(entry.files[0], self.root)
        more = f" and {len(entry.files) - 1} more" if len(entry.files) > 1 else ""
        return SkippedEntry(self.pseudonyms.scan(entry), first + more, reason)
