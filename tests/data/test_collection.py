"""Collections: what a manifest must hold, and patients that stay on their side of the split."""

from __future__ import annotations

from pathlib import Path

import pytest

from modeling_m3ret.data.collection import (
    CollectionError,
    Record,
    check_modalities,
    exclude_modalities,
    open_collection,
    read_manifest,
    split_by_group,
)


HEADER = "id,file,modality,anatomy,label,group,source,licence,extra\n"


def write(folder: Path, text: str) -> Path:
    (folder / "manifest.csv").write_text(text)
    return folder


def test_a_manifest_gives_its_rows_in_order(tmp_path: Path) -> None:
    rows = "a,x/1.png,xray,chest,pneumonia,p1,,,\nb,y.nii,ct,head,head,,,,\n"
    records = open_collection(write(tmp_path, HEADER + rows))
    assert records[0] == Record("a", tmp_path / "x/1.png", "xray", "chest", "pneumonia", "p1")
    assert records[1].group == "b"  # a scan of no known patient is a group of its own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,file\n", "expected also modality, anatomy, label, group"),
        (HEADER, "found no row"),
        (HEADER + "a\n", "line 2: found a row without"),
        (HEADER + "a,,xray,c,l,p,,,\n", "line 2: found a row without"),
        (HEADER + "a,1.png,xray,c,l,p,,,\na,2.png,xray,c,l,p,,,\n", "ids repeat"),
        (HEADER + "a,../1.png,xray,c,l,p,,,\n", "outside the folder"),
        (HEADER + "a,/etc/passwd,xray,c,l,p,,,\n", "outside the folder"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CollectionError, match=message):
        read_manifest(write(tmp_path, text))


def test_a_manifest_from_a_spreadsheet_is_read(tmp_path: Path) -> None:
    text = HEADER + "a,1.png,xray,c,Fraktur des Schlüsselbeins,p,,,\n"
    (tmp_path / "manifest.csv").write_bytes(text.encode("utf-8-sig"))
    assert read_manifest(tmp_path)[0].label == "Fraktur des Schlüsselbeins"
    (tmp_path / "manifest.csv").write_bytes(text.encode("cp1252"))
    with pytest.raises(CollectionError, match="not UTF-8"):
        read_manifest(tmp_path)


def test_no_manifest_is_said(tmp_path: Path) -> None:
    with pytest.raises(CollectionError, match=r"no manifest\.csv"):
        open_collection(tmp_path / "nothing")
    with pytest.raises(CollectionError, match="phantom:SUBJECTS"):
        open_collection("phantom:many")


def records_of(groups: int, scans: int = 3) -> list[Record]:
    return [
        Record(f"{g}-{s}", Path("x"), ("ct", "mri", "xray")[s], "a", "l", f"patient-{g}")
        for g in range(groups)
        for s in range(scans)
    ]


def test_a_patient_is_on_one_side_and_stays_there() -> None:
    training, held_out = split_by_group(records_of(400), 0.3)
    assert not {r.group for r in training} & {r.group for r in held_out}
    assert len(training) + len(held_out) == 1200
    assert len(held_out) / 1200 == pytest.approx(0.3, abs=0.07)  # three standard errors of 400 patients
    _, held_out_of_more = split_by_group(records_of(800), 0.3)
    assert set(held_out) <= set(held_out_of_more)
    _, held_out_of_larger_part = split_by_group(records_of(400), 0.5)
    assert set(held_out) <= set(held_out_of_larger_part)
    assert split_by_group(records_of(10), 0)[1] == []


def test_excluded_modalities_leave() -> None:
    assert {r.modality for r in exclude_modalities(records_of(4), ["MRI"])} == {"ct", "xray"}


def test_a_modality_that_does_not_exist_is_refused() -> None:
    """The schema's are known without a record of them, and a manifest's own are."""
    check_modalities(["MRI", "ultrasound", "oct"], [Record("a", Path("x"), "OCT", "", "", "p")])
    with pytest.raises(CollectionError, match="found no modality mrr, expected some of ct, endoscopy, mri, ultrasound"):
        check_modalities(["ct", "MRR"], records_of(4))


@pytest.mark.parametrize("data", ["folder", "phantom:1"])
def test_what_is_no_parquet_data_set_is_not_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder", HEADER + "a,1.png,xray,chest,l,p,,,\n")
    with pytest.raises(CollectionError, match=f"{data}: found no Parquet data set, expected one to stream"):
        open_collection(data, stream=True)
