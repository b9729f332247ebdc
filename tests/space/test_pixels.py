"""What the viewer receives of a scan: a new NIfTI file, read back by nibabel, and the mask of the body."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from modeling_m3ret.reading_m3ret import read_scan
from modeling_m3ret.scan_m3ret import Scan
from modeling_m3ret.space import pixels
from modeling_m3ret.space.pixels import (
    body_mask,
    describe_scan,
    heat_base64,
    heat_stride,
    plane_of,
    preview,
    volume_bytes,
    volume_stride,
)


def ct(volume: np.ndarray, spacing: tuple[float, float, float] = (4.0, 1.0, 2.0)) -> Scan:
    return read_scan({"volume": volume.astype(np.int16), "intensity": "hounsfield", "spacing": list(spacing)})


def file_of(scan: Scan) -> tuple[bytes, Any]:
    size, parts = volume_bytes(scan)
    data = b"".join(parts)
    assert len(data) == size
    return data, nibabel.Nifti1Image.from_bytes(data)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_a_volume_is_the_one_that_was_read(plane: str, tmp_path: Path) -> None:
    """In place and in value: the file of the viewer, read by nibabel, equals the upload in the same world."""
    thick = {"axial": (1.0, 1.0, 5.0), "coronal": (1.0, 5.0, 1.0), "sagittal": (5.0, 1.0, 1.0)}[plane]
    values = np.random.default_rng(0).integers(-900, 900, (6, 7, 8)).astype(np.int16)
    image = nibabel.Nifti1Image(values, np.diag([*thick, 1.0]))
    image.header["descrip"] = b"Jane Doe"
    nibabel.save(image, tmp_path / "jane-doe.nii")
    scan = read_scan(tmp_path / "jane-doe.nii", intensity="hounsfield")
    assert plane_of(scan) == plane
    data, shown = file_of(scan)
    ours = nibabel.as_closest_canonical(shown)
    np.testing.assert_array_equal(np.asarray(ours.dataobj), values)
    np.testing.assert_allclose(ours.header.get_zooms(), thick)
    assert b"oe" not in data[:352]


def test_the_head_holds_no_text() -> None:
    data, shown = file_of(ct(np.zeros((3, 4, 5))))
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        assert not bytes(shown.header[field]).strip(b"\0")
    assert not shown.header.extensions
    assert int.from_bytes(data[:4], "little") == 348


def test_colours_and_bytes_keep_their_values() -> None:
    colour = np.random.default_rng(0).integers(0, 255, (4, 5, 6, 3)).astype(np.uint8)
    _, shown = file_of(read_scan(colour))
    np.testing.assert_array_equal(
        np.stack([np.asarray(shown.dataobj)[name] for name in "RGB"], -1).transpose(2, 1, 0, 3), colour
    )
    grey = colour[0, ..., 0]
    _, shown = file_of(read_scan(grey))
    np.testing.assert_array_equal(np.asarray(shown.dataobj)[..., 0].T, grey)


def test_values_without_a_unit_are_thousandths() -> None:
    _, shown = file_of(Scan(np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 1, 3, 4), (None,) * 3, {}))
    np.testing.assert_array_equal(np.asarray(shown.dataobj)[..., 0].T, np.rint(np.linspace(0, 1000, 12)).reshape(3, 4))


def test_a_large_volume_is_sent_at_a_lower_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = ct(np.arange(2 * 9 * 12).reshape(2, 9, 12))
    monkeypatch.setattr(pixels, "VIEW_BYTES", 2 * 9 * 12)
    assert volume_stride(scan) == 2
    data, shown = file_of(scan)
    assert len(data) <= 352 + 2 * 2 * 5 * 6
    np.testing.assert_array_equal(np.asarray(shown.dataobj).T, np.arange(2 * 9 * 12).reshape(2, 9, 12)[:, ::2, ::2])
    np.testing.assert_allclose(shown.header.get_zooms(), [4, 2, 4])


def test_a_heatmap_covers_its_scan() -> None:
    scan = ct(np.zeros((3, 300, 200)))
    stride = heat_stride(scan)
    assert stride == 3
    heat = np.random.default_rng(0).integers(0, 255, (3, 100, 67)).astype(np.uint8)
    shown = nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(heat_base64(scan, heat))))
    np.testing.assert_allclose((np.asarray(shown.dataobj).T / 255) ** 2, heat / 255, atol=1 / 255)  # square roots
    _, whole = file_of(scan)
    np.testing.assert_allclose(shown.affine[:3, 0], stride * whole.affine[:3, 0])
    np.testing.assert_allclose(shown.affine[:, 3], whole.affine[:, 3])


def disc(side: int, radius: float) -> np.ndarray:
    rows, columns = np.indices((side, side)) - side / 2
    return rows**2 + columns**2 < radius**2


def test_the_body_of_a_ct_includes_its_lungs_and_not_the_table() -> None:
    body, lung = disc(128, 44), disc(128, 16)
    volume = np.full((4, 128, 128), -1000)
    volume[:, body] = 40
    volume[:, lung] = -850
    volume[:, 115, 8:120] = 300  # the table
    volume[:, 120:126, 32:96] = 300  # its cushion: 6% of the body
    for stride in (1, 2):
        mask = body_mask(ct(volume), stride)
        assert mask[:, body[::stride, ::stride]].mean() > 0.98
        assert mask[:, ~disc(128, 47)[::stride, ::stride]].sum() == 0


def test_the_body_of_an_image_is_inside_its_collimator() -> None:
    image = np.zeros((60, 50), np.uint8)
    image[10:50, 5:45] = np.random.default_rng(0).integers(60, 250, (40, 40))
    image[2:4, 2:5] = 255  # a letter
    mask = body_mask(read_scan(image))[0]
    assert mask[10:50, 5:45].mean() > 0.99  # corners are rounded
    mask[10:50, 5:45] = False
    assert not mask.any()


def test_an_image_without_background_is_all_body() -> None:
    for image in (np.full((20, 20), 9, np.uint8), np.zeros((20, 20), np.uint8)):
        assert body_mask(read_scan(image)).all()


def test_a_preview_has_square_pixels() -> None:
    scan = ct(np.zeros((5, 30, 20)), (4.0, 1.0, 3.0))  # 30 mm x 60 mm
    assert preview(scan, 100).size == (100, 50)
    assert preview(read_scan(np.zeros((30, 60), np.uint8)), 100).size == (100, 50)


def test_a_preview_of_a_ct_shows_soft_tissue() -> None:
    volume = np.full((1, 2, 2), 40)
    volume[0, 0] = [-1000, 1000]
    shown = np.asarray(preview(ct(volume, (4.0, 1.0, 1.0)), 2))[..., 0]
    assert (shown.min(), shown.max()) == (0, 255)
    assert 110 <= np.median(shown[1]) <= 145


def test_a_description_holds_sizes_and_spacings() -> None:
    volume = describe_scan(ct(np.arange(2 * 3 * 5).reshape(2, 3, 5) - 900))
    for fact in ("2 slices", "5 × 3 px", "2 × 1 mm", "4 mm"):
        assert fact in volume
    clip = describe_scan(
        read_scan(np.random.default_rng(0).integers(0, 255, (40, 8, 9, 3), dtype=np.uint8), num_frames=10)
    )
    for fact in ("10 frames", "9 × 8 px", "40"):
        assert fact in clip
    assert " mm" not in clip
    image = describe_scan(read_scan(np.eye(7, 9, dtype=np.uint8)))
    assert "9 × 7 px" in image
    assert " mm" not in image
