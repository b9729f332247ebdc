"""A folder of one's own: whatever lies in a hospital's share, with a manifest or with nothing but the files."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset_scripts.entries import Entry, Source, SourceError, expecting, files_under, inside, read_table
from modeling_m3ret.scan_m3ret import silence_libraries, sniff


# PS3.3 C.7.3.1.1.1; what is missing here (histology, ECG, reports, PET) is no scan that the model is for
MODALITY_OF_DICOM = {
    **dict.fromkeys(("CR", "DX", "DR", "MG", "IO", "PX", "RG", "RF", "XA"), "xray"),
    **dict.fromkeys(("US", "IVUS"), "ultrasound"),
    **dict.fromkeys(("ES",), "endoscopy"),
    "CT": "ct",
    "MR": "mri",
}
SAYS_NOTHING = ("", "OT")  # OT: other
# words of a path that say it, where a file's own header can't: of the nearest folder, or of the name, the last
MODALITY_WORDS = {
    "xray": "xray|cxr|radiograph|radiographs|dx|cr|mammography",
    "ultrasound": "ultrasound|us|sonography|echo|pocus",
    "endoscopy": "endoscopy|colonoscopy|gastroscopy|laparoscopy|bronchoscopy|cystoscopy",
    "ct": "ct|cbct",
    "mri": "mri|mr|t1|t1w|t2|t2w|flair|dwi|adc",
}
_WORDS = {word: modality for modality, words in MODALITY_WORDS.items() for word in words.split("|")}
# BodyPartExamined is free text in practice; of it only these words of PS3.16's list of parts are taken
BODY_PARTS = frozenset(
    (
        *("abdomen", "ankle", "arm", "breast", "chest", "elbow", "extremity", "eye", "finger", "foot", "hand", "head"),
        *("heart", "hip", "humerus", "knee", "leg", "liver", "lung", "neck", "pelvis", "prostate", "ribs", "shoulder"),
        *("skull", "spine", "thorax", "thyroid", "uterus", "wrist", "brain", "kidney", "colon"),
    )
)
BODY_PARTS_IN_OTHER_WORDS = {"cspine": "spine", "tspine": "spine", "lspine": "spine", "ssspine": "spine"}
NO_SCANS = (".csv", ".tsv", ".txt", ".json", ".yaml", ".yml", ".xml", ".md", ".pdf", ".html", ".db", ".ini", ".log")
HEADER = (
    *("Modality", "SeriesInstanceUID", "PatientID", "BodyPartExamined", "NumberOfFrames", "ImagePositionPatient"),
    "Rows",
)


class Folder(Source):
    """Any tree of DICOM, NIfTI, video and image files.

    With a `manifest.csv` (columns id, file, modality, anatomy, label, group, and if wanted split and licence; several
    labels are separated by `|`) its rows are the scans. Without one every file is: DICOM slices of CT and MRI are
    grouped into series by their UIDs, all other DICOM files stand alone; patients are those of DICOM headers. A
    modality is that of the DICOM header, else a word of the path ("ct", "ultrasound"), else `modality`.

    Args:
        title, licence: of the whole, for the card and the rows. modality: of files that say nothing.
    """

    name = "folder"
    title = "a folder of scans"
    homepage = ""
    licence = "unknown"
    citation = ""

    def __init__(self, title: str | None = None, licence: str | None = None, modality: str = ""):
        self.modality = modality
        if title:
            self.title = title  # type: ignore[misc]  # a collection of one's own has its own
        if licence:
            self.licence = licence  # type: ignore[misc]

    @expecting("a manifest.csv, or DICOM, NIfTI, video or image files")
    def entries(self, root: Path) -> Iterator[Entry]:
        if (root / "manifest.csv").is_file():
            yield from self._of_manifest(root)
        else:
            yield from self._of_files(root)

    def _of_manifest(self, root: Path) -> Iterator[Entry]:
        manifest = root / "manifest.csv"
        seen = set()
        for number, row in enumerate(read_table(manifest, ("id", "file", "modality", "anatomy", "label", "group")), 2):
            if not row["id"] or row["id"] in seen:
                raise SourceError(f"{manifest}, line {number}: found the id {row['id']!r}, expected one of its own")
            seen.add(row["id"])
            yield Entry(
                id=row["id"],
                files=(inside(root, row["file"]),),
                modality=row["modality"].casefold() or self.modality,
                anatomy=row["anatomy"],
                labels=tuple(label for label in row["label"].split("|") if label),
                patient=row["group"],
                split=row.get("split") or None,
                licence=row.get("licence", ""),
            )

    def _of_files(self, root: Path) -> Iterator[Entry]:
        series: dict[str, list[Path]] = defaultdict(list)
        facts: dict[str, tuple[str, str, str]] = {}  # of a series: modality, anatomy, patient
        for path in files_under(root, ("",)):
            name = path.relative_to(root).as_posix()
            try:
                kind = sniff(path) if path.is_file() else None  # opening a pipe would wait for who writes to it
            except OSError:  # its turn to be reported comes
                kind = None
            if kind is None and path.suffix.lower() in NO_SCANS:
                continue
            header = _dicom_header(path) if kind == "dicom" else None
            if header is None:
                yield Entry(name, (path,), _modality_of_path(name) or self.modality)
                continue
            declared, patient, uid = header["Modality"].upper(), header["PatientID"], header["SeriesInstanceUID"]
            anatomy = _anatomy(header["BodyPartExamined"])
            if declared in SAYS_NOTHING:
                modality = _modality_of_path(name) or self.modality
            else:
                modality = MODALITY_OF_DICOM.get(declared, "")
            is_slice = modality in ("ct", "mri") and header["ImagePositionPatient"] and header["Rows"]
            if is_slice and uid and header["NumberOfFrames"] in ("", "0", "1"):
                series[uid].append(path)
                facts.setdefault(uid, (modality, anatomy, patient))
            else:
                yield Entry(name, (path,), modality, anatomy, patient=patient)
        for uid, files in sorted(series.items()):
            modality, anatomy, patient = facts[uid]
            yield Entry(f"series {uid}", tuple(sorted(files)), modality, anatomy, patient=patient)


def _dicom_header(path: Path) -> dict[str, str] | None:
    """The few elements that say what goes together, empty if absent or damaged; None for what can't be read."""
    from pydicom import dcmread

    with silence_libraries:
        try:
            header = dcmread(path, stop_before_pixels=True, force=True, specific_tags=list(HEADER))
        except Exception:  # pydicom raises whatever its parsing runs into; reading the file will say it again
            return None
        return {name: _text(header, name) for name in HEADER}


def _text(header: Any, name: str) -> str:
    try:  # an element is parsed when it is asked for
        value = header.get(name)
    except Exception:
        return ""
    return "" if value is None else str(value).strip()


def _anatomy(part: str) -> str:
    part = part.casefold()
    part = BODY_PARTS_IN_OTHER_WORDS.get(part, part)
    return part if part in BODY_PARTS else ""


def _modality_of_path(name: str) -> str:
    for part in reversed(name.casefold().split("/")):
        for word in reversed(
            re.split("[^a-z0-9]+", part.replace("x-ray", "xray").replace("computed-tomography", "ct"))
        ):
            if word in _WORDS:
                return _WORDS[word]
    return ""
