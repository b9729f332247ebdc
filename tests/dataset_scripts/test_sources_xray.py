"""Radiographs: NIH ChestX-ray14, CheXpert, PadChest, MIMIC-CXR-JPG."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from source_trees import found, kinds, write

from dataset_scripts.entries import SourceError


NIH = """Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age
00000001_000.png,Cardiomegaly|Emphysema,0,1,57
00000002_000.png,No Finding,0,2,80
00000003_000.png,Hernia,0,3,74
00000004_000.png,,0,4,74
"""
CHEXPERT = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices\n"
)
PADCHEST = ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,Labels\n"
MIMIC = (
    "subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,"
    "Lung Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices\n"
)


# ----------------------------------------------------------------------------------------------------- NIH ChestX-ray14


def nih(root: Path, *images: str) -> Path:
    write(root, *images)
    return write(root, "Data_Entry_2017_v2020.csv", text=NIH)


def test_nih_has_labels_patients_and_the_official_split(tmp_path: Path) -> None:
    root = nih(
        tmp_path,
        "images_001/images/00000001_000.png",
        "images_001/images/00000002_000.png",
        "images_001/images/Thumbs.db",
        "images_002/images/00000004_000.png",
    )
    write(root, "train_val_list.txt", text="00000001_000.png\n00000003_000.png\n00000004_000.png")
    write(root, "test_list.txt", text="00000002_000.png\n")
    assert found("nih_chestxray14", root) == [  # 00000003 is in an archive that was not downloaded
        ("00000001_000.png", "images_001/images/00000001_000.png", ("Cardiomegaly", "Emphysema"), "1", "train"),
        ("00000002_000.png", "images_001/images/00000002_000.png", ("No Finding",), "2", "test"),
        ("00000004_000.png", "images_002/images/00000004_000.png", (), "4", "train"),
    ]
    assert kinds("nih_chestxray14", root) == {("xray", "chest")}


def test_nih_in_one_folder_and_without_the_lists_has_no_split(tmp_path: Path) -> None:
    root = nih(tmp_path, "images/00000003_000.png")
    assert found("nih_chestxray14", root) == [("00000003_000.png", "images/00000003_000.png", ("Hernia",), "3", None)]
    write(root, "test_list.txt", text="00000003_000.png\n")
    with pytest.raises(SourceError) as caught:
        found("nih_chestxray14", root)
    assert caught.value.location == str(root)


# ------------------------------------------------------------------------------------------------------------- CheXpert


def test_chexpert_uses_positive_labels_only(tmp_path: Path) -> None:
    root = tmp_path / "anywhere"
    names = [f"{name}/study1/view1_frontal.jpg" for name in ("train/patient00001", "valid/patient64541")]
    train, valid = (f"CheXpert-v1.0-small/{name},Female,68,Frontal,AP," for name in names)
    write(root, "train.csv", text=CHEXPERT + train + "0.0,,1.0,-1.0,,,,,,,-1.0,,,1.0\n")
    write(root, "valid.csv", text=CHEXPERT + valid + "1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0\n")
    assert found("chexpert", root) == [  # images are not opened
        (names[0], names[0], ("Cardiomegaly", "Support Devices"), "patient00001", "train"),
        (names[1], names[1], ("No Finding",), "patient64541", "validation"),
    ]
    assert kinds("chexpert", root) == {("xray", "chest")}


@pytest.mark.parametrize(("path", "got"), [("r/train/../../x.jpg", "train/../../x.jpg"), ("x.jpg", "x.jpg")])
def test_chexpert_with_an_invalid_path_is_refused(tmp_path: Path, path: str, got: str) -> None:
    write(tmp_path, "train.csv", text=CHEXPERT + path + "," * 18)
    with pytest.raises(SourceError) as caught:
        found("chexpert", tmp_path)
    assert caught.value.got == repr(got)


# ------------------------------------------------------------------------------------------------------------- PadChest


def test_padchest_reads_its_lists_without_running_them(tmp_path: Path) -> None:
    rows = [
        "0,1_a.png,0,20140915,s1,p1,\"['cardiomegaly', ' pleural effusion', 'cardiomegaly', '', 'unchanged']\"",
        "1,1_b.png,0,20140915,s1,p1,",
        "2,2_a.png,0,20140915,s2,p2,nan",
        "3,3_a.png,0,20140915,s3,p3,\"[__import__('os').getcwd()]\"",
        "4,4_a.png,0,20140915,s4,p4,\"['normal'\"",
        "5,5_a.png,17,20140915,s5,p5,\"['normal']\"",
    ]
    table = PADCHEST + "\n".join(rows)
    (tmp_path / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz").write_bytes(gzip.compress(table.encode()))
    write(tmp_path, "0/1_a.png")
    assert found("padchest", tmp_path) == [  # folder 17 was not downloaded, but 0 was
        ("1_a.png", "0/1_a.png", ("cardiomegaly", "pleural effusion"), "p1", None),
        ("1_b.png", "0/1_b.png", (), "p1", None),
        ("2_a.png", "0/2_a.png", (), "p2", None),
        ("3_a.png", "0/3_a.png", (), "p3", None),
        ("4_a.png", "0/4_a.png", (), "p4", None),
    ]
    assert kinds("padchest", tmp_path) == {("xray", "chest")}


# -------------------------------------------------------------------------------------------------------- MIMIC-CXR-JPG


def mimic(root: Path, splits: str) -> Path:
    findings = MIMIC + "10000032,50414267,,1.0,,-1.0,,,,,,,,0.0,,1.0\n"
    (root / "mimic-cxr-2.0.0-chexpert.csv.gz").write_bytes(gzip.compress(findings.encode()))
    table = "dicom_id,study_id,subject_id,split\n" + splits
    (root / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(gzip.compress(table.encode()))
    return write(root, "files/p10/index.html")


def test_mimic_joins_its_compressed_tables(tmp_path: Path) -> None:
    root = mimic(
        tmp_path,
        "02aa804e-bde0afdd,50414267,10000032,train\n174413ec-4ec4c1f7,50414267,10000032,train\n"
        "2a2277a9-b0ded155,53189527,10000764,validate\ne084de3b-be89b11e,53911762,19999999,test\n",
    )
    labels = ("Cardiomegaly", "Support Devices")
    folder = "files/p10/p10000032/s50414267"
    assert found("mimic_cxr_jpg", root) == [  # the third has no labels; p19 was not downloaded
        ("02aa804e-bde0afdd", f"{folder}/02aa804e-bde0afdd.jpg", labels, "10000032", "train"),
        ("174413ec-4ec4c1f7", f"{folder}/174413ec-4ec4c1f7.jpg", labels, "10000032", "train"),
        ("2a2277a9-b0ded155", "files/p10/p10000764/s53189527/2a2277a9-b0ded155.jpg", (), "10000764", "validation"),
    ]
    assert kinds("mimic_cxr_jpg", root) == {("xray", "chest")}


@pytest.mark.parametrize(
    ("row", "got"),
    [("a,1,10,later", "'later'"), ("../../../../a,1,10,train", "'p10/s1/../../../../a.jpg'")],
)
def test_mimic_with_an_invalid_row_is_refused(tmp_path: Path, row: str, got: str) -> None:
    with pytest.raises(SourceError) as caught:
        found("mimic_cxr_jpg", mimic(tmp_path, row))
    assert caught.value.got == got
