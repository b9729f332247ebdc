"""A local folder of scans, with or without a manifest."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from dataset_scripts.entries import Entry, Source, find_files
from modeling_m3ret.data.schema import find_modality
from modeling_m3ret.data.table import MANIFEST, read_manifest_rows
from modeling_m3ret.scan_m3ret import silence_libraries, sniff


UNSPECIFIC = ("", "OT")  # OT: other
# Words of `find_modality` that are ignored in a path, where initials, units and abbreviations are more likely.
AMBIGUOUS_NAMES = ("dr", "mg", "io", "px", "rg", "rf", "xa", "es")
# Suffixes of file names in BIDS, the standard for folders of brain images (https://bids-specification.readthedocs.io)
_BIDS_MRI = re.compile(r"sub-.*_(t1w|t2w|pdw|flair|t2star|inplanet1|inplanet2|bold|sbref|dwi|asl)\.nii(\.gz)?")
# Segmentation masks, as nnU-Net, the Medical Segmentation Decathlon, BraTS, BIDS, FreeSurfer and others name them
_MASK_FOLDER = re.compile(
    r"labels?|labels(tr|ts|val?)|gt([ _-].*)?|ground([ _-]?truth)?|segs?([ _-].*)?|segmentations?"
    r"|annotations?|contours?|rtstructs?|.*masks?([^a-z].*)?"
)
# Words of a folder of images with or without masks, or of both
_WITH_IMAGES = re.compile(r"(.*[^a-z])?(and|with|without|no|removed|applied)([^a-z].*)?")
# Words that name a mask wherever they stand in a file name, those that do at its end, and those that do beside images
_MASK_WORDS = "seg|segm|dseg|probseg|segmentations?|masks?|labelmaps?|groundtruth|aseg|rtstruct|rtss|[gcpi]tv|gtv[pnt]"
_LAST_MASK_WORDS = "labels?|gt|ground[ _-]truth|annotations?|contours?|wmparc|ribbon"
_MASK_FILE = re.compile(
    rf"(.*[^a-z])?({_MASK_WORDS})([^a-z].*)?|aparc.*|sub-.*_msk"
    rf"|((.*[^a-z])?({_LAST_MASK_WORDS})|.*(mask|segmentation)s?)[ _.-]*\d*"
)
_MASK_BESIDE_IMAGES = re.compile(r"(.*[^a-z])?rois?([^a-z].*)?|(labels?|gt|annotations?|contours?)[^a-z].*")
# Presentation states (11), Raw Data (66) and the objects below it, key objects (88.59), and radiotherapy objects other
# than RT Image hold no image.
_NO_IMAGE = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(11\.\d+|66(\..+)?|88\.59|481\.(?!1$)\d+)")
_NO_IMAGE_MODALITIES = ("SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "REG", "FID", "PR", "KO")
# BodyPartExamined is free text in practice; only these terms of DICOM PS3.16 are accepted.
BODY_PARTS = (
    *("abdomen", "ankle", "arm", "breast", "chest", "elbow", "extremity", "eye", "finger", "foot", "hand", "head"),
    *("heart", "hip", "humerus", "knee", "leg", "liver", "lung", "neck", "pelvis", "prostate", "ribs", "shoulder"),
    *("skull", "spine", "thorax", "thyroid", "uterus", "wrist", "brain", "kidney", "colon"),
)
BODY_PART_SYNONYMS = {"cspine": "spine", "tspine": "spine", "lspine": "spine", "ssspine": "spine"}
NON_SCAN_SUFFIXES = (
    ".img",  # voxels that are read with the header beside them
    ".raw",
    ".zraw",
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
    *("SOPClassUID", "Modality", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "BodyPartExamined"),
    *("NumberOfFrames", "ImagePositionPatient", "Rows"),
]


class Folder(Source):
    """Any tree of DICOM, NIfTI, video and image files.

    With a `manifest.csv`, each of its rows is a scan, see `read_manifest_rows`.

    Without a manifest, every file is a scan, except that DICOM slices of CT, MRI and PET are grouped into series by
    patient, study and series. The patient is that of the DICOM header, or the study if it names none. The modality is
    that of the DICOM header, otherwise the last name in the path that states one ("ct", "ultrasound"), otherwise
    `modality`. Segmentation masks are not scans.

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
        return self._read_manifest(root) if (root / MANIFEST).is_file() else self.group(find_files(root, ("",)), root)

    def _read_manifest(self, root: Path) -> Iterator[Entry]:
        for row in read_manifest_rows(root):
            modality = row.modality or self.modality
            scan = (row.id, (row.file,), modality, row.anatomy, row.labels, row.group, row.split or None)
            yield Entry(*scan, licence=row.licence, intensity=row.intensity)

    def group(self, paths: Iterable[Path], root: Path | None = None) -> Iterator[Entry]:
        """Yield the scans that some files make up.

        Args:
            root: folder in which the files were found. Their names are relative to it, and files that hold no scan are
                left out. Without it, files are those that a user named, and none is left out.
        """
        series: dict[tuple[str, str, str], list[Path]] = defaultdict(list)  # of a series, a patient and a study
        described: dict[tuple[str, str, str], tuple[str, str]] = {}  # modality and anatomy
        for path in paths:
            name = (path.relative_to(root) if root else path).as_posix()
            try:
                kind = sniff(path) if path.is_file() else None  # opening a pipe would block
            except OSError:  # reported when the builder reads the file
                kind = None
            if root and kind is None and path.suffix.lower() in NON_SCAN_SUFFIXES:
                continue
            header = _dicom_header(path) if kind == "dicom" else None
            if root and (_is_mask(path, name) if header is None else _is_no_image(header)):
                self.notes["segmentation masks and other objects without an image, left out"] += 1
                continue
            if header is None:
                yield Entry(name, (path,), _modality_of_path(name) or self.modality)
                continue
            declared, patient, study = header["Modality"].upper(), header["PatientID"], header["StudyInstanceUID"]
            anatomy = _anatomy(header["BodyPartExamined"])
            if declared in UNSPECIFIC:
                modality = _modality_of_path(name) or self.modality
            else:
                modality = find_modality(declared) or ""
            is_volume = modality in ("ct", "mri") or declared == "PT"  # PET has no modality here, but may be embedded
            is_slice = is_volume and header["ImagePositionPatient"] and header["Rows"]
            if is_slice and header["SeriesInstanceUID"] and header["NumberOfFrames"] in ("", "0", "1"):
                key = (header["SeriesInstanceUID"], patient, study)
                series[key].append(path)
                described.setdefault(key, (modality, anatomy))
            else:
                yield Entry(name, (path,), modality, anatomy, patient=self._patient(patient, study))
        _join_incomplete(series)
        same_uid = Counter(uid for uid, _, _ in series)
        for (uid, patient, study), files in sorted(series.items()):
            modality, anatomy = described[uid, patient, study]
            name = f"series {uid}"
            if same_uid[uid] > 1:
                self.notes["series whose UID is that of another patient's or study's series"] += 1
                name += f" of {patient} {study}"
            yield Entry(name, tuple(sorted(files)), modality, anatomy, patient=self._patient(patient, study))

    def _patient(self, patient: str, study: str) -> str:
        if patient or not study:
            return patient
        self.notes["scans without a patient, whose study counts as the patient"] += 1
        return f"study {study}"


