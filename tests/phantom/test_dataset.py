"""The phantom collection is deterministic, synthetic and balanced, and its files hold the rendered arrays."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import nibabel
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image

from dataset_scripts import make_phantom
from modeling_m3ret.phantom.anatomy import (
    CLASSES,
    SHAPE,
    Anatomy,
    Tissue,
    format_index,
    generate_anatomy,
    random_stream,
    smooth_noise,
)
from modeling_m3ret.phantom.dataset import VERSION, OccupiedFolderError, write_phantom
from modeling_m3ret.phantom.rendering import RENDERERS, Rendering


Renderer = Callable[[Anatomy, np.random.Generator], Rendering]
SUBJECTS, SEED = 4, 3  # four subjects are written in every file format


RENDERED: dict[tuple[int, str], tuple[Anatomy, Rendering]] = {}  # rendering takes most of the time of these tests


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def render_and_remember(modality: str, render: Renderer, anatomy: Anatomy, rng: np.random.Generator) -> Rendering:
        RENDERED[anatomy.subject, modality] = anatomy, render(anatomy, rng)
        return RENDERED[anatomy.subject, modality][1]

    with pytest.MonkeyPatch.context() as monkeypatch:
        for modality, render in list(RENDERERS.items()):
            monkeypatch.setitem(RENDERERS, modality, partial(render_and_remember, modality, render))
        return write_phantom(tmp_path_factory.mktemp("data") / "phantom", subjects=SUBJECTS, seed=SEED, workers=1)


@pytest.fixture
def only_xray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make writing a subject fast."""
    for modality in set(RENDERERS) - {"xray"}:
        monkeypatch.delitem(RENDERERS, modality)


