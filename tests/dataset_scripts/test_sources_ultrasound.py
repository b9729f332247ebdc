"""Ultrasound: BUSI, POCUS of the lung."""

from __future__ import annotations

from pathlib import Path

import pytest
from source_trees import found, kinds, write


@pytest.mark.parametrize("parent", ["", "Dataset_BUSI_with_GT/"])
def test_busi_masks_are_skipped(tmp_path: Path, parent: str) -> None:
    names = ["benign/benign (1).png", "benign/benign (1)_mask.png", "benign/benign (1)_mask_1.png"]
    names += ["malignant/malignant (2).png", "malignant/malignant (2)_mask.png", "malignant/Thumbs.db"]
    names += ["normal/normal (3).png", "normal/normal (3)_mask.png"]
    write(tmp_path, *(parent + name for name in names))
    assert found("busi", tmp_path) == [
        ("benign/benign (1)", f"{parent}benign/benign (1).png", ("benign",), "", None),
        ("malignant/malignant (2)", f"{parent}malignant/malignant (2).png", ("malignant",), "", None),
        ("normal/normal (3)", f"{parent}normal/normal (3).png", ("normal",), "", None),
    ]
    assert kinds("busi", tmp_path) == {("ultrasound", "breast")}


def test_pocus_reads_labels_from_names_and_patients_from_the_table(tmp_path: Path) -> None:
    table = (
        "Date added,Filename,Label,Patient ID / Name,Area according to DEGUM,,Effusion\n"
        "20.04.20,Cov-Atlas-Day+1,COVID-19,35,,,1\n20.04.20,Cov-Atlas-Day+2,COVID-19,35,,,1\n"
        "26.09.20,Cov_bolzano_Linee B 2,COVID-19,,,,0\n"
    )
    write(tmp_path, "data/dataset_metadata.csv", text=table)
    write(
        tmp_path / "data",
        "pocus_images/convex/Pneu_Avi_consolidated-lung.JPG",
        "pocus_images/linear/Reg_efsumb2.png",
        "pocus_videos/convex/Cov-Atlas-Day+1.gif",
        "pocus_videos/convex/Cov-Atlas-Day+2.gif",
        "pocus_videos/convex/notes.txt",
        "pocus_videos/linear/Vir_prospective_file1.mp4",
        "pocus_videos/linear/label_uncertain/Cov_bolzano_Linee B 2.mpeg",
        "pocus_videos/linear/unnamed.mov",
        "butterfly/Cov-Butterfly.mp4",
    )
    entries = found("pocus_lung", tmp_path)
    assert [entry[1] for entry in entries] == [f"data/{entry[0]}" for entry in entries]
    assert [(entry[0], *entry[2:]) for entry in entries] == [
        ("pocus_images/convex/Pneu_Avi_consolidated-lung.JPG", ("bacterial pneumonia",), "", None),
        ("pocus_images/linear/Reg_efsumb2.png", ("regular",), "", None),
        ("pocus_videos/convex/Cov-Atlas-Day+1.gif", ("COVID-19",), "35", None),
        ("pocus_videos/convex/Cov-Atlas-Day+2.gif", ("COVID-19",), "35", None),
        ("pocus_videos/linear/Vir_prospective_file1.mp4", ("viral pneumonia",), "", None),
        ("pocus_videos/linear/unnamed.mov", (), "", None),
        ("pocus_videos/linear/label_uncertain/Cov_bolzano_Linee B 2.mpeg", (), "", None),
    ]
    assert kinds("pocus_lung", tmp_path / "data") == {("ultrasound", "lung")}
