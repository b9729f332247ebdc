"""`m3ret embed`, `m3ret index` and `m3ret search`: from files of any kind to hits, without names of persons."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_config
from processes import Script
from pydicom.data import get_testdata_file
from scan_files import CT, PLANTED, dicom, dicom_bytes, nifti_bytes, series
from scan_folders import picture_bytes, put, texture, video_bytes, write_manifest
from test_cli import run
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from dataset_scripts import builder
from dataset_scripts.builder import Pseudonyms
from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret.data.collection import Record
from modeling_m3ret.data.parquet import ParquetRow
from modeling_m3ret.embed import pseudonymise
from modeling_m3ret.errors import InputError
from modeling_m3ret.search import embedding_store
from modeling_m3ret.search.embedding_table import read_embeddings
from modeling_m3ret.search.index import RetrievalIndex


ROOT = Path(__file__).parents[1]
SALT = b"a salt of the tests, known to all"
PLANE = np.random.default_rng(3).integers(0, 200, (40, 36), dtype=np.uint8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a cache and a salt of the test."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "salt").write_bytes(SALT)
    for module in (builder, embedding_store):
        monkeypatch.setattr(module, "CACHE_FOLDER", tmp_path / "cache")


def save_tiny(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    M3RetModel(tiny_config()).save_pretrained(folder)
    M3RetImageProcessor(size=48, num_frames=8).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "m3ret-tiny")


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Return a folder of six readable scans of two known patients, and two broken ones, with names in every place."""
    volume = np.random.default_rng(1).integers(0, 900, (20, 18, 6)).astype(np.int16)
    header = {"Modality": "CT", "StudyInstanceUID": "1.9", "RescaleSlope": 1, "RescaleIntercept": 0}
    slices = series(volume, np.diag([-1.0, -1.0, 2.0, 1.0]), sop=CT, series="1.2.3.1", **header)
    files = {f"{PLANTED}/a/{number}": dicom_bytes(one) for number, one in enumerate(slices)}
    files |= {
        f"{PLANTED}/chest.dcm": dicom_bytes(dicom(PLANE, Modality="DX", BodyPartExamined="CHEST")),
        f"{PLANTED}/secondary/hand.dcm": dicom_bytes(dicom(PLANE.T.copy(), Modality="DX", PatientID="PLANTED-B")),
        f"mri/{PLANTED}.nii.gz": nifti_bytes(volume, np.diag([1.0, 1.0, 2.0, 1.0]), zipped=True),
        f"endoscopy/{PLANTED}.mp4": video_bytes(5, title=PLANTED),
        f"xray/{PLANTED}.png": picture_bytes(texture(4)),
        f"xray/{PLANTED}-broken.png": b"no picture",
        f"{PLANTED}/broken.dcm": dicom_bytes(dicom(PLANE, Modality="DX"))[:-900],
        f"{PLANTED}/notes.txt": PLANTED.encode(),
    }
    return put(tmp_path / "scans", files)


def embed(monkeypatch: pytest.MonkeyPatch, scans: object, model: Path, output: Path, *options: object) -> pa.Table:
    argv = ("embed", scans, "--model", model, "-o", output, "--num_workers", 0, *options)
    assert run(monkeypatch, *argv) == 0
    return pq.read_table(output)


def read_key(file: Path) -> dict[str, str]:
    with file.open(newline="") as stream:
        return {row["id"]: row["file"] for row in csv.DictReader(stream)}


