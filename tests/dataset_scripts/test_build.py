"""The build command: broken files are skipped, identifiers removed, and card and report match the rows."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset
from file_parts import TEXT, exif, planted_dicom, planted_nifti, written
from PIL import PngImagePlugin
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless
from scan_files import CINE, CT, PLANTED, dicom, dicom_bytes, series
from scan_folders import (
    SALT,
    bytes_of,
    picture_bytes,
    put,
    rows_of,
    texture,
    video_bytes,
    volume_bytes,
    write_manifest,
)
from test_reading_limits import BAD, nifti_claiming, zip_of

from dataset_scripts import build as build_module
from dataset_scripts.build import main
from dataset_scripts.builder import Pseudonyms
from dataset_scripts.sources import SOURCES
from modeling_m3ret.data.collection import open_collection
from modeling_m3ret.data.schema import MODALITIES, features
from modeling_m3ret.phantom import SYNTHETIC_SOURCE


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # about invalid values
ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(7)
GREY = texture(1, (48, 40))
VOLUME = RNG.integers(0, 900, (12, 10, 6)).astype(np.int16)


def run(root: Path, output: Path, *options: str, source: str = "folder") -> None:
    salt = root.parent / "salt of the tests"
    salt.write_bytes(SALT)
    main(["--source", source, "--root", str(root), "--output", str(output), "--salt_file", str(salt), *options])


def report_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------------- broken files


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def jpeg2000(*, corrupt: bool) -> bytes:
    stream = bytearray(picture_bytes(GREY, "JPEG2000", no_jp2=True))
    if corrupt:
        stream[len(stream) // 3 :] = RNG.bytes(len(stream) - len(stream) // 3)
        stream[2:60] = RNG.bytes(58)
    ds = dicom(GREY, PixelData=encapsulate([bytes(stream)]), Modality="CR")
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
    return dicom_bytes(ds)


def bitmap(bits: int, compression: int) -> bytes:
    """Return a BMP file that declares 8 x 8 pixels and holds one row."""
    header = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 16, 0, 0, 54) + header + b"\x12\x34" * 8


def other_codec() -> bytes:
    """Return a video with an unknown codec."""
    data = video_bytes(0)
    assert data.count(b"mp4v") == data.count(b"esds") == 1  # both name the codec
    return data.replace(b"mp4v", b"zzzz").replace(b"esds", b"zzzz")


BROKEN: dict[str, bytes | Callable[[], bytes]] = {
    **{name: data for name, data in BAD.items() if not name.startswith("bomb")},
    "huge.nii": nifti_claiming(1500, 1500, 1000),
    "pickled.npy": pickle.dumps(VOLUME),
    "infinite.npy": npy(np.array([[1, np.inf], [2, 3]])),
    "jpeg2000.dcm": jpeg2000(corrupt=True),
    "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="3" height="4"/></svg>',
    "letter.dcm": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<< /Type /Catalog >>\nendobj\n" * 9,
    "cut_16_bit.bmp": bitmap(16, 0),
    "odd_16_bit.bmp": bitmap(16, 9),
    "other_codec.mp4": other_codec(),
    "other_syntax.dcm": dicom_bytes(dicom(GREY)).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0"),
}
SPECIAL = ("dangling.png", "folder.png", "gone.png")
GOOD: dict[str, tuple[str, bytes]] = {
    "a.png": ("xray", picture_bytes(texture(2))),
    "b.jpg": ("xray", picture_bytes(texture(3), "JPEG")),
    "c.bmp": ("xray", picture_bytes(texture(4), "BMP")),
    "d.nii.gz": ("mri", volume_bytes(1, zipped=True)),
    "e.nii": ("mri", volume_bytes(2)),
    "f.npz": ("ct", zip_of("hu.npy", npy(RNG.integers(-1000, 900, (6, 12, 10)).astype(np.int16)))),
    "g.npy": ("ct", npy(RNG.integers(-1000, 900, (6, 12, 10)).astype(np.int16))),
    "h.mp4": ("ultrasound", video_bytes(3)),
    "i.dcm": ("ultrasound", dicom_bytes(dicom(np.stack([GREY, GREY[::-1]]), sop=CINE, Modality="US"))),
    "j.dcm": ("xray", jpeg2000(corrupt=False)),
}


def write_good_and_broken(root: Path) -> set[str]:
    """Write good and broken files into one folder, and return the names of the broken ones."""
    put(root, {name: data() if callable(data) else data for name, data in BROKEN.items()})
    put(root, {name: data for name, (_, data) in GOOD.items()})
    (root / "folder.png").mkdir(parents=True)
    (root / "dangling.png").symlink_to(root / "nothing")
    broken = {*BROKEN, *SPECIAL}
    if os.geteuid() != 0:  # root can read every file
        put(root, {"forbidden.png": picture_bytes(GREY)})
        (root / "forbidden.png").chmod(0)
        broken.add("forbidden.png")
    return broken


@pytest.mark.parametrize("with_manifest", [True, False])
def test_broken_files_are_reported_and_all_others_are_built(
    tmp_path: Path, with_manifest: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root, output = tmp_path / "scans", tmp_path / "built"
    broken = write_good_and_broken(root)
    assert len(broken) >= 30
    if with_manifest:
        kinds = {name: kind for name, (kind, _) in GOOD.items()}
        rows = [{"id": name, "file": name, "modality": kinds.get(name, "ct")} for name in sorted({*broken, *GOOD})]
        write_manifest(root, rows)
    else:  # only files are found
        broken -= {"folder.png", "gone.png", "packets.txt", "report.pdf"}  # folders and documents are skipped
    run(root, output, "--modality", "ct")
    report = report_of(output)
    assert report["scans"] == {"built": 10, "failed": len(broken), "duplicates_dropped": 0}
    reasons = {failure["file"]: failure["reason"] for failure in report["failures"]}
    assert len(report["failures"]) == len(reasons)
    assert set(reasons) == broken
    for reason in reasons.values():
        assert reason.count("\n") == 0 < len(reason)
    assert "18,000,000," in reasons["huge.nii"]
    if with_manifest:
        names = Pseudonyms("folder", SALT)
        assert {row["id"] for row in rows_of(output)} == {names.pseudonym("scan", name) for name in GOOD}
    assert report["patients"] == (10 if with_manifest else 9)  # two DICOM headers name the same patient
    printed = capsys.readouterr().out.splitlines()
    assert [int(text) for text in re.findall(r"\d+", printed[0])[:2]] == [10, report["patients"]]
    assert [int(text) for text in re.findall(r"\d+", printed[1])] == [len(broken)]


def test_folder_without_readable_scan_is_refused_with_a_report(tmp_path: Path) -> None:
    root, output = put(tmp_path / "scans", {"ct/a.png": b"", "ct/b.png": b"text"}), tmp_path / "built"
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            run(root, output)
        assert caught.value.code == 2
        assert {failure["file"] for failure in report_of(output)["failures"]} == {"ct/a.png", "ct/b.png"}
        assert not (output / "README.md").exists()


# ---------------------------------------------------------------------------------------------------------- identifiers


UID, DATE, TIME = "1.2.826.0.1.424242.77", "19531117", "135724.123"
NEEDLES = [text.encode() for text in (PLANTED, UID, DATE, "1953-11-17", "1953:11:17", TIME, "Jane^Doe")]


def dated_dicom(pixels: np.ndarray, **elements: Any) -> bytes:
    """Return a DICOM file with the planted text, dates, times and UIDs."""
    dates = ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "PatientBirthDate")
    dated = dict.fromkeys(dates, DATE) | dict.fromkeys(("StudyTime", "AcquisitionTime"), TIME)
    dated |= {"PatientName": f"Jane^Doe {PLANTED}", "StudyInstanceUID": f"{UID}.1", "FrameOfReferenceUID": f"{UID}.2"}
    ds = planted_dicom(pixels, **(dated | elements))
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{UID}.{RNG.integers(10**6)}"
    return written(ds)


def planted_files() -> dict[str, bytes]:
    volume = RNG.integers(0, 900, (14, 12, 6)).astype(np.int16)
    slices = [
        dated_dicom(
            np.ascontiguousarray(ds.pixel_array),
            **{"sop": CT, "series": f"{UID}.9", "Modality": "CT", "BodyPartExamined": "CHEST"},
            ImagePositionPatient=ds.ImagePositionPatient,
            ImageOrientationPatient=ds.ImageOrientationPatient,
            PixelSpacing=ds.PixelSpacing,
        )
        for ds in series(volume, np.diag([-1.0, -1, 2, 1]), sop=CT)
    ]
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Author", PLANTED)
    texts.add_text("Comment", PLANTED * 9, zip=True)
    files = {
        "picture.png": picture_bytes(texture(11), pnginfo=texts, exif=exif()) + TEXT,
        "picture.jpg": picture_bytes(texture(12), "JPEG", exif=exif(), comment=PLANTED, quality=90) + TEXT,
        "volume.nii.gz": gzip.compress(planted_nifti(VOLUME)),
        "clip.mp4": video_bytes(13, title=PLANTED, comment=PLANTED, creation_time="1953-11-17T13:57:24Z"),
        "single.dcm": dated_dicom(GREY, Modality="CR", BurnedInAnnotation="YES"),
        "cine.dcm": dated_dicom(np.stack([GREY, GREY[:, ::-1]]), sop=CINE, Modality="US"),
        "broken.dcm": dated_dicom(GREY, Modality="CR")[:-300],
    }
    folder = f"ct/{PLANTED}/{DATE}"
    return {f"{folder}/{PLANTED} {name}": data for name, data in files.items()} | {
        f"{folder}/series/{UID}.{number}": data for number, data in enumerate(slices)
    }


def leaves(table: pa.Table) -> Iterator[bytes]:
    """Yield all strings and bytes in a table, at any depth."""

    def within(value: Any) -> Iterator[bytes]:
        if isinstance(value, str):
            yield value.encode()
        elif isinstance(value, bytes):
            yield value
        elif isinstance(value, dict):
            for item in value.values():
                yield from within(item)
        elif isinstance(value, list):
            for item in value:
                yield from within(item)

    for row in table.to_pylist():
        yield from within(row)
    yield str(table.schema).encode()
    yield from (pair for item in (table.schema.metadata or {}).items() for pair in item)


@pytest.mark.parametrize("with_manifest", [True, False])
def test_no_published_file_holds_an_identifier(tmp_path: Path, with_manifest: bool) -> None:
    root, output = tmp_path / "scans", tmp_path / "built"
    files = planted_files()
    put(root, files)
    for needle in (PLANTED.encode(), UID.encode(), DATE.encode(), b"1953:11:17"):
        assert any(needle in data for data in files.values())
    if with_manifest:
        singles = [name for name in files if "/series/" not in name]
        folder = {"id": f"{PLANTED} series", "file": str(Path(singles[0]).parent / "series"), "modality": "ct"}
        rows = [{"id": f"{PLANTED}/{name}", "file": name, "modality": "xray"} for name in singles]
        write_manifest(root, [row | {"group": f"{PLANTED} {DATE}"} for row in [folder, *rows]])
    run(root, output, "--blank_outside_regions")
    report = report_of(output)
    assert report["scans"] == {"built": 7, "failed": 1, "duplicates_dropped": 0}
    assert report["burned_in_annotation"]["yes"] == 1
    assert PLANTED in report["failures"][0]["file"]  # the report is not published
    published = {name: data for name, data in bytes_of(output).items() if not name.startswith((".build", "report."))}
    assert {name.split("/")[0] for name in published} == {"README.md", "index.parquet", "data"}
    for name, data in published.items():
        contents = [data]
        if name.endswith(".parquet"):
            contents += leaves(pq.read_table(output / name))
            assert len(contents) > 5
        for content in contents:
            lower = content.lower()
            for needle in NEEDLES:
                assert needle.lower() not in lower, name
                assert needle.decode().encode("utf-16-le") not in content, name
    assert {row["anatomy"] for row in rows_of(output)} == ({None} if with_manifest else {None, "chest"})


# ------------------------------------------------------------------------------------------------------------- the card


def sorted_scans(root: Path) -> dict[tuple[str, str], int]:
    """Write scans of four modalities in three splits, and return their number by modality and split."""
    counts = {
        **{("xray", "train"): 9, ("xray", "validation"): 2, ("xray", "test"): 3, ("mri", "train"): 4},
        **{("mri", "test"): 1, ("ultrasound", "train"): 2, ("ct", "validation"): 2},
    }
    files, rows = {}, []
    for (modality, split), count in counts.items():
        for number in range(count):
            seed = len(rows)
            name = f"{modality}-{split}-{number}.{ {'xray': 'png', 'ultrasound': 'mp4'}.get(modality, 'nii') }"
            data = {"xray": picture_bytes(texture(seed)), "ultrasound": video_bytes(seed)}.get(modality)
            files[name] = data or volume_bytes(seed)
            rows.append({"id": name, "file": name, "modality": modality, "group": f"p{seed // 2}", "split": split})
            rows[-1] |= {"licence": "CC0" if seed % 2 else "", "label": "a|b" if seed == 0 else ""}
    files["cut.png"] = picture_bytes(texture(99))[:-900]
    rows.append({"id": "cut", "file": "cut.png", "modality": "ct", "group": "p99", "split": "validation"})
    write_manifest(put(root, files), rows)
    return counts


@pytest.mark.slow
def test_card_matches_the_rows_and_datasets_loads_them(tmp_path: Path) -> None:
    root, output = tmp_path / "scans", tmp_path / "built"
    counts = sorted_scans(root)
    run(root, output, "--title", 'Scans: "ours" & others', "--licence", "CC BY-NC 4.0 (see: site)")
    text = (output / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["pretty_name"] == 'Scans: "ours" & others'
    assert metadata["license"] == "other"
    assert metadata["license_name"].startswith("cc-by-nc-4.0")
    assert "synthetic" not in body
    assert "CC BY-NC 4.0 (see: site); CC0" in body
    in_split = Counter[str]()
    for (_, split), count in counts.items():
        in_split[split] += count
    assert {split["name"]: split["num_examples"] for split in metadata["dataset_info"]["splits"]} == in_split

    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line[:2] == "| "]
    start = table.index(["modality", "train", "validation", "test"])
    shown = {}
    for modality, *numbers in table[start + 1 : start + 5]:
        for split, number in zip(("train", "validation", "test"), numbers, strict=True):
            shown[modality, split] = int(number)
    assert shown == {(kind, split): counts.get((kind, split), 0) for kind, split in shown}
    assert {kind for kind, _ in shown} == {kind for kind, _ in counts}
    assert [int(text) for text in re.findall(r"\d+", body.split("# ", 1)[1].splitlines()[2])[:2]] == [23, 12]
    limits = body.split("## Limits")[1].splitlines()
    assert [int(text) for text in re.findall(r"\d+", limits[2])] == [1]

    loaded = load_dataset(str(output), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == in_split
    for split, rows in loaded.items():
        assert rows.features == features()
        assert Counter(MODALITIES[number] for number in rows["modality"]) == {
            kind: count for (kind, other), count in counts.items() if other == split
        }
        assert rows.to_list() == rows_of(output, split)
        streamed = load_dataset(str(output), split=split, streaming=True, cache_dir=str(tmp_path / "cache"))
        assert [row["id"] for row in streamed] == rows["id"]


def test_report_counts_match_the_rows(tmp_path: Path) -> None:
    root, output = tmp_path / "scans", tmp_path / "built"
    counts = sorted_scans(root)
    run(root, output)
    report = report_of(output)
    assert report["counts"]["modality_and_split"] == {
        kind: {split: count for (other, split), count in sorted(counts.items()) if other == kind}
        for kind in sorted({kind for kind, _ in counts})
    }
    assert report["patients"] == 12
    splits = [split for (_, split), count in counts.items() for _ in range(count)]
    assert report["patients_in_several_splits"] == sum(a != b for a, b in zip(splits[::2], splits[1::2], strict=False))
    assert report["counts"]["label"] == {"": 22, "a": 1, "b": 1}
    assert report["bytes"]["parquet"] == sum(path.stat().st_size for path in (output / "data").iterdir())


def test_phantom_is_declared_as_synthetic(tmp_path: Path) -> None:
    root, output = tmp_path / "scans", tmp_path / "built"
    write_manifest(
        put(root, {"a.png": picture_bytes(GREY)}), [{"id": "a", "file": "a.png", "modality": "xray", "group": "p"}]
    )
    run(root, output, source="phantom")
    (row,) = rows_of(output)
    assert (row["source"], row["licence"]) == (SYNTHETIC_SOURCE, "Apache-2.0")
    assert "synthetic" in (output / "README.md").read_text().split("---\n", 2)[2].split("## ")[0]


# ----------------------------------------------------------------------------------------------------------- duplicates


def test_duplicates_are_reported_and_dropped_on_request(tmp_path: Path) -> None:
    """A picture is in three splits, another has a brighter copy, and a third is in one split as PNG and DICOM."""
    root = tmp_path / "scans"
    same, near, equal = picture_bytes(texture(1)), texture(2), texture(3)
    brighter = np.clip(near * 1.05 + 8, 0, 255).astype(np.uint8)
    content = {
        "same-train.png": same,
        "same-validation.png": same,
        "same-test.png": same,
        "near-train.png": picture_bytes(brighter),
        "near-test.png": picture_bytes(near),
        "equal-train-1.png": picture_bytes(equal),
        "equal-train-2.dcm": dicom_bytes(dicom(equal, Modality="CR")),
        "alone-train.png": picture_bytes(texture(4)),
        "alone-test.png": picture_bytes(texture(5)),
    }
    rows = [{"id": name, "file": name, "modality": "xray", "split": re.split(r"[-.]", name)[1]} for name in content]
    write_manifest(put(root, content), rows)
    retained, dropped = tmp_path / "retained", tmp_path / "dropped"
    run(root, retained)
    run(root, dropped, "--drop_duplicates")
    with_duplicates, without = report_of(retained), report_of(dropped)
    assert with_duplicates["scans"] == {"built": 9, "failed": 0, "duplicates_dropped": 0}
    assert without["scans"] == {"built": 5, "failed": 0, "duplicates_dropped": 4}
    for report in (with_duplicates, without):
        found = report["duplicates"]
        assert (found["exact_groups"], found["exact_groups_across_splits"], len(found["exact"])) == (2, 1, 2)
        pairs = {tuple(sorted(pair[:2])) for pair in found["near"]}
        looks = {("near-test.png", "near-train.png")}
        three = sorted(name for name in content if name.startswith("same"))
        assert pairs == looks | {(a, b) for a in three for b in three if a < b}
        assert found["near_pairs_across_splits"] == 4
    names = Pseudonyms("folder", SALT)
    ids = {names.pseudonym("scan", name): name for name in content}
    left = {ids[row["id"]] for row in rows_of(dropped)}
    assert len({name for name in left if name.startswith("equal")}) == 1
    assert left - {"equal-train-1.png", "equal-train-2.dcm"} == {
        *("same-test.png", "near-test.png", "alone-train.png", "alone-test.png")
    }
    for folder, expected in ((retained, [4, 1]), (dropped, [4, 4, 1])):
        limits = (folder / "README.md").read_text().split("## Limits")[1].splitlines()
        assert [int(text) for text in re.findall(r"\d+", limits[3])] == expected
    assert without["bytes"]["parquet"] == sum(path.stat().st_size for path in (dropped / "data").iterdir())
    assert {Path(record.location.shard).name for record in open_collection(dropped)} == {  # type: ignore[union-attr]
        path.name for path in (dropped / "data").iterdir()
    }
    before = bytes_of(dropped)
    run(root, dropped, "--drop_duplicates")
    assert bytes_of(dropped) == before
    run(root, retained, "--drop_duplicates")  # of a finished build
    assert {name: data for name, data in bytes_of(retained).items() if name != "README.md"} == {
        name: data for name, data in before.items() if name != "README.md"
    }


# ---------------------------------------------------------------------------------------------------------- the command


def test_list_contains_every_source_with_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SOURCES)
    for line, source in zip(lines, SOURCES.values(), strict=True):
        assert all(text in line for text in (source.title, source.homepage, source.licence))
        assert ("(evaluation only)" in line) == source.evaluation_only


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--root", "missing"], "missing"),
        (["--root", "."], "folder"),
        (["--source", "brats", "--root", "."], "brats"),
        (["--source", "phantom", "--root", "phantom:x"], "phantom:x"),
        (["--root", ".", "--test", "2"], "test"),
        (["--root", ".", "--max_size", "4"], "max_size"),
        (["--root", ".", "--salt_file", "short.txt"], "short.txt"),
    ],
)
def test_user_errors_end_in_one_line_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], named: str
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    put(tmp_path, {"salt": SALT, "folder/short.txt": b"short"})
    given = {"--source": "folder", "--output": str(tmp_path / "built"), "--salt_file": str(tmp_path / "salt")}
    given |= dict(zip(argv[::2], argv[1::2], strict=True))
    if argv[-1] == "short.txt":
        (tmp_path / "folder" / "a.png").write_bytes(picture_bytes(GREY))
    with pytest.raises(SystemExit) as caught:
        main([argument for pair in given.items() for argument in pair])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert not (tmp_path / "built").exists()


def test_missing_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--source", "folder"])
    assert caught.value.code == 2
    assert all(name in capsys.readouterr().err for name in ("--source",))


def test_only_a_finished_build_is_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[tuple[Path, str, bool]] = []
    monkeypatch.setattr(
        build_module, "push", lambda folder, name: pushed.append((folder, name, (folder / "README.md").is_file()))
    )
    output = tmp_path / "built"
    run(put(tmp_path / "scans", {"ct/a.png": picture_bytes(GREY)}), output, "--push_to_hub", "org/scans")
    assert pushed == [(output, "org/scans", True)]
    assert 'load_dataset("org/scans"' in (output / "README.md").read_text()
    with pytest.raises(SystemExit):
        run(put(tmp_path / "bad", {"ct/a.png": b""}), tmp_path / "none", "--push_to_hub", "org/scans")
    assert len(pushed) == 1


@pytest.mark.slow
def test_script_runs_in_any_folder_and_creates_the_salt(tmp_path: Path) -> None:
    put(tmp_path / "scans", {"ct/a.png": picture_bytes(GREY), "ct/b.png": b""})
    argv = ["--source", "folder", "--root", "scans", "--output", "built"]
    script = ROOT / "dataset_scripts" / "build.py"
    home = {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
    ran = subprocess.run(
        [sys.executable, str(script), *argv],
        **{"cwd": tmp_path, "env": os.environ | home, "capture_output": True, "text": True, "check": False},
    )
    assert ran.returncode == 0, ran.stderr
    assert [int(text) for text in re.findall(r"\d+", ran.stdout)[:4]] == [1, 1, 1, 1]
    assert "Traceback" not in ran.stderr
    assert len(rows_of(tmp_path / "built")) == 1
    salt = (tmp_path / "home" / "m3ret" / "salt").read_bytes()
    assert rows_of(tmp_path / "built")[0]["id"] == Pseudonyms("folder", salt).pseudonym("scan", "ct/a.png")
