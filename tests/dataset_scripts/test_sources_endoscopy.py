"""Endoscopy: HyperKvasir, LDPolypVideo, CholecT50."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from source_trees import found, kinds, write

from dataset_scripts.entries import SourceError


# ---------------------------------------------------------------------------------------------------------- HyperKvasir


def test_hyperkvasir_adds_the_findings_of_its_table_to_those_of_its_folders(tmp_path: Path) -> None:
    table = (
        "Video file,Organ,Finding 1,Finding 2,Classification 1,Classification 2\n"
        "7e37-41,Lower GI,Polyps,Stool - solid,Pathological findings,\n05a8-85.avi,Upper GI,Z-line,,,\n"
    )
    write(tmp_path, "labeled-videos/video-labels.csv", text=table)
    lower, upper = "lower-gi-tract/pathological-findings/polyps", "upper-gi-tract/anatomical-landmarks/z-line"
    write(tmp_path / "labeled-videos", f"{lower}/7e37-41.avi", f"{lower}/ffff-00.avi", f"{lower}/.DS_Store")
    write(tmp_path / "labeled-videos", f"{upper}/05a8-85.avi")
    assert found("hyperkvasir_videos", tmp_path) == [
        (f"{lower}/7e37-41.avi", f"labeled-videos/{lower}/7e37-41.avi", ("polyps", "stool solid"), "", None),
        (f"{lower}/ffff-00.avi", f"labeled-videos/{lower}/ffff-00.avi", ("polyps",), "", None),
        (f"{upper}/05a8-85.avi", f"labeled-videos/{upper}/05a8-85.avi", ("z line",), "", None),
    ]
    expected = {("endoscopy", "colon"), ("endoscopy", "upper gastrointestinal tract")}
    assert kinds("hyperkvasir_videos", tmp_path / "labeled-videos") == expected


# --------------------------------------------------------------------------------------------------------- LDPolypVideo


def test_ldpolypvideo_has_a_patient_for_each_video(tmp_path: Path) -> None:
    write(tmp_path, "TrainValid/Images/1/1.jpg", "TrainValid/Images/1/2.jpg", "TrainValid/Images/1/Thumbs.db")
    write(tmp_path, "TrainValid/Annotations/1/1.txt", text="2\n10 20 30 40\n50 60 70 80\n")
    write(tmp_path, "TrainValid/Annotations/1/2.txt", text="0\n")
    write(tmp_path, "Test/Images/101/vp_101_7.jpg", "Test/Images/102/3.jpg")
    write(tmp_path, "Test/Annotations/101/7.txt", text="1\n10 20 30 40\n")
    names = ["TrainValid/Images/1/1.jpg", "TrainValid/Images/1/2.jpg"]
    names += ["Test/Images/101/vp_101_7.jpg", "Test/Images/102/3.jpg"]
    assert found("ldpolypvideo", tmp_path) == [
        (names[0], names[0], ("polyp",), "TrainValid/1", "train"),
        (names[1], names[1], ("no polyp",), "TrainValid/1", "train"),
        (names[2], names[2], ("polyp",), "Test/101", "test"),  # the file of boxes is named by the frame number only
        (names[3], names[3], (), "Test/102", "test"),  # without a file of boxes
    ]
    assert kinds("ldpolypvideo", tmp_path) == {("endoscopy", "colon")}


# ------------------------------------------------------------------------------------------------------------ CholecT50


def cholect50(root: Path, annotations: dict[str, Any]) -> None:
    names = {"0": "preparation", "1": "carlot-triangle-dissection"}
    write(root, "labels/VID01.json", text=json.dumps({"categories": {"phase": names}, "annotations": annotations}))


def vector(phase: int) -> list[float]:
    return [-1, *[-1.0] * 13, phase]


def test_cholect50_has_a_phase_for_each_frame(tmp_path: Path) -> None:
    cholect50(tmp_path, {"0": [vector(0)], "1": [vector(1), vector(1)], "2": [], "3": [vector(-1)]})
    write(tmp_path, *(f"videos/VID01/00000{number}.png" for number in range(5)), "videos/VID01/Thumbs.db")
    for video in ("VID08", "VID111"):
        write(tmp_path, f"videos/{video}/000000.png")
        write(tmp_path, f"labels/{video}.json", text='{"categories": {"phase": {}}, "annotations": {}}')
    assert found("cholect50", tmp_path) == [
        ("VID01/000000", "videos/VID01/000000.png", ("preparation",), "VID01", "train"),
        ("VID01/000001", "videos/VID01/000001.png", ("carlot-triangle-dissection",), "VID01", "train"),
        ("VID01/000002", "videos/VID01/000002.png", (), "VID01", "train"),
        ("VID01/000003", "videos/VID01/000003.png", (), "VID01", "train"),
        ("VID01/000004", "videos/VID01/000004.png", (), "VID01", "train"),
        ("VID08/000000", "videos/VID08/000000.png", (), "VID08", "validation"),
        ("VID111/000000", "videos/VID111/000000.png", (), "VID111", "test"),
    ]
    assert kinds("cholect50", tmp_path) == {("endoscopy", "abdomen")}


@pytest.mark.parametrize("annotations", [{"0": [[1, 2]]}, {"0": [vector(9)]}, {"0": 3}, []])
def test_cholect50_with_other_labels_is_refused(tmp_path: Path, annotations: Any) -> None:
    write(tmp_path, "videos/VID01/000000.png")
    cholect50(tmp_path, annotations)
    with pytest.raises(SourceError) as caught:
        found("cholect50", tmp_path)
    assert caught.value.location == str(tmp_path / "labels" / "VID01.json")