def test_vectors_of_a_folder_are_those_of_the_model(
    scans: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, key = tmp_path / "e.parquet", tmp_path / "key.csv"
    table = embed(monkeypatch, scans, checkpoint, output, "--key", key)
    file_of = read_key(key)
    sources: list[Any] = [Path(file_of[id]) for id in table["id"].to_pylist()]
    sources = [source.parent if source.parent.name == "a" else source for source in sources]  # a series
    names = {source.relative_to(scans).as_posix() for source in sources}
    scan_names = {f"{PLANTED}/a", f"{PLANTED}/chest.dcm", f"{PLANTED}/secondary/hand.dcm", f"mri/{PLANTED}.nii.gz"}
    assert names == scan_names | {f"endoscopy/{PLANTED}.mp4", f"xray/{PLANTED}.png"}
    model, processor = M3RetModel.from_pretrained(checkpoint).eval(), M3RetImageProcessor.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = model.embed_scans(**processor(sources, return_tensors="pt"))
    vectors, metadata, facts = read_embeddings([output])
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 48)
    assert facts.model == "m3ret-tiny"
    printed = capsys.readouterr().err
    assert all(name in printed for name in (f"{PLANTED}-broken.png", "broken.dcm"))

    modality_of = dict(zip(sources, metadata["modality"].to_pylist(), strict=True))
    known = {"a": "ct", "chest.dcm": "xray", f"{PLANTED}.nii.gz": "mri", f"{PLANTED}.mp4": "endoscopy"}
    assert {source.name: modality_of[source] for source in sources if source.name in known} == known
    patient_of = {source.name: name for source, name in zip(sources, metadata["patient"].to_pylist(), strict=True)}
    pseudonyms = Pseudonyms("folder", SALT)
    assert patient_of["a"] == patient_of["chest.dcm"] == pseudonyms.pseudonym("patient", PLANTED)
    assert patient_of["hand.dcm"] == pseudonyms.pseudonym("patient", "PLANTED-B")
    assert len(set(patient_of.values())) == 5  # files without a patient are patients of their own


