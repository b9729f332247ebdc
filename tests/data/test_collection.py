"""Collections: which manifests are accepted, and that patients stay on their side of a split."""

from __future__ import annotations

from pathlib import Path

import pytest

from modeling_m3ret.data.collection import (
    COLUMNS,
    Record,
    check_modalities,
    exclude_modalities,
    open_collection,
    read_manifest,
    split_by_group,
)
from modeling_m3ret.data.schema import MODALITIES, CollectionError


HEADER = "id,file,modality,anatomy,label,group,source,licence,extra\n"


def write_manifest(folder: Path, text: str) -> Path:
    (folder / "manifest.csv").write_text(text)
    return folder


def test_manifest_rows_are_read_in_order(tmp_path: Path) -> None:
    rows = "a,x/1.png,xray,chest,pneumonia,p1,s,,\nb,y.nii,ct,head,head,,,,\n"
    records = open_collection(write_manifest(tmp_path, HEADER + rows))
    assert records == [
        Record("a", tmp_path / "x/1.png", "xray", "chest", "pneumonia", "p1", source="s"),
        Record("b", tmp_path / "y.nii", "ct", "head", "head", "b"),  # unknown patient: a group of its own
    ]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param("id,file\n", COLUMNS, id="columns missing"),
        pytest.param(HEADER, (), id="no rows"),
        pytest.param(HEADER + "a\n", ("line 2",), id="cells missing"),
        pytest.param(HEADER + "a,,xray,c,l,p,,,\n", ("line 2",), id="file empty"),
        pytest.param(HEADER + "a,1.png,,c,l,p,,,\n", ("line 2",), id="modality empty"),
        pytest.param(HEADER + "a,1.png,xray,c,l,p,,,\na,2.png,xray,c,l,p,,,\n", ("'a'",), id="id repeated"),
        pytest.param(HEADER + "a,../1.png,xray,c,l,p,,,\n", ("line 2", "../1.png"), id="parent folder"),
        pytest.param(HEADER + "a,/etc/passwd,xray,c,l,p,,,\n", ("line 2", "/etc/passwd"), id="absolute path"),
    ],
)
def test_bad_manifests_are_refused_by_name(tmp_path: Path, text: str, named: tuple[str, ...]) -> None:
    with pytest.raises(CollectionError) as raised:
        read_manifest(write_manifest(tmp_path, text))
    assert all(name in str(raised.value) for name in (str(tmp_path / "manifest.csv"), *named))


def test_manifest_with_byte_order_mark_is_read_and_other_encodings_are_refused(tmp_path: Path) -> None:
    text = HEADER + "a,1.png,xray,c,Fraktur des Schlüsselbeins,p,,,\n"
    (tmp_path / "manifest.csv").write_bytes(text.encode("utf-8-sig"))
    assert read_manifest(tmp_path)[0].label == "Fraktur des Schlüsselbeins"
    (tmp_path / "manifest.csv").write_bytes(text.encode("cp1252"))
    with pytest.raises(CollectionError, match=r"manifest\.csv"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("data", ["nothing", "phantom:many", "phantom:1:2:3"])
def test_missing_collections_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CollectionError, match=data):
        open_collection(data)


@pytest.mark.parametrize("data", ["folder", "phantom:1"])
def test_only_parquet_data_sets_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    write_manifest(tmp_path / "folder", HEADER + "a,1.png,xray,chest,l,p,,,\n")
    with pytest.raises(CollectionError, match=data):
        open_collection(data, stream=True)


def make_records(groups: int) -> list[Record]:
    return [
        Record(f"{group}-{modality}", Path("x"), modality, "a", "l", f"patient-{group}")
        for group in range(groups)
        for modality in ("ct", "mri", "xray")
    ]


def test_patients_are_on_one_side_and_stay_there() -> None:
    training, held_out = split_by_group(make_records(400), 0.3)
    assert not {record.group for record in training} & {record.group for record in held_out}
    assert len(training) + len(held_out) == 1200
    assert len(held_out) / 1200 == pytest.approx(0.3, abs=0.07)  # three standard errors for 400 patients
    _, held_out_of_more_data = split_by_group(make_records(800), 0.3)
    assert set(held_out) <= set(held_out_of_more_data)
    _, larger_holdout = split_by_group(make_records(400), 0.5)
    assert set(held_out) <= set(larger_holdout)
    assert split_by_group(make_records(10), 0)[1] == []


def test_the_side_of_a_patient_is_the_recorded_one() -> None:
    """A checkpoint's held-out patients must still be held out by later versions."""
    _, held_out = split_by_group(make_records(12), 0.3)
    assert sorted({record.group for record in held_out}) == ["patient-2", "patient-5", "patient-8"]


def test_excluded_modalities_are_dropped() -> None:
    assert {record.modality for record in exclude_modalities(make_records(4), ["MRI"])} == {"ct", "xray"}


def test_unknown_modalities_are_refused() -> None:
    """Those of the schema are known without a record of them; a record's own modality is known too."""
    check_modalities(["MRI", "ultrasound", "oct"], [Record("a", Path("x"), "OCT", "", "", "p")])
    with pytest.raises(CollectionError) as raised:
        check_modalities(["ct", "MRR"], make_records(4))
    assert all(name in str(raised.value) for name in (*MODALITIES, "mrr"))
