"""Test the image processor: kinds of scans, values, size policy and settings of a call."""

from __future__ import annotations

import io
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from modeling_m3ret import M3RetImageProcessor, M3RetReadError, Scan
from modeling_m3ret.data.collection import read_manifest
from modeling_m3ret.search.embedding import unpatchify


def random_scan(shape: tuple[int, ...], spacing: tuple[float | None, ...] = (None, None, None)) -> Scan:
    array = np.random.default_rng(0).random((1, *shape), dtype=np.float32)
    return Scan(array, spacing, {})  # type: ignore[arg-type]


def test_one_call_takes_scans_of_every_kind(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 255, (90, 120, 3), dtype=np.uint8))
    picture.save(tmp_path / "endoscopy.png")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    volume = generator.normal(size=(40, 40, 24)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([2.0, 2.0, 3.0, 1.0])), tmp_path / "mri.nii.gz")
    gif = [Image.fromarray(generator.integers(0, 255, (48, 64), dtype=np.uint8)) for _ in range(6)]
    gif[0].save(tmp_path / "cine.gif", save_all=True, append_images=gif[1:])
    sources = [
        tmp_path / "endoscopy.png",
        str(tmp_path / "mri.nii.gz"),
        tmp_path / "cine.gif",
        buffer.getvalue(),
        picture,
        np.asarray(picture),
        generator.random((50, 60)),
        torch.rand(8, 40, 40),
        generator.integers(0, 255, (5, 40, 40, 3), dtype=np.uint8),
        {"image": {"bytes": buffer.getvalue(), "path": None}, "video": None, "volume": None},
        random_scan((3, 40, 40)),
    ]
    processor = M3RetImageProcessor(size=64)
    inputs = processor(sources, return_tensors="pt")
    assert inputs["grid_thw"].shape == (len(sources), 3)
    assert inputs["grid_thw"].dtype == torch.int64
    assert inputs["pixel_values"].shape == (int(inputs["grid_thw"].prod(-1).sum()), 3 * 4 * 16 * 16)
    assert inputs["pixel_values"].dtype == torch.float32
    assert inputs["pixel_values"].abs().max() <= 1
    # five representations of the same picture give the same rows, alone and in the list
    rows = inputs["pixel_values"].split(inputs["grid_thw"].prod(-1).tolist())
    for same in (3, 4, 5, 9):
        assert torch.equal(rows[0], rows[same])
    assert torch.equal(processor(picture)["pixel_values"], rows[0])


def test_scan_of_final_size_keeps_its_values() -> None:
    """Values x in [0, 1] become 2 x - 1, in every channel."""
    processor = M3RetImageProcessor(size=64, num_frames=8)
    scan = random_scan((6, 64, 64), (1.0, 1.0, 1.0))
    rows, grids = processor.pack([processor.resize(scan)])
    assert grids.tolist() == [[2, 4, 4]]
    volume = unpatchify(rows, grids[0].tolist(), processor)
    expected = torch.from_numpy(scan.array * 2 - 1)
    assert torch.allclose(volume[:, :6], expected.expand(3, -1, -1, -1), atol=1e-6)
    assert torch.equal(volume[:, 6:], volume[:, 5:6].expand(-1, 2, -1, -1))


def test_resizing_preserves_constants_and_means() -> None:
    processor = M3RetImageProcessor(size=64, num_frames=8)
    constant = Scan(np.full((1, 50, 200, 160), 0.25, dtype=np.float32), (1.0, 1.0, 1.0), {})
    assert torch.allclose(processor.resize(constant), torch.tensor(-0.5), atol=1e-5)
    scan = random_scan((50, 200, 160), (2.0, 1.0, 1.0))
    assert float(processor.resize(scan).mean()) == pytest.approx(2 * scan.array.mean() - 1, abs=2e-3)
    as_bytes = Scan((scan.array[:, :1] * 255).round().astype(np.uint8), (None, None, None), {})
    as_floats = Scan(as_bytes.array.astype(np.float32) / 255, (None, None, None), {})
    assert (processor.resize(as_bytes) - processor.resize(as_floats)).abs().max() <= 2 / 255


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        ((1, 512, 512), (None, None, None), (1, 224, 224)),  # a square picture
        ((1, 2000, 1000), (None, 0.1, 0.1), (1, 320, 160)),  # same area: 316.8 x 158.4, rounded to whole patches
        ((1, 100, 200), (None, 2.0, 1.0), (1, 224, 224)),  # pixels twice as high as wide: square in mm
        ((20, 480, 640), (None, None, None), (20, 192, 256)),  # a clip of fewer frames than num_frames
        ((300, 480, 640), (None, None, None), (32, 192, 256)),  # at most num_frames
        ((300, 512, 512), (1.0, 0.7, 0.7), (32, 224, 224)),  # a chest CT
        ((10, 512, 512), (5.0, 0.5, 0.5), (10, 224, 224)),  # thick slices: the depth never grows
        ((64, 512, 512), (0.3, 0.7, 0.7), (12, 224, 224)),  # 19.2 mm at 1.6 mm per pixel: voxels as deep as wide
        ((48, 32, 32), (2.5, 4.0, 4.0), (32, 224, 224)),  # a small crop grows in the plane, not in depth
    ],
)
def test_size_policy(shape: tuple[int, ...], spacing: tuple[float | None, ...], expected: tuple[int, ...]) -> None:
    assert M3RetImageProcessor().target_shape(shape, spacing) == expected


