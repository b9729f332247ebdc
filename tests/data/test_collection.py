"""Collections: which manifests are accepted, and that patients stay on their side of a split."""

from __future__ import annotations

import gc
import pickle
import unicodedata
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_m3ret.data.collection import (
    Record,
    Records,
    exclude_modalities,
    open_collection,
    read_manifest,
    split_by_group,
    split_training_and_held_out,
)
from modeling_m3ret.data.parquet import ParquetRow
from modeling_m3ret.data.schema import CollectionError
from modeling_m3ret.data.table import COLUMNS, TableError
from modeling_m3ret.errors import InputError
from modeling_m3ret.evaluation.leakage import select_records
from modeling_m3ret.evaluation.protocols import ACROSS_BY_ANATOMY, WITHIN_MODALITY, Annotations


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


def parquet_records(count: int) -> Iterator[Record]:
    for i in range(count):
        location = ParquetRow(f"train-{i // 500}.parquet", i // 64, i % 64, 10_000 + i)
        form = {"shape": (1 + i % 3, 20, 30), "spacing": (None, 1.0, 0.5), "is_clip": i % 2 == 0}
        identity = {"id": f"{i:016x}", "group": f"{i // 2:016x}", "source": f"source {i % 5}"}
        yield Record(location=location, modality="ct", anatomy="chest", label="a|b", **identity, **form)


def test_columns_hold_the_same_records(tmp_path: Path) -> None:
    series = (tmp_path / "1.dcm", tmp_path / "2.dcm")
    expected = [
        *parquet_records(5000),
        Record("a", tmp_path / "1.png", "xray", "", "", "p", intensity="8-bit"),
        *(Record(f"s{n}", series[:n], "mri", "head", "", "p", "test", shape=(2, 3, 4)) for n in (1, 2)),
    ]
    records = Records.of(iter(expected))
    assert records == expected
    assert [records[index] for index in (0, 4096, -1, -3)] == [expected[index] for index in (0, 4096, -1, -3)]
    assert records[4999::-2] == expected[4999::-2]
    assert records.take([3, 1, 3]) == [expected[index] for index in (3, 1, 3)]
    assert pickle.loads(pickle.dumps(records)) == expected
    for field in fields(Record):
        if field.name != "location":
            assert [*map(_tupled, records.column(field.name))] == [getattr(record, field.name) for record in expected]
    assert records.parquet_rows() is None
    assert [*records[:5000:7].parquet_rows()] == [record.location for record in expected[:5000:7]]
    with pytest.raises(IndexError):
        records[len(expected)]
    assert Records.of([]) == []


def _tupled(cell: Any) -> Any:
    return tuple(cell) if isinstance(cell, list) else cell


def test_a_record_of_a_dataset_takes_less_than_160_bytes() -> None:
    gc.collect()
    before = len(gc.get_objects())
    records = Records.of(parquet_records(20_000))
    gc.collect()
    assert len(gc.get_objects()) - before < 1000, "Python holds no object for each record"
    assert records.table.nbytes < 160 * len(records)
    assert len({*map(id, records.column("source"))}) == 5


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


@pytest.mark.parametrize("excluded", [["MR"], [" mri "], ["Magnetic Resonance"], ["ＭＲＩ"], ("mri", "Ultrasound")])
def test_excluded_modalities_may_be_spelled_in_any_way(excluded: list[str]) -> None:
    assert {record.modality for record in exclude_modalities(make_records(4), excluded)} == {"ct", "xray"}


@pytest.mark.parametrize("excluded", [["ct", "MRR"], ["pet"], [""], ["ct,mri"], "mri", None, [7]])
def test_unknown_modalities_are_refused(excluded: Any) -> None:
    """An unknown word would exclude nothing, and its scans would be trained on."""
    with pytest.raises(InputError):
        exclude_modalities(make_records(4), excluded)


# ------------------------------------------------------------------------------------------------- words of a table


def read_rows(folder: Path, *rows: str, header: str = "id,file,modality,anatomy,label,group,split") -> list[Record]:
    (folder / "manifest.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8", newline="")
    return open_collection(folder)


@pytest.mark.parametrize(
    ("modality", "words"),
    [
        # the two-letter words are those of DICOM PS3.3 C.7.3.1.1.1
        ("mri", ["mri", "MRI", " mri", "mri\u00a0", "\u200bmri", "ＭＲＩ", "MR", "M.R.I.", "magnetic resonance"]),
        ("xray", ["X-ray", "x ray", "X_Ray", "x‑ray", "XRAY", "CR", "dx", "CXR", "radiograph"]),
        ("ct", ["CT ", "ct", "C.T.", "computed tomography", "\tCT"]),
        ("ultrasound", ["US", "Ultrasound", "ultra sound", "sonography"]),
        ("endoscopy", ["ES", "Endoscopy", "colonoscopy"]),
    ],
)
def test_spellings_of_a_modality_are_equal(tmp_path: Path, modality: str, words: list[str]) -> None:
    rows = [f'{number},1.png,"{word}",a,l,p,' for number, word in enumerate(words)]
    assert {record.modality for record in read_rows(tmp_path, *rows)} == {modality}


@pytest.mark.parametrize(
    ("word", "near"), [("mrri", "mri"), ("ultrsound", "ultrasound"), ("xrey", "xray"), ("crt", "c")]
)
def test_unknown_modality_is_refused_with_the_nearest(tmp_path: Path, word: str, near: str) -> None:
    with pytest.raises(TableError) as raised:
        read_rows(tmp_path, "a,1.png,ct,a,l,p,", f"b,1.png,{word},a,l,p,")
    assert (raised.value.location, raised.value.got) == (f"{tmp_path / 'manifest.csv'}, line 3", repr(word))
    assert near in raised.value.advice


@pytest.mark.parametrize("word", ["pet", "histology", "ct|mri", "ct/mr", "c", "СТ", "0"])  # one is in Cyrillic
def test_other_words_are_not_modalities(tmp_path: Path, word: str) -> None:
    with pytest.raises(CollectionError):
        read_rows(tmp_path, f"a,1.png,{word},a,l,p,")


def test_spellings_of_anatomy_and_labels_are_equal(tmp_path: Path) -> None:
    rows = [
        "a,1.png,ct,Chest,Nodule | effusion,p,",
        "b,1.png,ct,chest ,nodule\u00a0|nodule,q,",
        "c,1.png,ct,N/A,NaN,r,",
    ]
    rows += ["d,1.png,ct,caf\u00e9,\u00e9,s,", "e,1.png,ct,cafe\u0301,e\u0301,t,"]
    records = read_rows(tmp_path, *rows)
    assert [record.anatomy for record in records] == ["chest", "chest", "", "caf\u00e9", "caf\u00e9"]
    # missing cells as `pandas.read_csv` defines them
    assert [record.label for record in records] == ["Nodule|effusion", "Nodule", "", "\u00e9", "\u00e9"]
    facts = Annotations(records)
    assert facts.labels.shape[1] == 3
    assert [title for title, _ in WITHIN_MODALITY.parts(facts)] == ["ct"]
    relevant, candidate = ACROSS_BY_ANATOMY.masks(facts, torch.arange(5))
    assert not (relevant & candidate).any()  # one modality has no other


# ------------------------------------------------------------------------------------------------ dialects of a table


PLAIN = "id,file,modality,anatomy,label,group,split\na,x/1.png,ct,chest,x,p,train\nb,y.png,mri,head,y,q,test\n"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(PLAIN.replace(",", ";").encode(), id="semicolons"),
        pytest.param(("sep=;\n" + PLAIN.replace(",", ";")).encode(), id="delimiter named by Excel"),
        pytest.param(PLAIN.replace(",", "\t").encode(), id="tabs"),
        pytest.param(PLAIN.replace("\n", "\r\n").encode("utf-8-sig"), id="carriage returns and byte order mark"),
        pytest.param(PLAIN.replace("\n", "\r").encode(), id="carriage returns only"),
        pytest.param((PLAIN + "\n\n , \n,,,,,,\n").encode(), id="empty lines"),
        pytest.param(PLAIN.rstrip().encode(), id="no end of line"),
        pytest.param(PLAIN.replace(",", " , ").encode(), id="spaces"),
        pytest.param(('"' + PLAIN.strip().replace(",", '", "').replace("\n", '"\n"') + '"').encode(), id="quoted"),
        pytest.param(PLAIN.replace("id,file", "ID,File").replace("split", "Split ").encode(), id="case of columns"),
        pytest.param(PLAIN.replace("\n", ",\n").encode(), id="delimiter at the end"),
        pytest.param(PLAIN.replace("train\n", "Training\n").replace("test\n", "TEST\n").encode(), id="words of splits"),
    ],
)
def test_table_is_read_in_any_dialect(tmp_path: Path, data: bytes) -> None:
    """The values are those that `pandas.read_csv(sep=..., skipinitialspace=True)` gives, without spaces at the end."""
    (tmp_path / "manifest.csv").write_bytes(data)
    assert open_collection(tmp_path) == [
        Record("a", tmp_path / "x/1.png", "ct", "chest", "x", "p", "train"),
        Record("b", tmp_path / "y.png", "mri", "head", "y", "q", "test"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(PLAIN + "c,z.png,ct,a,nodule, large,p,train\n", id="unquoted delimiter"),
        pytest.param(PLAIN.replace("label", "group", 1), id="column repeated"),
        pytest.param(PLAIN.replace("label", "Split", 1), id="column repeated in another case"),
        pytest.param(PLAIN + 'c,z.png,ct,a,"open,p,train\nd,z.png,ct,a,l,p,test\n', id="quote not closed"),
        pytest.param(PLAIN + "c,z.png,ct,a\n", id="cells missing"),
        pytest.param(PLAIN + ",z.png,ct,a,l,p,\n", id="id empty"),
        pytest.param(PLAIN + "a ,z.png,ct,a,l,p,\n", id="id repeated but for a space"),
        pytest.param(PLAIN.replace("split", "splits"), id="column split misspelled"),
        pytest.param(PLAIN.replace("split", "spilt"), id="letters of split swapped"),
        *(
            pytest.param(PLAIN.replace("test", word), id=word)
            for word in ("tset", "trian", "held out", "0", "train/test")
        ),
    ],
)
def test_table_that_may_be_misread_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.csv").write_text(text)
    with pytest.raises(TableError):
        open_collection(tmp_path)