def test_output_holds_no_names(scans: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed(monkeypatch, scans, checkpoint, tmp_path / "e.parquet")
    rows = [{"id": f"{PLANTED}-{n}", "file": f"xray/{PLANTED}.png", "modality": "xray"} for n in range(2)]
    words = {"anatomy": PLANTED, "label": f"pneumonia|{PLANTED}", "group": PLANTED, "source": PLANTED, "name": PLANTED}
    write_manifest(scans, [row | words for row in rows])
    table = embed(monkeypatch, scans, checkpoint, tmp_path / "m.parquet")
    assert table["labels"].to_pylist() == [["pneumonia"]] * 2
    assert len(set(table["patient"].to_pylist())) == 1
    argv = ("index", tmp_path / "e.parquet", tmp_path / "m.parquet", "-o", tmp_path / "index")
    assert run(monkeypatch, *argv) == 0
    written = [path for path in (tmp_path / "index").rglob("*") if path.is_file()]
    for path in [*written, tmp_path / "e.parquet", tmp_path / "m.parquet"]:
        content = path.read_bytes()
        if path.suffix == ".parquet":  # it is compressed
            table = pq.read_table(path)
            content += f"{table.to_pydict()} {table.schema.metadata} {pq.read_metadata(path).metadata}".encode()
        for name in (PLANTED, PLANTED.lower(), "PLANTED", "1.2.3.1", "19700101", str(tmp_path), "hand.dcm", "notes"):
            assert name.encode() not in content, (path.name, name)


def test_files_that_are_named_are_all_embedded(
    scans: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real files; one has the name of a segmentation mask, which is left out of a folder."""
    real = [get_testdata_file(name) for name in ("CT_small.dcm", "MR_small.dcm", "examples_ybr_color.dcm")]
    mask = tmp_path / "mask.png"
    mask.write_bytes(picture_bytes(texture(9)))
    command = ("embed", *real, mask, mask, "--model", checkpoint, "-o", tmp_path / "e.parquet", "--num_workers", 0)
    assert run(monkeypatch, *command) == 0
    table = pq.read_table(tmp_path / "e.parquet")
    assert sorted(table["modality"].to_pylist()) == ["", "ct", "mri", "ultrasound"]
    assert not re.search(r"CompressedSamples|Lestrade|CT_small", str(table.to_pydict()))


def test_hits_are_the_nearest_scans(
    scans: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key, folder = tmp_path / "key.csv", tmp_path / "index"
    embed(monkeypatch, scans, checkpoint, tmp_path / "e.parquet", "--key", key)
    assert run(monkeypatch, "index", tmp_path / "e.parquet", "-o", folder) == 0
    vectors, metadata, facts = read_embeddings([tmp_path / "e.parquet"])
    index = RetrievalIndex.load(folder, facts)
    assert index.metadata["id"].to_pylist() == metadata["id"].to_pylist()

    renamed = checkpoint.rename(tmp_path / "renamed")
    query = scans / PLANTED / "chest.dcm"
    command = ("search", query, "--index", folder, "--model", renamed, "-k", 3)
    capsys.readouterr()
    assert run(monkeypatch, *command, "--key", key, "--json") == 0
    (answer,) = json.loads(capsys.readouterr().out)
    own = [file for file in read_key(key).values()].index(str(query))
    expected = (vectors @ vectors[own]).topk(3)
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2, 3]
    assert [hit["id"] for hit in answer["hits"]] == [metadata["id"][row].as_py() for row in expected.indices.tolist()]
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx(expected.values.tolist(), abs=2e-3)
    assert answer["hits"][0]["file"] == answer["query"] == str(query)

    assert run(monkeypatch, *command, "--modality", "MR", "endoscopy") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(query)
    assert len(printed) == 2 + 2  # query, header, and the only two scans of these modalities
    assert run(monkeypatch, "search", scans / PLANTED / "a", "--index", folder, "--model", renamed, "--json") == 0
    (answer,) = json.loads(capsys.readouterr().out)  # the series is one query
    assert answer["hits"][0]["modality"] == "ct"
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=2e-3)


@pytest.fixture
def no_log() -> Iterator[None]:
    """Log nothing: pytest-xdist cannot transfer a log with a name that is not text, and stops the whole run."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("no_log")
def test_names_of_files_need_not_be_text(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"M\xfcller.png")
    put(tmp_path / "scans", {name: picture_bytes(texture(1)), f"broken-{name}": b"no picture"})
    key = tmp_path / "key.csv"
    table = embed(monkeypatch, tmp_path / "scans", checkpoint, tmp_path / "e.parquet", "--key", key)
    assert len(table) == 1
    assert run(monkeypatch, "index", tmp_path / "e.parquet", "-o", tmp_path / "index") == 0
    query = tmp_path / "scans" / name
    command = ("search", query, "--index", tmp_path / "index", "--model", checkpoint, "--key", key)
    assert run(monkeypatch, *command) == 0
    capsys.readouterr()
    assert run(monkeypatch, *command, "--json") == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["hits"][0]["file"] == str(query)


def test_pseudonyms_of_a_dataset_are_retained() -> None:
    row = Record("0123", ParquetRow("shard.parquet", 0, 0, 1), "ct", "", "", "4567")
    file = Record("0123", Path("a.dcm"), "ct", "", "", "4567")
    (of_row, of_file) = pseudonymise([row, file], SALT)
    assert of_row == row
    assert not {of_file.id, of_file.group} & {"0123", "4567"}


def test_another_model_is_refused(
    scans: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    embed(monkeypatch, scans / "xray", checkpoint, tmp_path / "e.parquet")
    assert run(monkeypatch, "index", tmp_path / "e.parquet", "-o", tmp_path / "index") == 0
    other = save_tiny(tmp_path / "other" / "m3ret-tiny", seed=1)
    embed(monkeypatch, scans / "xray", other, tmp_path / "o.parquet")
    capsys.readouterr()
    query = scans / "xray" / f"{PLANTED}.png"
    assert run(monkeypatch, "search", query, "--index", tmp_path / "index", "--model", other) == 2
    assert run(monkeypatch, "index", tmp_path / "e.parquet", tmp_path / "o.parquet", "-o", tmp_path / "both") == 2
    assert not (tmp_path / "both").exists()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_models_of_transformers_embed_too(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "dinov3-tiny")
    transform = {"size": 32, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "dinov3-tiny" / "preprocessor_config.json").write_text(json.dumps(transform))
    table = embed(monkeypatch, scans, tmp_path / "dinov3-tiny", tmp_path / "e.parquet")
    assert (len(table), table.schema.field("vector").type.list_size) == (6, 16)
    assert run(monkeypatch, "index", tmp_path / "e.parquet", "-o", tmp_path / "index") == 0
    query = scans / "xray" / f"{PLANTED}.png"
    capsys.readouterr()
    command = ("search", query, "--index", tmp_path / "index", "--model", tmp_path / "dinov3-tiny", "--json")
    assert run(monkeypatch, *command) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=2e-3)


def test_datasets_reads_the_vectors(
    scans: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    table = embed(monkeypatch, scans / "xray", checkpoint, tmp_path / "e.parquet")
    dataset = Dataset.from_parquet(str(tmp_path / "e.parquet"), cache_dir=str(tmp_path / "datasets"))
    assert dataset.features["vector"].length == 48
    assert np.array_equal(dataset.with_format("numpy")["vector"][:], np.stack(table["vector"].to_numpy()))


@pytest.mark.parametrize("content", [b"", b"PAR1 but damaged PAR1", None, {"x": [1]}, {"id": ["a"], "vector": [[1.0]]}])
def test_other_files_are_no_embeddings(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "e.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        pq.write_table(pa.table(content), path)
    with pytest.raises(InputError) as caught:
        read_embeddings([path])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("wrong", ["model", "output", "key", "scans", "mixed", "unreadable"])
def test_wrong_arguments_end_in_one_line_and_write_nothing(
    wrong: str,
    scans: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"model": checkpoint, "output": tmp_path / "e.parquet", "key": tmp_path / "key.csv", "scans": scans}
    if wrong in given:
        given[wrong] = tmp_path / "missing" / "file.npz"
    sources = [given["scans"]]
    if wrong == "mixed":
        sources.append(scans / "mri")
    if wrong == "unreadable":
        sources = [scans / "xray" / f"{PLANTED}-broken.png"]
    options = ("--model", given["model"], "-o", given["output"], "--key", given["key"], "--num_workers", 0)
    assert run(monkeypatch, "embed", *sources, *options) == 2
    assert "m3ret embed: error: " in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("*.parquet")) + list(tmp_path.glob("*.csv"))


PROCESS = """
import os, signal, sys
sys.path[:0] = [{root!r}]
from pathlib import Path
import torch
from dataset_scripts import builder
from modeling_m3ret import cli, cpu
from modeling_m3ret.search import embedding_store
folder, end, sys.argv = Path(sys.argv[1]), sys.argv[2], ["m3ret", *sys.argv[3:]]
builder.CACHE_FOLDER = embedding_store.CACHE_FOLDER = folder
embedding_store.SHARD_SCANS = 2
atomic_write, written = embedding_store.atomic_write, []
def count(path):
    if end == "die" and len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path)
    return atomic_write(path)
embedding_store.atomic_write = count
cli.main()
print("shards:", len(written))
"""


@pytest.mark.slow
def test_output_does_not_depend_on_a_kill_or_on_processes(scans: Path, checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS.format(root=str(ROOT)))

    def start(name: str, end: str, ranks: int = 1) -> Script:
        output, cache = tmp_path / f"{name}.parquet", tmp_path / f"cache-{name}"
        cache.mkdir(exist_ok=True)
        (cache / "salt").write_bytes(SALT)
        command = ["embed", str(scans), "--model", str(checkpoint), "-o", str(output), "--num_workers", "1"]
        return Script([str(script), str(cache), end, *command], tmp_path, ranks, ACCELERATE_USE_CPU="true")

    def shards(printed: str) -> list[int]:
        return sorted(int(number) for number in re.findall(r"shards: (\d)", printed))

    whole = start("whole", "live")
    assert whole.finish() == 0, whole.printed
    assert shards(whole.printed) == [4]
    two = start("two", "live", ranks=2)
    assert two.finish() == 0, two.printed
    assert shards(two.printed) == [2, 2]
    assert start("killed", "die").finish() == -signal.SIGKILL
    assert not list(tmp_path.glob("*killed*.parquet*"))
    resumed = start("killed", "live")
    assert resumed.finish() == 0, resumed.printed
    assert shards(resumed.printed) == [2]  # of four: the others were not computed again
    expected = pq.read_table(tmp_path / "whole.parquet")
    assert len(expected) == 6
    for name in ("two", "killed"):
        table = pq.read_table(tmp_path / f"{name}.parquet")
        assert table.drop_columns("vector").equals(expected.drop_columns("vector"), check_metadata=True)
        vectors, same = (torch.tensor(one["vector"].to_pylist()) for one in (table, expected))
        torch.testing.assert_close(vectors, same, atol=1e-5, rtol=0)
