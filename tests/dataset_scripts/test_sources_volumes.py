"""CT and MRI: CT-RATE, LIDC-IDRI, the Medical Segmentation Decathlon, BraTS, OASIS-3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from source_trees import found, kinds, write

from dataset_scripts.entries import SourceError
from dataset_scripts.sources import SOURCES


# -------------------------------------------------------------------------------------------------------------- CT-RATE


LABELS = "VolumeName,Medical material,Arterial wall calcification,Cardiomegaly\n"


def ct_rate(root: Path) -> Path:
    tables = root / "dataset/multi_abnormality_labels"
    write(tables, "train_predicted_labels.csv", text=LABELS + "train_1_a_1.nii.gz,0,1,1\ntrain_9_a_1.nii.gz,1,0,0\n")
    write(tables, "valid_predicted_labels.csv", text=LABELS + "valid_1_a_1.nii.gz,0,0,0\n")
    volumes = root / "dataset/train_fixed"
    write(volumes, "train_1/train_1_a/train_1_a_1.nii.gz", "train_1/train_1_b/train_1_b_2.nii.gz")
    return write(root / "dataset", "valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz")


def test_ct_rate_scans_of_a_patient_share_the_patient(tmp_path: Path) -> None:
    ct_rate(tmp_path)
    folder, labels = "dataset/train_fixed/train_1", ("Arterial wall calcification", "Cardiomegaly")
    assert found("ct_rate", tmp_path) == [  # train_9 has labels, but was not downloaded
        ("train_1_a_1", f"{folder}/train_1_a/train_1_a_1.nii.gz", labels, "train_1", "train"),
        ("train_1_b_2", f"{folder}/train_1_b/train_1_b_2.nii.gz", (), "train_1", "train"),
        ("valid_1_a_1", "dataset/valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz", (), "valid_1", "validation"),
    ]
    assert kinds("ct_rate", tmp_path) == {("ct", "chest")}


def test_ct_rate_scans_of_other_body_parts_have_no_anatomy(tmp_path: Path) -> None:
    root = ct_rate(tmp_path)
    write(root / "metadata", "no_chest_train.txt", text="train_1_b\n")
    write(root / "metadata", "no_chest_valid.txt", text="valid_1/valid_1_a/valid_1_a_1.nii.gz\n")
    assert [entry.anatomy for entry in SOURCES["ct_rate"]().entries(root)] == ["chest", "", ""]


def test_ct_rate_with_wrong_headers_or_without_its_table_is_refused(tmp_path: Path) -> None:
    root = ct_rate(tmp_path)
    (root / "multi_abnormality_labels/valid_predicted_labels.csv").unlink()
    with pytest.raises(SourceError) as caught:
        found("ct_rate", root)
    assert caught.value.location == str(root / "multi_abnormality_labels/valid_predicted_labels.csv")
    (root / "train_fixed").rename(root / "train")
    with pytest.raises(SourceError) as caught:
        found("ct_rate", root)
    assert caught.value.location == str(root)


# ------------------------------------------------------------------------------------------------------------ LIDC-IDRI


def test_lidc_uses_ct_only(tmp_path: Path) -> None:
    ct = "LIDC-IDRI/LIDC-IDRI-0001/01-01-2000-NA-NA-30178/3000566.000000-NA-03192"
    old = "LIDC-IDRI/LIDC-IDRI-0002/1.3.6.1.4.1.14519.5.2.1.1/1.3.6.1.4.1.14519.5.2.1.2"
    write(tmp_path, *(f"{ct}/1-{number:03d}.dcm" for number in range(1, 31)), f"{ct}/069.xml", f"{ct}/Thumbs.db")
    write(tmp_path, *(f"{old}/{number:06d}.dcm" for number in range(1, 26)))
    write(tmp_path, "LIDC-IDRI/LIDC-IDRI-0001/01-01-2000-NA-NA-35511/3000923.000000-NA-62357/1-1.dcm")
    write(tmp_path, "LIDC-IDRI/LICENSE", "LIDC-IDRI/metadata.csv")
    entries = list(SOURCES["lidc_idri"]().entries(tmp_path))
    assert [(entry.id, entry.patient, len(entry.files)) for entry in entries] == [
        (ct.removeprefix("LIDC-IDRI/"), "LIDC-IDRI-0001", 30),
        (old.removeprefix("LIDC-IDRI/"), "LIDC-IDRI-0002", 25),
    ]
    assert entries[0].files[:2] == (tmp_path / ct / "1-001.dcm", tmp_path / ct / "1-002.dcm")
    assert {(entry.modality, entry.anatomy, entry.labels, entry.split) for entry in entries} == {
        ("ct", "chest", (), None)
    }


# ------------------------------------------------------------------------------------------------------------------ MSD


def decathlon(root: Path, task: str, training: list[str], test: list[str]) -> None:
    pairs = [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in training]
    table = {"name": task, "training": pairs, "test": [f"./imagesTs/{name}" for name in test]}
    write(root, f"{task}/dataset.json", text=json.dumps(table))
    write(root, *(f"{task}/imagesTr/{name}" for name in training), *(f"{task}/labelsTr/{name}" for name in training))


def test_msd_follows_the_list_of_each_task(tmp_path: Path) -> None:
    decathlon(tmp_path, "Task01_BrainTumour", ["BRATS_001.nii.gz"], ["BRATS_485.nii.gz"])
    decathlon(tmp_path, "Task03_Liver", ["liver_1.nii.gz", "liver_0.nii.gz"], ["liver_132.nii.gz"])
    write(tmp_path, "Task03_Liver/imagesTr/._liver_0.nii.gz", "Task03_Liver.tar")
    assert found("msd", tmp_path) == [  # sorted; the missing test image is found by the builder
        ("Task03_Liver/liver_0", "Task03_Liver/imagesTr/liver_0.nii.gz", (), "", "train"),
        ("Task03_Liver/liver_1", "Task03_Liver/imagesTr/liver_1.nii.gz", (), "", "train"),
        ("Task03_Liver/liver_132", "Task03_Liver/imagesTs/liver_132.nii.gz", (), "", "test"),
    ]
    assert kinds("msd", tmp_path) == {("ct", "liver")}
    assert [entry[0] for entry in found("msd_mri", tmp_path)] == [
        "Task01_BrainTumour/BRATS_001",
        "Task01_BrainTumour/BRATS_485",
    ]
    assert kinds("msd_mri", tmp_path) == {("mri", "brain")}


@pytest.mark.parametrize(
    "table",
    [[], {"training": []}, *({"training": [item], "test": []} for item in ({"label": "a"}, 3, "../../a.nii.gz"))],
)
def test_msd_with_an_invalid_list_is_refused(tmp_path: Path, table: object) -> None:
    write(tmp_path, "Task09_Spleen/dataset.json", text=json.dumps(table))
    with pytest.raises(SourceError) as caught:
        found("msd", tmp_path)
    assert "Task09_Spleen" in caught.value.location


# ---------------------------------------------------------------------------------------------------------------- BraTS


def test_brats_has_an_entry_for_each_sequence_and_none_for_the_mask(tmp_path: Path) -> None:
    new, case = "BraTS2021_00000", "RSNA_ASNR_MICCAI_BraTS2021_TrainingData/BraTS2021_00000"
    write(tmp_path, *(f"{case}/{new}_{name}.nii.gz" for name in ("flair", "t1", "t1ce", "seg")))
    older = "BraTS20_Training_355"
    write(tmp_path, *(f"{older}/{older}_{name}.nii" for name in ("flair", "t1", "t1ce", "t2")))
    write(tmp_path, f"{older}/W39_1998.09.19_Segm.nii", "survival_info.csv")
    entries = found("brats", tmp_path)
    assert entries == [
        *(
            (f"{older}_{name}", f"{older}/{older}_{name}.nii", ("glioma",), older, None)
            for name in ("flair", "t1", "t1ce", "t2")
        ),
        *(  # the missing t2 is found by the builder
            (f"{new}_{name}", f"{case}/{new}_{name}.nii.gz", ("glioma",), new, "train")
            for name in ("flair", "t1", "t1ce", "t2")
        ),
    ]
    assert kinds("brats", tmp_path) == {("mri", "brain")}


# ---------------------------------------------------------------------------------------------------------------- OASIS


def test_oasis_uses_structural_images_only(tmp_path: Path) -> None:
    session = "OAS30001_MR_d0129"
    names = [f"{session}/anat2/sub-OAS30001_ses-d0129_run-01_T1w.nii.gz"]
    names += [f"{session}/anat4/sub-OAS30001_sess-d0129_acq-TSE_T2w.nii.gz"]
    names += ["sub-OAS30002/ses-d0653/anat/sub-OAS30002_ses-d0653_T1w.nii.gz"]
    left_out = [f"{session}/anat2/sub-OAS30001_ses-d0129_run-01_T1w.json"]
    left_out += [f"{session}/func1/sub-OAS30001_ses-d0129_task-rest_run-01_bold.nii.gz"]
    left_out += ["disc1/OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/OAS1_0001_MR1_mpr_n4_anon_111_t88_gfc.img"]
    write(tmp_path, *names, *left_out)
    assert found("oasis", tmp_path) == [
        (names[0], names[0], (), "OAS30001", None),
        (names[1], names[1], (), "OAS30001", None),
        (names[2], names[2], (), "OAS30002", None),
    ]
    assert kinds("oasis", tmp_path) == {("mri", "brain")}


def test_oasis_1_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "disc1/OAS1_0001_MR1/RAW/OAS1_0001_MR1_mpr-1_anon.img")
    with pytest.raises(SourceError) as caught:
        found("oasis", tmp_path)
    assert caught.value.location == str(tmp_path)
