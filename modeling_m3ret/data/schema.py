"""Schema of a row of a Parquet dataset. It is the same for every source, so that any mix of sources can be trained on.

Exactly one of `image`, `video` and `volume` is set. It holds the bytes of a file that this project's reader decodes
under its limits: PNG or JPEG; MP4 or Matroska; uncompressed NIfTI with int16, uint16 or uint8 voxels.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import InputError


if TYPE_CHECKING:
    from datasets import Features


MODALITIES = ("xray", "ultrasound", "endoscopy", "ct", "mri")
SPLITS = ("train", "validation", "test")
MEDIA = ("image", "video", "volume")
# Words for a modality and a split in tables, options and filters, without case, spaces and punctuation. The two-letter
# words are those of DICOM PS3.3 C.7.3.1.1.1.
_MODALITY_OF_WORD = {
    word: modality
    for modality, words in {
        "xray": "xray xrays cxr radiograph radiographs radiography mammography cr dx dr mg io px rg rf xa",
        "ultrasound": "ultrasound ultrasonography sonography echo echocardiography pocus us ivus",
        "endoscopy": "endoscopy colonoscopy gastroscopy laparoscopy bronchoscopy cystoscopy es",
        "ct": "ct cbct computedtomography",
        "mri": "mri mr magneticresonance magneticresonanceimaging t1 t1w t2 t2w flair dwi adc",
    }.items()
    for word in words.split()
}
_SPLIT_OF_WORD = {
    word: split
    for split, words in {
        "train": "train training",
        "validation": "validation validate valid val dev development",
        "test": "test testing",
    }.items()
    for word in words.split()
}
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u2060\ufeff]")  # soft hyphen, zero-width space, marks, BOM


class CollectionError(InputError):
    """A collection that cannot be used: it is missing, or it does not match its format."""


class UnknownWordError(CollectionError):
    """A word that names no modality or no split. `advice` holds the nearest known word."""

    def __init__(self, kind: str, word: str, known: Sequence[str], advice: str):
        super().__init__(kind, word, known, advice)  # the arguments, for pickle
        self.expected, self.got, self.advice = f"a {kind} out of {', '.join(known)}", repr(word), advice

    def __str__(self) -> str:
        return f"expected {self.expected}, got {self.got}. {self.advice}"


def clean(text: str) -> str:
    """Return a text in Unicode form NFC without invisible characters; each run of white space is one space."""
    if not text.isascii():
        text = _INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    return " ".join(text.split())


def fold(text: str) -> str:
    """Return the form in which two words are compared: equal for words that differ in case, spaces or width only."""
    return clean(unicodedata.normalize("NFKC", text)).casefold()


def find_modality(word: str) -> str | None:
    """Return the modality that a word names ("MR", "X-ray"), or None if it names none of `MODALITIES`."""
    return _MODALITY_OF_WORD.get(_letters(word))


def parse_modality(word: str) -> str:
    """Return the modality that a word names; raise `UnknownWordError` if it names none."""
    if (modality := find_modality(word)) is None:
        raise UnknownWordError("modality", word, MODALITIES, nearest(_letters(word), _MODALITY_OF_WORD))
    return modality


def find_split(word: str) -> str | None:
    """Return the split that a word names ("val", "Training"), or None if it names none of `SPLITS`."""
    return _SPLIT_OF_WORD.get(_letters(word))


def parse_split(word: str) -> str:
    """Return the split that a word names; raise `UnknownWordError` if it names none."""
    if (split := find_split(word)) is None:
        raise UnknownWordError("split", word, SPLITS, nearest(_letters(word), _SPLIT_OF_WORD))
    return split


@lru_cache(maxsize=1024)
def _letters(word: str) -> str:
    return "".join(filter(str.isalnum, fold(word)))


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "Did you mean …?" with the nearest of some known words, empty if none is near."""
    found = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"Did you mean {found[0]!r}?" if found else "Check the spelling."


def require_words(name: str, values: Any) -> frozenset[str]:
    """Return a collection of words as a set; raise `InputError` for one string, which would be read as its letters."""
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping)):
        words = list(values)
        if all(isinstance(word, str) for word in words):
            return frozenset(words)
    raise InputError(f"{name}: expected a list of words, such as ['ct', 'mri'], got {type(values).__name__}.")


def features() -> Features:
    """Return the schema as `datasets.Features`. Media columns are not decoded.

    `id` and `patient` are salted hashes; a scan of an unknown patient has a hash of its own. `intensity` states how
    stored values map to [0, 1], see `StoredScan`. `shape` is D, H, W of the scan in voxels. `spacing` is in mm along
    D, H, W, null where unknown.
    """
    from datasets import ClassLabel, Features, Image, List, Nifti, Value, Video

    return Features(
        {
            "image": Image(decode=False),
            "video": Video(decode=False),
            "volume": Nifti(decode=False),
            "id": Value("string"),
            "modality": ClassLabel(names=list(MODALITIES)),
            "anatomy": Value("string"),
            "labels": List(Value("string")),
            "patient": Value("string"),
            "shape": List(Value("int32")),
            "spacing": List(Value("float64")),
            "intensity": Value("string"),
            "source": Value("string"),
            "licence": Value("string"),
        }
    )


def media_column(row: dict[str, Any]) -> str:
    """Return the name of the media column that a row sets."""
    return next(name for name in MEDIA if row.get(name) is not None)
