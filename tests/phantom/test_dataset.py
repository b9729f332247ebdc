"""The phantom collection is what it says: deterministic, synthetic, balanced, true to its anatomy in every format."""

import csv
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from functools import cache
from pathlib import Path

import av
import nibabel
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image

from modeling_m3ret.phantom.anatomy import (
    CLASSES,
    SHAPE,
    Anatomy,
    Tissue,
    random_stream,
    smooth_noise,
    subject_anatomy,
)
from modeling_m3ret.phantom.dataset import write_phantom
from modeling_m3ret.phantom.rendering import RENDERERS, Rendering


SUBJECTS, SEED = 8, 3


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("data") / "phantom", subjects=SUBJECTS, seed=SEED, workers=1)


def manifest(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@cache
def rendered(subject: int, modality: str) -> tuple[Anatomy, Rendering]:
    anatomy = subject_anatomy(SEED, subject)
    stream = list(RENDERERS).index(modality) + 1
    return anatomy, RENDERERS[modality](anatomy, random_stream(SEED, subject, stream))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def labels_at(anatomy: Anatomy, matrix: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The true tissue of each voxel, by nearest neighbour; -1 (255) where a neighbour differs or outside."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), [1], indexing="ij"))[..., 0].reshape(4, -1)
    places = np.rint((matrix @ index)[:3]).astype(int)
    inside = ((places > 1) & (places < np.array(SHAPE)[:, None] - 2)).all(0)
    z, y, x = np.clip(places, 2, np.array(SHAPE)[:, None] - 3)
    truth = anatomy.labels[z, y, x]
    pure = inside.copy()
    for shift in np.ndindex(3, 3, 3):
        dz, dy, dx = np.array(shift) - 1
        pure &= anatomy.labels[z + dz, y + dy, x + dx] == truth
    return np.where(pure, truth, 255).astype(np.uint8).reshape(shape)


def test_same_bytes_across_runs_and_worker_counts(phantom: Path, tmp_path: Path) -> None:
    again = write_phantom(tmp_path / "again", subjects=SUBJECTS, seed=SEED, workers=2)
    assert content(again) == content(phantom)  # the files, MP4 included: the encoder has one thread


def test_another_seed_gives_other_scans() -> None:
    assert not np.array_equal(subject_anatomy(0, 0).labels, subject_anatomy(1, 0).labels)
    assert not np.array_equal(subject_anatomy(0, 0).labels, subject_anatomy(0, 8).labels)


def test_classes_modalities_and_subjects_are_complete(phantom: Path) -> None:
    rows = manifest(phantom)
    assert Counter(row["modality"] for row in rows) == dict.fromkeys(RENDERERS, SUBJECTS)
    assert Counter(row["anatomy"] for row in rows) == dict.fromkeys(CLASSES, len(RENDERERS) * SUBJECTS // len(CLASSES))
    assert len({row["id"] for row in rows}) == len(rows)
    for group in {row["group"] for row in rows}:  # cross-modal truth: each subject once in each modality, one class
        own = [row for row in rows if row["group"] == group]
        assert {row["modality"] for row in own} == set(RENDERERS)
        assert len({row["label"] for row in own}) == 1
    assert all((phantom / row["file"]).exists() for row in rows)


def test_every_file_says_that_it_is_synthetic(phantom: Path) -> None:
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
            assert [p.name for p in sorted(path.iterdir())] != [  # the names do not give the order away
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


@pytest.mark.parametrize("subject", range(SUBJECTS))
def test_ct_values_are_the_hounsfield_units_of_the_tissue(subject: int) -> None:
    anatomy, scan = rendered(subject, "ct")
    truth = labels_at(anatomy, scan.to_anatomy, scan.array.shape)
    y, x = np.ogrid[-47.5:47.5:96j, -47.5:47.5:96j]
    field = y**2 + x**2 < 47**2  # outside of it some scans are padded with -1024
    # Ranges, not points: each scan draws its beam energy, contrast agent and calibration.
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
            assert np.abs(frames.astype(float) - expected).mean() < 16  # H.264 and halved chroma
        kinds[kind] += 1
    assert set(kinds) == {
        "xray .png", "xray .dcm", "xray .dcm inverted", "ultrasound .dcm", "ultrasound .png", "ultrasound .mp4",
        "endoscopy .mp4",
    }  # fmt: skip


def test_comparing_pixels_does_not_solve_it() -> None:
    """Leave-one-out mAP of 16 x 16 mean-centred thumbnails, 24 subjects: chance is .19 here, a solved task 1."""
    seed, subjects = 11, 24
    thumbnails: dict[str, list[NDArray[np.float64]]] = {modality: [] for modality in RENDERERS}
    for subject in range(subjects):
        anatomy = subject_anatomy(seed, subject)
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


def test_a_finished_folder_is_taken_as_it_is_and_a_foreign_one_refused(phantom: Path, tmp_path: Path) -> None:
    before = (phantom / "phantom.json").stat().st_mtime_ns
    assert write_phantom(phantom, subjects=SUBJECTS, seed=SEED) == phantom
    assert (phantom / "phantom.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="something other"):
        write_phantom(phantom, subjects=SUBJECTS, seed=SEED + 1)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="something other"):
        write_phantom(tmp_path, subjects=1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_killed_writer_leaves_no_folder_that_looks_complete(tmp_path: Path) -> None:
    folder = tmp_path / "phantom"
    writer = multiprocessing.get_context("spawn").Process(
        target=write_phantom, args=(folder,), kwargs={"subjects": 500, "workers": 1}, daemon=True
    )
    writer.start()
    assert writer.pid is not None
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".phantom-*/ct/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert list(tmp_path.glob(".phantom-*.part/ct/*")), "it was killed half way"
    assert not folder.exists()
    assert not list(tmp_path.rglob("phantom.json"))
    assert write_phantom(folder, subjects=1) == folder  # and the next run is not in its way


def test_a_failed_writer_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(anatomy: Anatomy, rng: np.random.Generator) -> Rendering:
        raise RuntimeError("disk full")

    monkeypatch.setitem(RENDERERS, "mri", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        write_phantom(tmp_path / "phantom", subjects=2, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_smooth_noise_is_standardised_and_tiles() -> None:
    noise = smooth_noise(np.random.default_rng(0), (256, 256), 8, periodic=True)
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.2
    assert 0.8 < noise.std() < 1.2
    assert np.abs(noise[0] - noise[-1]).max() < 3 * np.abs(np.diff(noise, axis=0)).max()
