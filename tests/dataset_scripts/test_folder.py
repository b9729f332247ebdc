"""Scans of a local folder: which files belong together, their modality and their patient."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from scan_files import CINE, CT, PLANTED, dicom, dicom_bytes, series
from scan_folders import SALT, picture_bytes, put, texture, video_bytes, volume_bytes, write_manifest

from dataset_scripts.builder import BuiltRow, ScanBuilder, SkippedEntry
from dataset_scripts.entries import Entry, SourceError
from dataset_scripts.sources.folder import Folder
from modeling_m3ret.reading_m3ret import read_scan


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # about invalid values
RNG = np.random.default_rng(11)
PLANE = RNG.integers(0, 200, (16, 20), dtype=np.uint8)


def slices(
    uid: str, count: int = 6, *, modality: str = "CT", offset: float = 0, **elements: object
) -> tuple[np.ndarray, list[pydicom.Dataset]]:
    """Return the voxels of an axial series as `read_scan` orders them, `(D, H, W)`, and its slices, feet first."""
    volume = RNG.integers(0, 900, (14, 12, count)).astype(np.int16)  # i to the left, j to the back
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    affine[2, 3] = offset
    header = {"Modality": modality, "StudyInstanceUID": "1.9", "RescaleSlope": 1, "RescaleIntercept": 0} | elements
    return volume.transpose(2, 1, 0), series(volume, affine, sop=CT, series=uid, **header)


def listed(root: Path, source: Folder | None = None) -> dict[str, Entry]:
    entries = list((source or Folder()).entries(root))
    named = {entry.id: entry for entry in entries}
    assert len(named) == len(entries)
    return named


def building(root: Path, tmp_path: Path, source: Folder | None = None) -> ScanBuilder:
    return ScanBuilder(source or Folder(), root, salt=SALT, cache_dir=str(tmp_path / "cache"))


# --------------------------------------------------------------------------------------------------- DICOM, no manifest


def test_slices_spread_over_folders_are_grouped_by_series(tmp_path: Path) -> None:
    """Two series of one study at the same position, with random file names and folders."""
    root, whole, truth = tmp_path / "scans", {}, {}
    for uid in ("1.2.3.1", "1.2.3.2"):
        whole[uid], datasets = slices(uid)
        files = [f"{folder}/{RNG.integers(10**9)}" for folder in RNG.permutation(["a", "b/c", "b/d"] * 2)]
        put(root, dict(zip(files, map(dicom_bytes, datasets), strict=True)))
        truth[f"series {uid}"] = {root / file for file in files}
    found = listed(root)
    assert {name: set(entry.files) for name, entry in found.items()} == truth
    for uid, volume in whole.items():
        entry = found[f"series {uid}"]
        assert entry.modality == "ct"
        scan = read_scan(list(entry.files))
        order = np.argsort(scan.array[0], axis=None, kind="stable")
        assert scan.array.shape == (1, *volume.shape)
        assert (
            np.diff(volume.ravel()[order].astype(int)) >= 0
        ).all()  # the same voxels have the same order of grey levels
        assert scan.spacing == (2.0, 1.0, 1.0)


def test_pictures_and_cines_are_separate_scans_even_in_one_series(tmp_path: Path) -> None:
    alone = {
        "dx1.dcm": dicom(PLANE, series="1.5", Modality="DX"),
        "dx2.dcm": dicom(PLANE, series="1.5", Modality="DX"),
        "us1.dcm": dicom(PLANE, series="1.6", Modality="US"),
        "us2.dcm": dicom(PLANE, series="1.6", Modality="US"),
        "cine.dcm": dicom(np.stack([PLANE] * 4), series="1.6", sop=CINE, Modality="US"),
        "enhanced1.dcm": dicom(np.stack([PLANE] * 4), series="1.7", Modality="CT", ImagePositionPatient=[0, 0, 0]),
        "enhanced2.dcm": dicom(np.stack([PLANE] * 4), series="1.7", Modality="CT", ImagePositionPatient=[0, 0, 0]),
        "screenshot.dcm": dicom(PLANE, series="1.8", Modality="CT"),  # without a position in space
    }
    root = put(tmp_path, {name: dicom_bytes(ds) for name, ds in alone.items()})
    found = listed(root)
    assert {name: entry.files for name, entry in found.items()} == {name: (root / name,) for name in alone}
    kinds = {name: entry.modality for name, entry in found.items()}
    assert kinds == {n: {"d": "xray", "u": "ultrasound"}.get(n[0], "ct") for n in alone} | {"cine.dcm": "ultrasound"}


def test_localiser_is_not_part_of_a_volume(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    _, axial = slices("1.4.1", 2)
    ways = ([1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, -1])
    three = [
        dicom(PLANE, series="1.4.2", Modality="MR", ImageOrientationPatient=way, ImagePositionPatient=[0, 0, 0])
        for way in ways
    ]
    volume, datasets = slices("1.4.3")
    scout = dicom(
        PLANE,
        **{"sop": CT, "series": "1.4.3", "Modality": "CT", "PixelSpacing": [1, 1], "InstanceNumber": 0},
        ImageOrientationPatient=ways[1],
        ImagePositionPatient=[0, 0, 0],
    )
    for name, group in {"axial": axial, "three": three, "volume": [scout, *datasets]}.items():
        put(root, {f"{name}/{number}": dicom_bytes(ds) for number, ds in enumerate(group)})
    found = listed(root)
    assert {name: len(entry.files) for name, entry in found.items()} == {
        "series 1.4.1": 2,
        "series 1.4.2": 3,
        "series 1.4.3": 7,
    }
    row = building(root, tmp_path).build_row(found["series 1.4.3"])
    assert isinstance(row, BuiltRow)
    assert row.columns["shape"] == list(volume.shape)
    assert isinstance(building(root, tmp_path).build_row(found["series 1.4.2"]), BuiltRow)


def test_dicom_without_preamble_is_recognised(tmp_path: Path) -> None:
    volume, datasets = slices("1.2.7")
    bare = {f"IM{number}": dicom_bytes(ds)[132:] for number, ds in enumerate(datasets)}
    found = listed(put(tmp_path / "scans", bare))
    assert [len(entry.files) for entry in found.values()] == [6]
    row = building(tmp_path / "scans", tmp_path).build_row(found["series 1.2.7"])
    assert isinstance(row, BuiltRow)
    assert row.columns["shape"] == list(volume.shape)


def test_patients_are_read_from_dicom_headers(tmp_path: Path) -> None:
    root = tmp_path
    put(root, {f"a/{i}": dicom_bytes(ds) for i, ds in enumerate(slices("1.1", PatientID="one")[1])})
    put(root, {f"b/{i}": dicom_bytes(ds) for i, ds in enumerate(slices("1.2", PatientID="one ")[1])})
    put(root, {"c.dcm": dicom_bytes(dicom(PLANE, Modality="CR", PatientID="two"))})
    put(root, {"d.dcm": dicom_bytes(dicom(PLANE, Modality="CR", PatientID=None))})
    put(root, {"cxr/e.png": picture_bytes(PLANE)})
    found = {name: entry.patient for name, entry in listed(root).items()}
    assert found == {"series 1.1": "one", "series 1.2": "one", "c.dcm": "two", "d.dcm": "", "cxr/e.png": ""}


def grouped(root: Path) -> dict[str, tuple[str, int]]:
    """Return the patient and the number of files of each scan."""
    return {name: (entry.patient, len(entry.files)) for name, entry in listed(root).items()}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param({"PatientID": "A"}, {"PatientID": "B"}, id="patients"),
        pytest.param({"PatientID": "A"}, {"PatientID": "a"}, id="patients by case"),
        pytest.param(
            {"PatientID": "A", "StudyInstanceUID": "1.5"}, {"PatientID": "A", "StudyInstanceUID": "1.6"}, id="study"
        ),
        pytest.param(
            {"PatientID": None}, {"PatientID": "", "StudyInstanceUID": "1.6"}, id="studies of unknown patients"
        ),
    ],
)
def test_series_of_two_patients_or_studies_with_one_uid_are_two_scans(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    """Careless anonymisation gives all series one UID (pydicom/deid#19, rordenlab/dcm2niix#495)."""
    _, first = slices("1.2.9", 4, **one)
    _, second = slices("1.2.9", 4, offset=1, **other)
    put(tmp_path, {f"{number}.dcm": dicom_bytes(ds) for number, ds in enumerate([*first, *second])})
    entries = list(listed(tmp_path).values())
    assert [len(entry.files) for entry in entries] == [4, 4]
    assert len({(entry.patient, entry.id) for entry in entries}) == 2
    for entry in entries:
        assert read_scan(list(entry.files)).array.shape == (1, 4, 12, 14)


def test_scans_of_an_unknown_patient_belong_to_the_study(tmp_path: Path) -> None:
    for number, study in enumerate(("1.5", "1.5", "1.6")):
        files = slices(f"1.2.{number}", 2, PatientID=None, StudyInstanceUID=study)[1]
        put(tmp_path, {f"{number}/{i}": dicom_bytes(ds) for i, ds in enumerate(files)})
    source = Folder()
    assert [entry.patient for entry in listed(tmp_path, source).values()] == ["study 1.5", "study 1.5", "study 1.6"]
    assert list(source.notes.values()) == [3]


def test_slice_without_patient_or_study_joins_its_series(tmp_path: Path) -> None:
    files = slices("1.2.9", 6, PatientID="A")[1]
    del files[1].PatientID, files[2].StudyInstanceUID, files[3].PatientID, files[3].StudyInstanceUID
    put(tmp_path, {f"{number}.dcm": dicom_bytes(ds) for number, ds in enumerate(files)})
    assert grouped(tmp_path) == {"series 1.2.9": ("A", 6)}
    files = slices("1.2.9", 2, PatientID="B")[1]
    put(tmp_path, {f"b{number}.dcm": dicom_bytes(ds) for number, ds in enumerate(files)})
    assert sorted(grouped(tmp_path).values()) == [
        ("", 1),
        ("A", 4),
        ("B", 2),
        ("study 1.9", 1),
    ]  # the first fits two series


@pytest.mark.parametrize(
    ("body_part", "anatomy"),
    [
        *(("CHEST", "chest"), (" Abdomen", "abdomen"), ("CSPINE", "spine")),
        *((PLANTED, ""), (f"CHEST {PLANTED}", ""), ("CHEST\\DOE", ""), ("", ""), (None, "")),
    ],
)
def test_only_known_body_parts_are_used(tmp_path: Path, body_part: str | None, anatomy: str) -> None:
    picture = dicom(PLANE, Modality="CR")
    if body_part is not None:
        picture.BodyPartExamined = body_part
    put(tmp_path, {"a.dcm": dicom_bytes(picture)})
    assert listed(tmp_path)["a.dcm"].anatomy == anatomy


def test_damaged_element_does_not_lose_the_patient(tmp_path: Path) -> None:
    elements = {"Modality": "CT", "PatientID": "one", "ImagePositionPatient": [0, 0, 0]}
    data = dicom_bytes(dicom(np.stack([PLANE] * 22), **elements))
    frames = b"\x28\0\x08\0IS\x02\0"
    assert data.count(frames + b"22") == 1
    root = put(tmp_path / "scans", {"bad.dcm": data.replace(frames + b"22", frames + b"x!")})
    put(root, {"good.dcm": dicom_bytes(dicom(PLANE, Modality="US", PatientID="one"))})
    found = listed(root)
    assert {entry.patient for entry in found.values()} == {"one"}
    assert isinstance(building(root, tmp_path).build_row(found["bad.dcm"]), SkippedEntry)


def test_dicom_without_pixels_is_skipped(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    root.mkdir()
    for name, packaged in {"report.dcm": "test-SR.dcm", "DICOMDIR": "DICOMDIR"}.items():
        shutil.copy(str(get_testdata_file(packaged, download=False)), root / name)
    put(root, {"pet.dcm": dicom_bytes(dicom(PLANE, Modality="PT"))})
    for source in (Folder(), Folder(modality="ct")):
        found = listed(root, source)
        assert set(found) == {"report.dcm", "DICOMDIR", "pet.dcm"}
        for name, entry in found.items():
            failure = building(root, tmp_path, source).build_row(entry)
            assert isinstance(failure, SkippedEntry)
            assert (failure.file, bool(failure.reason)) == (name, True)


# -------------------------------------------------------------------------------------------------------- other formats


WORDS = {
    "ct/p1/scan.nii.gz": "ct",
    "MRI/a/b.nii": "mri",
    "Ultrasound/clip.mp4": "ultrasound",
    "x-ray/1.png": "xray",
    "X Ray 2/1.png": "xray",
    "ct/sub-01_T1w.nii.gz": "mri",  # BIDS names the sequence in the file name
    "ct/t2/us.png": "ultrasound",  # the last name wins
    "scans/ct-003.nii.gz": "ct",
    "colonoscopy.2/v.mp4": "endoscopy",
    # a word inside a name may be another: objects, initials, a title, a country, a street, a fraction
    **dict.fromkeys(("direct/objects/usual/1.png", "mrs_smith/1.png", "mr_smith/1.png", "contact_us/1.png"), ""),
    **dict.fromkeys(("patient_CXR_2.png", "head-ct-003.nii.gz", "echo_street/1.png", "dr/1.png", "es/2.png"), ""),
}


@pytest.mark.parametrize("fallback", ["", "endoscopy"])
def test_modality_is_read_from_the_path(tmp_path: Path, fallback: str) -> None:
    content = {".png": picture_bytes(PLANE), ".nii": volume_bytes(0), ".gz": volume_bytes(0, zipped=True)}
    video = video_bytes(0)
    put(tmp_path, {name: content.get(Path(name).suffix, video) for name in WORDS})
    found = {name: entry.modality for name, entry in listed(tmp_path, Folder(modality=fallback)).items()}
    assert found == {name: modality or fallback for name, modality in WORDS.items()}


def test_modality_of_the_header_precedes_path_and_option(tmp_path: Path) -> None:
    header = {"ct/a.dcm": "US", "ct/b.dcm": "PT", "ct/c.dcm": None, "ct/d.dcm": "OT", "e.dcm": "OT", "f.dcm": "cr"}
    put(tmp_path, {name: dicom_bytes(dicom(PLANE, Modality=modality or "")) for name, modality in header.items()})
    found = {name: entry.modality for name, entry in listed(tmp_path, Folder(modality="mri")).items()}
    wanted = {"ct/a.dcm": "ultrasound", "ct/b.dcm": "", "ct/c.dcm": "ct", "ct/d.dcm": "ct", "e.dcm": "mri"}
    assert found == wanted | {"f.dcm": "xray"}


def test_scan_of_unknown_modality_is_skipped(tmp_path: Path) -> None:
    root = put(tmp_path / "scans", {"a.png": picture_bytes(PLANE)})
    failure = building(root, tmp_path).build_row(listed(root)["a.png"])
    assert isinstance(failure, SkippedEntry)
    assert (failure.file, "--modality" in failure.reason) == ("a.png", True)


def test_other_and_hidden_files_are_ignored(tmp_path: Path) -> None:
    others = ("Thumbs.db", "desktop.ini", "ct/labels.csv", "ct/a.json", "notes.txt", "README.md", "report.pdf", "l.log")
    hidden = (".DS_Store", "ct/._scan.nii.gz", ".cache/scan.nii.gz", "ct/.hidden.png")
    put(tmp_path, dict.fromkeys((*others, *hidden), picture_bytes(PLANE)[:4]))
    put(tmp_path, {"ct/scan.nii.gz": volume_bytes(0, zipped=True), "ct/actually.txt": volume_bytes(1)})
    assert set(listed(tmp_path)) == {"ct/scan.nii.gz", "ct/actually.txt"}


MASKS = (
    # nnU-Net and the Medical Segmentation Decathlon, BraTS, LiTS, KiTS, ACDC, BTCV, BIDS, 3D Slicer, FreeSurfer
    *(
        "ct/labelsTr/la_003.nii.gz",
        "BraTS_00000/BraTS_00000_seg.nii.gz",
        "sub-strokecase0001/ses-0001/sub-strokecase0001_ses-0001_msk.nii.gz",  # ISLES 2022
        "ct/segmentation-0.nii",
        "ct/segmentation.nii.gz",
    ),
    *("ct/patient001_frame01_gt.nii.gz", "ct/label0001.nii.gz", "sub-01_space-T1w_desc-brain_mask.nii.gz"),
    *("ct/a-seg.nii.gz", "sub-01_dseg.nii", "ct/scan.seg.nii", "aparc+aseg.nii.gz", "ct/a_Mask.nii.gz"),
    # BUSI, Kvasir-SEG, CVC-ClinicDB, TotalSegmentator, Montgomery
    *("us/benign (1)_mask_1.png", "masks/1.png", "Ground Truth/1.png", "s0011/segmentations/liver.nii.gz"),
    *("xray/leftMask/MCUCXR_0001_0.png", "ct/mask_1.png", "images_and_masks/masks/1.png"),
    # HECKTOR, NSCLC-Radiomics, SegTHOR, LUNA16, CHAOS, nnU-Net's preprocessed data, and exports of planning systems
    *("ct/CHUM-001__GTVt.nii.gz", "ct/LUNG1-001_GTV-1.nii.gz", "ct/GT.nii.gz", "seg-lungs-LUNA16/1.nii"),
    *("mri/1/Ground/IMG-0004.png", "gt_segmentations/la_003.nii.gz", "ct/p1_CTV_boost.nii", "ct/ptv.nii.gz"),
    *(
        "ct/p1-rtstruct.nii.gz",
        "ct/p1_seg_liver.nii.gz",
        "ct/p1_roi.nii.gz",
        "ct/ROI_liver.nii",
        "ct/label_liver.nii.gz",
    ),
    *("annotations/1.png", "ct/a-label.nii.gz", "ct/labels_final.nii.gz", "ct/scanMask_2.nii"),
)
NO_MASKS = (
    *(
        "ct/imagesTr/la_003_0000.nii.gz",
        "ct/volume-0.nii",
        "Kvasir-SEG/images/1.png",
        "ct/legseg1x.nii",
        "ct/gta_01.nii",
    ),
    *("Liver-Segmentation/ct/1.nii", "us/labelled/1.png", "ct/unmasked_1.nii", "ct/segment/1.nii"),
    # titles with such a word, and words within others
    *("us/1/label_free_imaging_1.png", "us/1/label_free_imaging_2.png", "ct/spin_label_study.nii", "ct/heroic_1.nii"),
    *(
        "Chest Xray Masks and Labels/CXR_png/1.png",
        "images_and_masks/ct/1.png",
        "no_mask/1.png",
        "lung_mask_removed/1.png",
    ),
    *("us/2/roi_1.png", "us/2/roi_2.png", "ct/activtv_1.nii", "ct/background_1.nii", "ct/unlabeled_2.nii"),
)


def test_segmentation_masks_are_not_scans(tmp_path: Path) -> None:
    content = {".png": picture_bytes(PLANE), ".nii": volume_bytes(0), ".gz": volume_bytes(0, zipped=True)}
    put(tmp_path, {name: content[Path(name).suffix] for name in (*MASKS, *NO_MASKS)})
    objects = {"a.dcm": {"Modality": "SEG"}, "b.dcm": {"Modality": "RTSTRUCT"}, "c.dcm": {"Modality": "RTDOSE"}}
    # of a converter that copies the modality of the images: segmentation, structure set, registration and presentation
    # state (DICOM PS3.4 B.5)
    objects |= {
        f"{n}.dcm": {"Modality": "CT", "sop": f"1.2.840.10008.5.1.4.1.1.{n}"} for n in ("66.4", "481.3", "66.1", "11.1")
    }
    put(tmp_path, {name: dicom_bytes(dicom(PLANE, **elements)) for name, elements in objects.items()})
    source = Folder()
    assert set(listed(tmp_path, source)) == set(NO_MASKS)
    assert list(source.notes.values()) == [len(MASKS) + len(objects)]


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="this platform has no symbolic links")
def test_links_are_followed_once(tmp_path: Path) -> None:
    archive, root = tmp_path / "archive", tmp_path / "scans"
    put(archive, {"p1/1.nii": volume_bytes(0), "p2/2.nii": volume_bytes(1)})
    put(root, {"ct/3.nii": volume_bytes(2)})
    for name, target in {"ct/4.nii": archive / "p1/1.nii", "ct/archive": archive, "ct/again": archive / "p2"}.items():
        (root / name).symlink_to(target)
    (root / "ct/loop").symlink_to(root)
    (archive / "up").symlink_to(tmp_path / "archive")
    found = listed(root)
    assert len(found) == 4
    assert {"ct/3.nii", "ct/4.nii", "ct/archive/p1/1.nii"} < set(found)


def test_folder_without_scans_is_refused(tmp_path: Path) -> None:
    put(tmp_path, {"Thumbs.db": b"", "a.csv": b"id\n"})
    with pytest.raises(SourceError) as caught:
        listed(tmp_path)
    assert caught.value.location == str(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this platform has no named pipes")
def test_named_pipe_is_skipped_without_blocking(tmp_path: Path) -> None:
    root = put(tmp_path / "scans", {"ct/a.nii": volume_bytes(0)})
    os.mkfifo(root / "ct" / "pipe.nii")
    found = listed(root)
    failure = building(root, tmp_path).build_row(found["ct/pipe.nii"])
    assert isinstance(failure, SkippedEntry)
    assert "not found" in failure.reason


def test_order_is_reproducible(tmp_path: Path) -> None:
    put(tmp_path, {f"ct/{RNG.integers(10**6)}/{i}": dicom_bytes(ds) for i, ds in enumerate(slices("1.3")[1])})
    put(tmp_path, {f"xray/{RNG.integers(10**6)}.png": picture_bytes(texture(i)) for i in range(10)})
    first = list(Folder().entries(tmp_path))
    assert first == list(Folder().entries(tmp_path))
    assert first[:-1] == sorted(first[:-1], key=lambda entry: entry.files)


# ----------------------------------------------------------------------------------------------------------- a manifest


def test_entries_are_read_from_the_manifest(tmp_path: Path) -> None:
    folder = {"file": "series", "modality": "CT", "anatomy": "chest", "label": "nodule|effusion||", "group": "p"}
    write_manifest(
        tmp_path,
        [
            {"id": "a", "split": "test", "licence": "CC0", "site": "ignored"} | folder,
            {"id": "b", "file": "b.png", "modality": "xray"},
            {"id": "c", "file": "c.png"},
        ],
    )
    found = listed(tmp_path, Folder(modality="ultrasound"))
    a = Entry("a", (tmp_path / "series",), "ct", "chest", ("nodule", "effusion"), "p", "test", licence="CC0")
    b, c = (Entry(name, (tmp_path / f"{name}.png",), kind) for name, kind in (("b", "xray"), ("c", "ultrasound")))
    assert list(found.values()) == [a, b, c]


@pytest.mark.parametrize(
    ("rows", "location", "got"),
    [
        ([{"id": "a", "file": "../a.png", "modality": "ct"}], "manifest.csv, line 2", "'../a.png'"),
        ([{"id": "a", "file": "/etc/passwd", "modality": "ct"}], "manifest.csv, line 2", "'/etc/passwd'"),
        ([{"id": "a", "file": "", "modality": "ct"}], "manifest.csv, line 2", "''"),
        ([{"id": "a", "file": "a.png", "modality": "ct"}] * 2, "manifest.csv, line 3", "'a'"),
        ([{"id": "", "file": "a.png", "modality": "ct"}], "manifest.csv, line 2", "''"),
        ([{"id": "a", "file": "a.png", "modality": "pet"}], "manifest.csv, line 2", "'pet'"),
        ([{"id": "a", "file": "a.png", "modality": "ct", "split": "tset"}], "manifest.csv, line 2", "'tset'"),
        ([], "", "no scan of folder"),
    ],
)
def test_invalid_manifest_is_refused(tmp_path: Path, rows: list[dict[str, str]], location: str, got: str) -> None:
    write_manifest(tmp_path, rows)
    with pytest.raises(SourceError) as caught:
        listed(tmp_path)
    assert (caught.value.location, caught.value.got) == (str(tmp_path / location), got)


@pytest.mark.parametrize("missing", ["id", "file", "modality", "anatomy", "label", "group"])
def test_missing_column_is_named(tmp_path: Path, missing: str) -> None:
    columns = [name for name in ("id", "file", "modality", "anatomy", "label", "group") if name != missing]
    (tmp_path / "manifest.csv").write_text(",".join(columns) + "\n")
    with pytest.raises(SourceError) as caught:
        listed(tmp_path)
    assert caught.value.location == str(tmp_path / "manifest.csv")
    assert caught.value.expected.endswith(missing)
    assert caught.value.got == ", ".join(columns)