def manifest(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rendered(subject: int, modality: str) -> tuple[Anatomy, Rendering]:
    if (subject, modality) not in RENDERED:
        anatomy, stream = generate_anatomy(SEED, subject), list(RENDERERS).index(modality) + 1
        RENDERED[subject, modality] = anatomy, RENDERERS[modality](anatomy, random_stream(SEED, subject, stream))
    return RENDERED[subject, modality]


def file_contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def labels_at(anatomy: Anatomy, matrix: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the true tissue of each voxel, or 255 outside the volume and within a voxel of another tissue."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), [1], indexing="ij"))[..., 0].reshape(4, -1)
    points = np.rint((matrix @ index)[:3]).astype(int)
    inside = ((points > 1) & (points < np.array(SHAPE)[:, None] - 2)).all(0)
    z, y, x = np.clip(points, 2, np.array(SHAPE)[:, None] - 3)
    truth = anatomy.labels[z, y, x]
    pure = inside.copy()
    for shift in np.ndindex(3, 3, 3):
        dz, dy, dx = np.array(shift) - 1
        pure &= anatomy.labels[z + dz, y + dy, x + dx] == truth
    return np.where(pure, truth, 255).astype(np.uint8).reshape(shape)


@pytest.mark.slow
def test_files_do_not_depend_on_the_number_of_workers_or_subjects(phantom: Path, tmp_path: Path) -> None:
    more = write_phantom(tmp_path / "more", subjects=len(CLASSES), seed=SEED, workers=2)
    shared = file_contents(phantom)
    contents = file_contents(more)
    for name in ("manifest.csv", "phantom.json"):
        del shared[name], contents[name]
    assert shared.items() <= contents.items()  # MP4 included: the encoder has one thread
    rows = manifest(more)
    assert rows[: len(manifest(phantom))] == manifest(phantom)
    assert Counter(row["anatomy"] for row in rows) == dict.fromkeys(CLASSES, len(RENDERERS))


@pytest.mark.usefixtures("phantom")
def test_seed_and_subject_each_change_the_anatomy() -> None:
    labels = rendered(0, "ct")[0].labels
    for seed, subject in ((SEED + 1, 0), (SEED, len(CLASSES))):
        assert not np.array_equal(generate_anatomy(seed, subject).labels, labels)


@pytest.mark.usefixtures("phantom")
@pytest.mark.parametrize(
    ("modality", "shape", "mean", "std", "note"),
    [
        ("xray", (256, 253), 1590.12, 972.044, "lateral"),
        ("ultrasound", (10, 192, 224), 139.019, 87.1193, "sector 76 degrees"),
        ("endoscopy", (21, 192, 192, 3), 91.6269, 80.1712, "lumen"),
        ("ct", (28, 96, 96), -117.444, 568.42, "axial"),
        ("mri", (20, 112, 112), 509.867, 325.615, "T2 axial"),
    ],
)
def test_scans_of_version_1_do_not_change(
    modality: str, shape: tuple[int, ...], mean: float, std: float, note: str
) -> None:
    """Statistics, as the last bit may depend on the processor: another order of random draws changes all of them."""
    _, scan = rendered(1, modality)
    assert (scan.array.shape, scan.note, VERSION) == (shape, note, 1)
    assert (scan.array.mean(), scan.array.std()) == pytest.approx((mean, std), rel=1e-4)


def test_every_class_is_written_in_every_format() -> None:
    for number in range(len(CLASSES)):
        indices = [format_index(number + cycle * len(CLASSES)) for cycle in range(12)]
        assert {index % 4 for index in indices} == set(range(4))
        assert {index % 3 for index in indices} == set(range(3))


def test_manifest_lists_every_subject_once_in_each_modality(phantom: Path) -> None:
    rows = manifest(phantom)
    assert Counter(row["modality"] for row in rows) == dict.fromkeys(RENDERERS, SUBJECTS)
    assert len({row["id"] for row in rows}) == len(rows)
    for group in {row["group"] for row in rows}:
        scans = [row for row in rows if row["group"] == group]
        assert {row["modality"] for row in scans} == set(RENDERERS)
        assert len({row["label"] for row in scans}) == 1
    assert all((phantom / row["file"]).exists() for row in rows)
    assert json.loads((phantom / "phantom.json").read_text())["counts"] == {
        key: dict(Counter(row[key] for row in rows)) for key in ("modality", "anatomy")
    }


def test_every_file_declares_that_it_is_synthetic(phantom: Path) -> None:
    assert "no patient data" in json.loads((phantom / "phantom.json").read_text())["what"]
    for row in manifest(phantom):
        assert "synthetic" in row["source"]
    for path in (p for p in phantom.rglob("*") if p.is_file()):
        if path.suffix == ".dcm":
            header = pydicom.dcmread(path, stop_before_pixels=True)
            assert header.PatientName == "PHANTOM^SYNTHETIC"
            assert "Synthetic" in header.ImageComments
        elif path.suffix in (".nii", ".gz"):
            assert b"Synthetic" in nibabel.load(path).header["descrip"].item()
        elif path.suffix == ".png":
            assert "Synthetic" in Image.open(path).info["Description"]
        elif path.suffix == ".mp4":
            with av.open(str(path)) as container:
                assert "Synthetic" in container.metadata["comment"]
        else:
            assert path.suffix in (".csv", ".json")


def read_series(folder: Path) -> tuple[NDArray[np.float64], tuple[float, float, float]]:
    slices = sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda s: float(s.ImagePositionPatient[2]))
    assert len({s.SOPInstanceUID for s in slices}) == len(slices)
    assert len({s.SeriesInstanceUID for s in slices}) == 1
    steps = np.diff([float(s.ImagePositionPatient[2]) for s in slices])
    assert np.allclose(steps, steps[0], atol=2e-3)
    volume = np.stack([s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices])
    return volume, (float(steps[0]), *map(float, slices[0].PixelSpacing))


@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_volume_files_hold_the_rendered_array_and_its_geometry(phantom: Path, modality: str) -> None:
    kinds = set()
    for row in (row for row in manifest(phantom) if row["modality"] == modality):
        path, (_, scan) = phantom / row["file"], rendered(int(row["group"][-4:]), modality)
        if path.is_dir():
            kinds.add("series")
            volume, spacing = read_series(path)
            assert [p.name for p in sorted(path.iterdir())] != [  # names do not reveal the order
                p.name for p in sorted(path.iterdir(), key=lambda p: float(pydicom.dcmread(p).ImagePositionPatient[2]))
            ]
        else:
            kinds.add("flipped" if np.linalg.det(nibabel.load(path).affine[:3, :3]) < 0 else "straight")
            image = nibabel.as_closest_canonical(nibabel.load(path))  # (right, front, up)
            assert nibabel.load(path).get_data_dtype() == np.int16
            # Rendered axes -> patient (z, y, x) -> x, y, z with right and front positive.
            order = [int(np.flatnonzero(scan.directions[axis])[0]) for axis in (2, 1, 0)]
            signs = [scan.directions[axis, a] * s for axis, a, s in zip((2, 1, 0), order, (-1, -1, 1), strict=True)]
            expected = scan.array.transpose(order)[tuple(slice(None, None, int(s)) for s in signs)]
            assert np.array_equal(np.asarray(image.dataobj), expected)
            assert np.allclose(image.header.get_zooms(), [scan.spacing_mm[a] for a in order], atol=1e-3)
            continue
        assert np.array_equal(volume, scan.array)
        assert np.allclose(spacing, scan.spacing_mm, atol=2e-3)
    assert kinds >= ({"series", "straight"} if modality == "ct" else {"straight"})


@pytest.mark.usefixtures("phantom")
@pytest.mark.parametrize(
    "subject", [pytest.param(n, marks=[pytest.mark.slow] if n >= SUBJECTS else []) for n in range(len(CLASSES))]
)
def test_ct_values_are_the_hounsfield_units_of_the_tissue(subject: int) -> None:
    anatomy, scan = rendered(subject, "ct")
    truth = labels_at(anatomy, scan.to_anatomy, scan.array.shape)
    y, x = np.ogrid[-47.5:47.5:96j, -47.5:47.5:96j]
    field = y**2 + x**2 < 47**2  # some scans are padded with -1024 outside
    # Each scan draws its beam energy, contrast agent and calibration.
    expected = {Tissue.AIR: (-1025, -900), Tissue.FAT: (-190, 0), Tissue.MUSCLE: (-60, 190), Tissue.LUNG: (-950, -650)}
    expected |= {Tissue.CORTICAL_BONE: (600, 1600), Tissue.FLUID: (-90, 120)}
    checked = 0
    for tissue, (low, high) in expected.items():
        values = scan.array[(truth == tissue) & (field | (tissue == Tissue.AIR))]
        if values.size > 50:
            assert low < np.median(values) < high, tissue.name
            checked += 1
    assert checked >= 2


def test_mri_follows_the_anatomy() -> None:
    anatomy, scan = rendered(2, "mri")
    truth = labels_at(anatomy, scan.to_anatomy, scan.array.shape)
    assert np.median(scan.array[truth == Tissue.MUSCLE]) > 2 * np.median(scan.array[truth == Tissue.LUNG])


def test_plane_and_clip_files_hold_the_rendered_array(phantom: Path) -> None:
    kinds = Counter()
    for row in manifest(phantom):
        if row["modality"] in ("ct", "mri"):
            continue
        path, (_, scan) = phantom / row["file"], rendered(int(row["group"][-4:]), row["modality"])
        kind = f"{row['modality']} {path.suffix}"
        if path.suffix == ".dcm":
            header = pydicom.dcmread(path)
            inverted = header.PhotometricInterpretation == "MONOCHROME1"
            kind += " inverted" if inverted else ""
            pixels = header.pixel_array
            assert np.array_equal(4095 - pixels if inverted else pixels, scan.array)
            if row["modality"] == "xray":
                assert np.allclose(header.PixelSpacing, scan.spacing_mm[1:], rtol=1e-4)
                assert header.BitsStored == 12
            else:
                region = header.SequenceOfUltrasoundRegions[0]
                assert np.allclose((region.PhysicalDeltaY * 10, region.PhysicalDeltaX * 10), scan.spacing_mm[1:])
        elif path.suffix == ".png":
            pixels = np.asarray(Image.open(path))
            expected = scan.array * np.uint16(16) if row["modality"] == "xray" else scan.array[len(scan.array) // 2]
            assert np.array_equal(pixels, expected)
        else:
            with av.open(str(path)) as container:
                assert container.streams.video[0].pix_fmt == "yuv420p"
                frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
            expected = scan.array if scan.array.ndim == 4 else np.repeat(scan.array[..., None], 3, -1)
            expected = expected[:, : frames.shape[1], : frames.shape[2]]
            assert frames.shape == expected.shape
            assert np.abs(frames.astype(float) - expected).mean() < 16  # lossy: H.264 with half the chroma resolution
        kinds[kind] += 1
    assert set(kinds) == {
        "xray .png", "xray .dcm", "xray .dcm inverted", "ultrasound .dcm", "ultrasound .png", "ultrasound .mp4",
        "endoscopy .mp4",
    }  # fmt: skip


@pytest.mark.slow
def test_comparing_pixels_does_not_solve_it() -> None:
    """Leave-one-out mAP of 16 x 16 mean-centred thumbnails of 24 subjects; chance is 0.19."""
    seed, subjects = 11, 24
    thumbnails: dict[str, list[NDArray[np.float64]]] = {modality: [] for modality in RENDERERS}
    for subject in range(subjects):
        anatomy = generate_anatomy(seed, subject)
        for stream, (modality, render) in enumerate(RENDERERS.items(), start=1):
            array = render(anatomy, random_stream(seed, subject, stream)).array
            plane = array if modality == "xray" else array[len(array) // 2]
            plane = plane.mean(-1) if plane.ndim == 3 else plane
            plane = np.clip(plane, *np.percentile(plane, (0.5, 99.5))).astype(np.float32)
            small = np.asarray(Image.fromarray(plane).resize((16, 16), Image.Resampling.BOX), float)
            thumbnails[modality].append((small - small.mean()).ravel())
    classes = np.arange(subjects) % len(CLASSES)
    for modality, rows in thumbnails.items():
        features = np.stack(rows)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        similarity = features @ features.T
        precisions = []
        for query in range(subjects):
            others = np.delete(np.argsort(-similarity[query]), np.flatnonzero(np.argsort(-similarity[query]) == query))
            hits = classes[others] == classes[query]
            precisions.append((np.cumsum(hits) / np.arange(1, subjects))[hits].mean())
        assert np.mean(precisions) < 0.5, modality


def test_finished_folder_is_reused(phantom: Path) -> None:
    before = (phantom / "phantom.json").stat().st_mtime_ns
    assert write_phantom(phantom, subjects=SUBJECTS, seed=SEED) == phantom
    assert (phantom / "phantom.json").stat().st_mtime_ns == before


def test_occupied_folder_is_refused_and_left_unchanged(phantom: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for folder, seed in ((phantom, SEED + 1), (tmp_path, SEED)):
        before = file_contents(folder)
        with pytest.raises(OccupiedFolderError) as caught:
            write_phantom(folder, subjects=SUBJECTS, seed=seed)
        assert caught.value.folder == folder
        assert file_contents(folder) == before


def test_command_ends_in_one_line_if_the_folder_is_occupied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    monkeypatch.setattr(sys, "argv", ["phantom", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        make_phantom.main()
    printed = capsys.readouterr().err
    assert (ended.value.code, len(printed.splitlines())) == (2, 1)
    assert str(tmp_path) in printed


@pytest.mark.usefixtures("only_xray")
def test_folder_that_another_process_finishes_first_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_phantom(tmp_path / "first", subjects=1, workers=1)
    render, folder = RENDERERS["xray"], tmp_path / "phantom"

    def render_while_another_finishes(anatomy: Anatomy, rng: np.random.Generator) -> Rendering:
        shutil.copytree(first, folder)
        return render(anatomy, rng)

    monkeypatch.setitem(RENDERERS, "xray", render_while_another_finishes)
    assert write_phantom(folder, subjects=1, workers=1) == folder
    assert file_contents(folder) == file_contents(first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "phantom"]


@pytest.mark.slow
def test_killed_writer_leaves_no_complete_folder_and_does_not_block_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "phantom"
    writer = multiprocessing.get_context("spawn").Process(
        target=write_phantom, args=(folder,), kwargs={"subjects": 500, "workers": 1}, daemon=True
    )
    writer.start()
    assert writer.pid is not None
    while writer.is_alive() and not list(tmp_path.glob(".phantom.*/ct/*")):
        time.sleep(0.05)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert list(tmp_path.glob(".phantom.*/ct/*"))  # it had begun
    assert not folder.exists()
    assert not list(tmp_path.rglob("phantom.json"))
    assert write_phantom(folder, subjects=1) == folder


@pytest.mark.usefixtures("only_xray")
def test_failed_writer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class DiskFullError(Exception):
        pass

    def fail(anatomy: Anatomy, rng: np.random.Generator) -> Rendering:
        raise DiskFullError

    monkeypatch.setitem(RENDERERS, "mri", fail)
    with pytest.raises(DiskFullError):
        write_phantom(tmp_path / "phantom", subjects=2, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_smooth_noise_is_standardised_and_tiles() -> None:
    noise = smooth_noise(np.random.default_rng(0), (256, 256), 8, periodic=True)
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.2
    assert 0.8 < noise.std() < 1.2
    assert np.abs(noise[0] - noise[-1]).max() < 3 * np.abs(np.diff(noise, axis=0)).max()
