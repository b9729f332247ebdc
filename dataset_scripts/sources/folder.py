"""A local folder of scans, described by a manifest or by nothing but its files."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset_scripts.entries import Entry, Source, SourceError, find_files, path_inside, read_table
from modeling_m3ret.scan_m3ret import silence_libraries, sniff


# DICOM PS3.3 C.7.3.1.1.1. Modalities that the model does not cover (histology, ECG, reports, PET) are left out.
MODALITY_OF_DICOM = {
    **dict.fromkeys(("CR", "DX", "DR", "MG", "IO", "PX", "RG", "RF", "XA"), "xray"),
    **dict.fromkeys(("US", "IVUS"), "ultrasound"),
    **dict.fromkeys(("ES",), "endoscopy"),
    "CT": "ct",
    "MR": "mri",
}
UNSPECIFIC = ("", "OT")  # OT: other
# Words in a path that name the modality of files without a DICOM header. The last word of the last path part wins.
MODALITY_WORDS = {
    "xray": "xray|cxr|radiograph|radiographs|dx|cr|mammography",
    "ultrasound": "ultrasound|us|sonography|echo|pocus",
    "endoscopy": "endoscopy|colonoscopy|gastroscopy|laparoscopy|bronchoscopy|cystoscopy",
    "ct": "ct|cbct",
    "mri": "mri|mr|t1|t1w|t2|t2w|flair|dwi|adc",
}
_MODALITY_OF_WORD = {word: modality for modality, words in MODALITY_WORDS.items() for word in words.split("|")}
# BodyPartExamined is free text in practice; only these terms of DICOM PS3.16 are accepted.
BODY_PARTS = (
    *("abdomen", "ankle", "arm", "breast", "chest", "elbow", "extremity", "eye", "finger", "foot", "hand", "head"),
    *("heart", "hip", "humerus", "knee", "leg", "liver", "lung", "neck", "pelvis", "prostate", "ribs", "shoulder"),
    *("skull", "spine", "thorax", "thyroid", "uterus", "wrist", "brain", "kidney", "colon"),
)
BODY_PART_SYNONYMS = {"cspine": "spine", "tspine": "spine", "lspine": "spine", "ssspine": "spine"}
NON_SCAN_SUFFIXES = (
    ".csv",
    ".tsv",
    ".txt",
    ".json",
    ".yaml",
    ".yml",
    ".xml",
    ".md",
    ".pdf",
    ".html",
    ".db",
    ".ini",
    ".log",
)
HEADER_ELEMENTS = [
    *("Modality", "SeriesInstanceUID", "PatientID", "BodyPartExamined", "NumberOfFrames", "ImagePositionPatient"),
    "Rows",
]


class Folder(Source):
    """Any tree of DICOM, NIfTI, video and image files.

    With a `manifest.csv`, each of its rows is a scan. Its columns are id, file, modality, anatomy, label and group, and
    optionally split and licence; several labels are separated by `|`.

    Without a manifest, every file is a scan, except that DICOM slices of CT and MRI are grouped into series by
    SeriesInstanceUID. The patient is that of the DICOM header. The modality is that of the DICOM header, otherwise a
    word in the path ("ct", "ultrasound"), otherwise `modality`.

    Args:
        title: title of the collection, for its card and rows.
        licence: licence of the collection, for its card and rows.
        modality: modality of files that do not specify one.
    """

    name = "folder"
    title = "a folder of scans"
    homepage = ""
    licence = "unknown"
    citation = ""

    def __init__(self, title: str | None = None, licence: str | None = None, modality: str = ""):
        self.modality = modality
        if title:
            self.title = title  # type: ignore[misc]  # of this instance
        if licence:
            self.licence = licence  # type: ignore[misc]

    layout = "a manifest.csv, or DICOM, NIfTI, video or image files"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        return self._read_manifest(root) if (root / "manifest.csv").is_file() else self._scan_files(root)

    def _read_manifest(self, root: Path) -> Iterator[Entry]:
        manifest = root / "manifest.csv"
        seen = set()
        for number, row in enumerate(read_table(manifest, ("id", "file", "modality", "anatomy", "label", "group")), 2):
            if not row["id"] or row["id"] in seen:
                raise SourceError(f"{manifest}, line {number}", "a unique id in each row", repr(row["id"]))
            seen.add(row["id"])
            yield Entry(
                id=row["id"],
                files=(path_inside(root, row["file"]),),
                modality=row["modality"].casefold() or self.modality,
                anatomy=row["anatomy"],
                labels=tuple(label for label in row["label"].split("|") if label),
                patient=row["group"],
                split=row.get("split") or None,
                licence=row.get("licence", ""),
            )

    def _scan_files(self, root: Path) -> Iterator[Entry]:
        series: dict[str, list[Path]] = defaultdict(list)
        described: dict[str, tuple[str, str, str]] = {}  # modality, anatomy and patient of a series
        for path in find_files(root, ("",)):
            name = path.relative_to(root).as_posix()
            try:
                kind = sniff(path) if path.is_file() else None  # opening a pipe would block
            except OSError:  # reported when the builder reads the file
                kind = None
            if kind is None and path.suffix.lower() in NON_SCAN_SUFFIXES:
                continue
            header = _dicom_header(path) if kind == "dicom" else None
            if header is None:
                yield Entry(name, (path,), _modality_of_path(name) or self.modality)
                continue
            declared, patient, uid = header["Modality"].upper(), header["PatientID"], header["SeriesInstanceUID"]
            anatomy = _anatomy(header["BodyPartExamined"])
            if declared in UNSPECIFIC:
                modality = _modality_of_path(name) or self.modality
            else:
                modality = MODALITY_OF_DICOM.get(declared, "")
            is_slice = modality in ("ct", "mri") and header["ImagePositionPatient"] and header["Rows"]
            if is_slice and uid and header["NumberOfFrames"] in ("", "0", "1"):
                series[uid].append(path)
                described.setdefault(uid, (modality, anatomy, patient))
            else:
                yield Entry(name, (path,), modality, anatomy, patient=patient)
        for uid, files in sorted(series.items()):
            modality, anatomy, patient = described[uid]
            yield Entry(f"series {uid}", tuple(sorted(files)), modality, anatomy, patient=patient)


def _dicom_header(path: Path) -> dict[str, str] | None:
    """Return `HEADER_ELEMENTS`, empty if absent or damaged; None if the file cannot be read."""
    from pydicom import dcmread

    with silence_libraries:
        try:
            header = dcmread(path, stop_before_pixels=True, force=True, specific_tags=HEADER_ELEMENTS)
        except Exception:  # pydicom raises many types; reading the file reports the failure
            return None
        return {name: _text(header, name) for name in HEADER_ELEMENTS}


def _text(header: Any, name: str) -> str:
    try:  # elements are parsed on access
        value = header.get(name)
    except Exception:
        return ""
    return "" if value is None else str(value).strip()


def _anatomy(body_part: str) -> str:
    body_part = body_part.casefold()
    body_part = BODY_PART_SYNONYMS.get(body_part, body_part)
    return body_part if body_part in BODY_PARTS else ""


def _modality_of_path(name: str) -> str:
    name = name.casefold().replace("x-ray", "xray").replace("computed-tomography", "ct")
    words = reversed(re.split("[^a-z0-9]+", name))
    return next((_MODALITY_OF_WORD[word] for word in words if word in _MODALITY_OF_WORD), "")