def test_invalid_spacing_counts_as_unknown() -> None:
    expected = M3RetImageProcessor().target_shape((40, 64, 64), (None, None, None))
    for mm in (0.0, -1.0, float("nan"), float("inf")):
        assert M3RetImageProcessor().target_shape((40, 64, 64), (mm, mm, mm)) == expected


def test_size_policy_never_exceeds_max_patches() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        shape = tuple(int(2 ** generator.uniform(0, 12)) for _ in range(3))
        spacing = tuple(None if generator.random() < 0.3 else float(2 ** generator.uniform(-3, 3)) for _ in range(3))
        size, frames, budget = (int(2 ** generator.uniform(4, 9)) for _ in range(3))
        processor = M3RetImageProcessor(size=size, num_frames=frames, max_patches=budget)
        depth, height, width = processor.target_shape(shape, spacing)
        assert height % 16 == width % 16 == 0
        assert 1 <= depth <= min(shape[0], frames)
        assert -(-depth // 4) * height * width // 256 <= budget


def test_call_overrides_settings_and_rejects_invalid_ones() -> None:
    processor = M3RetImageProcessor()
    volume = np.random.default_rng(0).random((40, 64, 64))
    assert processor(volume)["grid_thw"].tolist() == [[8, 14, 14]]
    assert processor(volume, size=112, num_frames=16)["grid_thw"].tolist() == [[4, 7, 7]]
    assert processor(volume, max_patches=100)["grid_thw"].prod() <= 100
    for wrong in ({"size": -5}, {"size": 0}, {"num_frames": 0}, {"max_patches": -1}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            processor(volume, **wrong)
    with pytest.raises(TypeError, match="colour"):
        processor(volume, colour="blue")


def test_channels_first_gives_the_rows_of_channels_last() -> None:
    processor = M3RetImageProcessor(size=32)
    batch = np.random.default_rng(0).integers(0, 255, (4, 40, 48, 3), dtype=np.uint8)
    expected = processor([*batch])
    first = torch.from_numpy(batch).permute(0, 3, 1, 2)
    for given in (first, first.numpy(), [*first]):  # as for other image processors, a batch is a list of images
        got = processor(given, input_data_format="channels_first")
        assert torch.equal(got["grid_thw"], expected["grid_thw"])
        assert torch.equal(got["pixel_values"], expected["pixel_values"])
    clip = processor([first], input_data_format="channels_first")
    assert torch.equal(clip["pixel_values"], processor(batch)["pixel_values"])
    for ambiguous in (first, first[0]):
        with pytest.raises(M3RetReadError, match="input_data_format"):
            processor(ambiguous)


def test_intensity_is_declared_per_call() -> None:
    hounsfield = np.random.default_rng(0).normal(40, 20, (6, 32, 32)).astype(np.int16)
    processor = M3RetImageProcessor(size=32)
    declared = processor(hounsfield, intensity="hounsfield")["pixel_values"]
    assert torch.equal(declared, processor({"volume": hounsfield, "intensity": "hounsfield"})["pixel_values"])
    assert declared.abs().max() < 0.2  # soft tissue is near 0 HU, the middle of the range
    assert processor(hounsfield)["pixel_values"].abs().max() == 1


def test_colour_becomes_luma_for_one_channel() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    processor = M3RetImageProcessor(size=32, num_channels=1)
    rows, grey = (processor(image)["pixel_values"] for image in (picture, picture.convert("L")))
    assert rows.shape == grey.shape
    assert (rows - grey).abs().max() < 1.1 * 2 / 255  # Pillow rounds to 8 bits


def test_frames_of_a_clip_are_selected_and_slices_of_a_volume_averaged() -> None:
    """Slices sample continuous tissue; frames of a video must not be blended."""
    alternating = np.zeros((1, 64, 32, 32), dtype=np.float32)
    alternating[:, 1::2] = 1
    processor = M3RetImageProcessor(size=32, num_frames=16)
    frames = processor.resize(Scan(alternating, (None, None, None), {}))
    assert set(frames.unique().tolist()) <= {-1.0, 1.0}
    slices = processor.resize(Scan(alternating, (1.0, 1.0, 1.0), {}))
    assert slices[:, 2:-2].abs().max() < 0.3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("depth", [1, 2, 4, 7])
@pytest.mark.parametrize("size", [48, 128])
def test_frames_of_8_bits_are_resized_as_by_pillow(channels: int, depth: int, size: int) -> None:
    """Up to one grey level, since both round after each axis."""
    frames = np.random.default_rng(0).integers(0, 256, (depth, 90, 70, channels), dtype=np.uint8)
    resized = M3RetImageProcessor(size=size).resample(Scan(frames.transpose(3, 0, 1, 2), (None, None, None), {}))
    assert resized.dtype == torch.uint8
    for frame, found in zip(frames, resized.permute(1, 2, 3, 0).numpy(), strict=True):
        picture = Image.fromarray(frame if channels == 3 else frame[..., 0])
        expected = np.asarray(picture.resize(found.shape[1::-1], Image.Resampling.BILINEAR), dtype=np.int16)
        assert np.abs(found.reshape(expected.shape) - expected).max() <= 1


def test_read_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "notes.dcm").write_text("not a scan")
    with pytest.raises(M3RetReadError) as caught:
        M3RetImageProcessor()([np.zeros((32, 32), dtype=np.uint8), tmp_path / "notes.dcm"])
    assert caught.value.file == "notes.dcm"


def test_empty_list_is_rejected() -> None:
    with pytest.raises(ValueError, match="images"):
        M3RetImageProcessor()([])


@pytest.mark.slow
def test_real_scans_of_every_kind_in_one_call(devset: Path) -> None:
    records = read_manifest(devset)
    kinds = {
        suffix: next(r.location for r in records if r.location.suffix == suffix)
        for suffix in (".jpg", ".mp4", ".gz", ".npz")
    }
    series = next(record.location for record in records if record.location.is_dir() and record.modality == "ct")
    inputs = M3RetImageProcessor()([series, *kinds.values()], return_tensors="pt")
    assert inputs["grid_thw"].tolist()[0] == [8, 14, 14]  # 98 slices of a chest CT become 32
    assert len(inputs["grid_thw"]) == 5
    assert torch.isfinite(inputs["pixel_values"]).all()


@pytest.mark.parametrize("slices", [1, 3])
def test_a_single_coloured_pixel_makes_a_scan_coloured(slices: int) -> None:
    grey = np.repeat(np.random.default_rng(0).integers(0, 255, (slices, 70, 40, 1), dtype=np.uint8), 3, axis=-1)
    colour = grey.copy()
    colour[-1, -1, -1, 2] ^= 1
    processor = M3RetImageProcessor()
    assert np.array_equal(processor.read(grey).array, grey[None, ..., 0])
    assert np.array_equal(processor.read(colour).array, colour.transpose(3, 0, 1, 2))


def smooth_picture(height: int, width: int) -> np.ndarray:
    """Return a picture without detail that half its size could not hold."""
    y, x = np.mgrid[:height, :width] / 48
    return np.stack([np.sin(x + y), np.cos(y), np.sin(x) * np.cos(y)], axis=-1).clip(-1, 1) * 100 + 128


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    ("shape", "min_pixels", "factor"),
    [
        ((512, 768), 256 * 384, 2),  # exactly as many as needed
        ((512, 768), 256 * 384 + 1, 1),
        ((512, 768), 64 * 96, 8),
        ((512, 768), 1, 8),
        ((513, 771), 128 * 192, 4),  # sides round up
        ((512, 768), None, 1),
    ],
)
def test_jpeg_is_decoded_at_the_smallest_sufficient_size(
    shape: tuple[int, int], min_pixels: int | None, factor: int, mode: str
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(smooth_picture(*shape).astype(np.uint8)).convert(mode).save(buffer, "JPEG", quality=95)
    processor = M3RetImageProcessor(size=64)
    scan = processor.read(buffer.getvalue(), min_pixels=min_pixels)
    assert scan.array.shape == (1 if mode == "L" else 3, 1, *(-(-side // factor) for side in shape))
    assert scan.description.get("decoded_at") == (None if factor == 1 else f"1/{factor}")
    whole = processor.resize(processor.read(buffer.getvalue()))
    assert (processor.resize(scan) - whole).abs().mean() <= 2 * 2 / 255


def test_other_images_are_decoded_whole_and_exif_rotation_is_applied() -> None:
    picture = Image.fromarray(smooth_picture(256, 512).astype(np.uint8))
    processor = M3RetImageProcessor()
    for image, options in (
        (picture, {"format": "PNG"}),
        (picture.convert("CMYK"), {"format": "JPEG"}),
        (Image.fromarray(np.full((256, 512), 40_000, np.uint16)), {"format": "PNG"}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, **options)
        assert processor.read(buffer.getvalue(), min_pixels=1).array.shape[2:] == (256, 512)
    exif = picture.getexif()
    exif[0x0112] = 6  # shown after a rotation by 90 degrees
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif, quality=95)
    scan = processor.read(buffer.getvalue(), min_pixels=128 * 256)
    assert scan.array.shape == (3, 1, 256, 128)
    whole = processor.read(buffer.getvalue()).array[..., ::2, ::2]
    assert np.abs(scan.array.astype(int) - whole).mean() <= 6


@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_jpeg_has_the_grid_of_the_whole_image(orientation: int) -> None:
    """Sides round up: 455 x 256 becomes 228 x 128, whose aspect ratio belongs to another grid at some sizes."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for size, sides in [(224, (256, 455)), (96, (256, 455)), (64, (301, 203)), (32, (131, 517))]:
        buffer = io.BytesIO()
        Image.fromarray(smooth_picture(*sides).astype(np.uint8)).save(buffer, "JPEG", exif=exif)
        processor = M3RetImageProcessor(size=size)
        reduced, whole = (processor.read(buffer.getvalue(), min_pixels=pixels) for pixels in (128 * 101 // 4, None))
        assert "decoded_at" in reduced.description
        assert processor.resize(reduced).shape == processor.resize(whole).shape


def test_an_image_in_memory_is_not_reduced() -> None:
    buffer = io.BytesIO()
    Image.fromarray(smooth_picture(256, 256).astype(np.uint8)).save(buffer, "JPEG")
    with Image.open(buffer) as image:
        assert M3RetImageProcessor().read(image, min_pixels=1).array.shape[2:] == (256, 256)
        assert image.size == (256, 256)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32])
def test_percentiles_of_integers_are_those_of_numpy(dtype: type) -> None:
    generator = np.random.default_rng(0)
    masked = [generator.normal(300, 50, (4, 40, 40)) * (generator.random((4, 40, 40)) < kept) for kept in (0.4, 0.02)]
    for values in (generator.normal(300, 150, (6, 30, 31)), generator.gamma(0.3, 900, (1, 45, 46)), *masked):
        voxels = values.round().clip(0).astype(dtype) - dtype(20 if dtype == np.int16 else 0)
        low, high = np.percentile(voxels, (0.5, 99.5))
        expected = ((voxels.astype(np.float64) - low) / (high - low)).clip(0, 1)
        assert np.abs(M3RetImageProcessor().read(voxels).array[0] - expected).max() <= 1e-6


def test_each_channel_has_its_own_mean_and_deviation() -> None:
    """Against ViT's own processor, on pictures whose size it does not change; a grey scan has three channels, too."""
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    ours = M3RetImageProcessor(size=32, image_mean=mean, image_std=std)
    theirs = ViTImageProcessorPil(do_resize=False, image_mean=mean, image_std=std)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    pictures[1] = pictures[1, :, :, :1]  # grey
    rows = ours(list(pictures))["pixel_values"].view(2, 2, 2, 3, 4, 16, 16)
    images = rows.permute(0, 3, 4, 1, 5, 2, 6).reshape(2, 3, 4, 32, 32)
    expected = theirs(list(pictures), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(images, expected[:, :, None].expand_as(images), rtol=0, atol=1e-6)
    assert M3RetImageProcessor(**ours.to_dict()).to_dict() == ours.to_dict()
    volume = ours.resize(ours.read(pictures[1]))
    assert volume.shape == (3, 1, 32, 32)
    torch.testing.assert_close(ours.denormalise(volume)[0, 0], torch.from_numpy(pictures[1, :, :, 0]) / 255)