def test_splits_under_another_name_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "manifest.csv").write_text(PLAIN.replace("split", "subset"))
    assert {record.split for record in open_collection(tmp_path)} == {""}
    assert len(caplog.records) == 1


def test_file_name_in_another_unicode_form_is_found(tmp_path: Path) -> None:
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        folder = tmp_path / form
        folder.mkdir()
        (folder / unicodedata.normalize(form, "é.png")).touch()
        record = read_rows(folder, unicodedata.normalize(other, "a,é.png,ct,a,l,p,"))[0]
        assert isinstance(record.location, Path)
        assert record.location.exists()


# ---------------------------------------------------------------------------------------------------------- splits


def test_splits_of_a_manifest_are_honoured(tmp_path: Path) -> None:
    rows = [f"{n},1.png,ct,a,l,p{n},{split}" for n, split in enumerate(["train", "Test", "val", "TRAINING", "dev", ""])]
    records = read_rows(tmp_path, *rows)
    assert [record.split for record in records] == ["train", "test", "validation", "train", "validation", ""]
    training, held_out = split_training_and_held_out(records, 0.5)
    assert [[record.id for record in part] for part in (training, held_out)] == [["0", "3", "5"], ["2", "4"]]
    assert [record.id for record in select_records(records, "test", None)] == ["1"]
    with pytest.raises(CollectionError):
        select_records(records, "tset", None)