def _join_incomplete(series: dict[tuple[str, str, str], list[Path]]) -> None:
    """Add slices that lack a patient or study to the series with their UID, if only one fits."""
    keys_of_uid: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for key in series:
        keys_of_uid[key[0]].append(key)
    for key in sorted(series, key=lambda key: key.count("")):
        others = [
            other
            for other in keys_of_uid[key[0]]
            if other in series and other != key and all(a in ("", b) for a, b in zip(key, other, strict=True))
        ]
        if not all(key) and len(others) == 1:
            series[others[0]] += series.pop(key)


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


def _is_no_image(header: dict[str, str]) -> bool:
    return header["Modality"].upper() in _NO_IMAGE_MODALITIES or bool(_NO_IMAGE.fullmatch(header["SOPClassUID"]))


def _is_mask(path: Path, name: str) -> bool:
    *folders, stem = _names(name)
    mask_folders = (folder for folder in folders if not _WITH_IMAGES.fullmatch(folder))
    if _MASK_FILE.fullmatch(stem) or any(map(_MASK_FOLDER.fullmatch, mask_folders)):
        return True
    if not _MASK_BESIDE_IMAGES.fullmatch(stem):
        return False
    files = (other.name for other in path.parent.iterdir() if other.is_file() and other.name[0] != ".")
    stems = (_names(other)[-1] for other in files if PurePosixPath(other).suffix.lower() not in NON_SCAN_SUFFIXES)
    return any(not _MASK_FILE.fullmatch(other) and not _MASK_BESIDE_IMAGES.fullmatch(other) for other in stems)


def _names(name: str) -> list[str]:
    """Return the folders of a path and its file name without suffix, in lower case."""
    path = PurePosixPath(name.casefold().removesuffix(".gz"))
    return [*path.parts[:-1], path.stem]


def _modality_of_path(name: str) -> str:
    """Return the modality that the last name in a path states, as a whole: "ct" in "ct/1.nii" and in "ct-01.nii"."""
    if _BIDS_MRI.fullmatch(PurePosixPath(name).name.casefold()):
        return "mri"
    for part in reversed(_names(name)):
        whole = "".join(filter(str.isalnum, part))
        for word in (whole, whole.rstrip("0123456789")):
            if word not in AMBIGUOUS_NAMES and (modality := find_modality(word)):
                return modality
    return ""