def test_patient_never_crosses_a_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A scan without a split follows its patient; a patient who is also tested on is not trained on."""
    rows = ["a,a.png,ct,a,l,p,test", "b,b.png,ct,a,l,p,", "c,c.png,ct,a,l,q,train", "d,d.png,ct,a,l,q,test"]
    records = read_rows(tmp_path, *rows, "e,e.png,ct,a,l,r,train", "f,f.png,ct,a,l,r,val", "g,g.png,ct,a,l,s,train")
    assert [record.split for record in records] == ["test", "test", "train", "test", "train", "validation", "train"]
    training, held_out = split_training_and_held_out(records, 0.3)
    assert [[record.id for record in part] for part in (training, held_out)] == [["g"], ["f"]]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("other", ["b,1.png,ct,a,l,q,test", "b,./1.png,ct,a,l,q,val", "b,1.png,ct,a,l,q,"])
def test_file_in_two_splits_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, other: str) -> None:
    read_rows(tmp_path, "a,1.png,ct,a,l,p,train", "c,2.png,ct,a,l,r,train", "d,2.png,ct,a,l,s,train", other)
    assert [record.args[1] for record in caplog.records] == [1]  # type: ignore[index]


def test_patients_with_similar_names_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["P 1", "p1", "P2", "P 1 ", "01", "1.0"]
    records = read_rows(tmp_path, *(f"{n},1.png,ct,a,l,{name}," for n, name in enumerate(names)))
    assert [record.group for record in records] == ["P 1", "p1", "P2", "P 1", "01", "1.0"]
    assert caplog.records[0].args[1] == 4  # type: ignore[index]
    assert "P2" not in caplog.text


def test_links_are_followed_wherever_they_point(tmp_path: Path) -> None:
    archive, folder = tmp_path / "archive", tmp_path / "folder"
    archive.mkdir()
    folder.mkdir()
    (archive / "1.png").touch()
    (folder / "linked.png").symlink_to(archive / "1.png")
    (folder / "linked").symlink_to(archive)
    records = read_rows(folder, "a,linked.png,ct,a,l,p,", "b,linked/1.png,ct,a,l,q,")
    assert [record.location for record in records] == [folder / "linked.png", folder / "linked/1.png"]


# ------------------------------------------------------------------------------------------------- without the Hub


@pytest.mark.parametrize("stream", [False, True])
def test_dataset_without_hub_and_cache_is_refused(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CollectionError, match="data/typo"):
        open_collection("data/typo", stream=stream)
