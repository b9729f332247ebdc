"""The image processor's standard vocabulary, and values that other libraries hand out for a scan."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from remote_code import run_new_process
from transformers import AutoImageProcessor

from modeling_m3ret import M3RetImageProcessor, M3RetModel, M3RetReadError


AFFINE = np.diag([-2.0, -2.0, 4.0, 1.0])


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(-900, 900, (24, 20, 8)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / "volume.nii.gz")
    return tmp_path / "volume.nii.gz"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def assert_same(first: Any, second: Any) -> None:
    assert first["grid_thw"].tolist() == second["grid_thw"].tolist()
    torch.testing.assert_close(first["pixel_values"], second["pixel_values"], rtol=0, atol=1e-6)


def test_settings_of_other_image_processors_are_understood(picture: Path) -> None:
    expected = M3RetImageProcessor(size=64, image_mean=0.25, image_std=0.5)
    for size in ({"height": 64, "width": 64}, {"shortest_edge": 64}):
        processor = M3RetImageProcessor(size=size, image_mean=[0.25] * 3, image_std=(0.5, 0.5, 0.5), do_resize=True)
        assert processor.to_dict() == expected.to_dict()
        assert_same(M3RetImageProcessor(image_mean=0.25)(picture, size=size, do_normalize=True), expected(picture))
    assert_same(expected(picture, data_format="channels_first", do_rescale=None), expected(picture))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"do_resize": False}, ValueError),
        ({"do_normalize": False}, ValueError),
        ({"do_center_crop": True}, ValueError),
        ({"crop_size": 64}, TypeError),
        ({"resample": 3}, TypeError),
        ({"data_format": "channels_last"}, ValueError),
        ({"size": {"height": 64, "width": 32}}, ValueError),
        ({"size": "64"}, ValueError),
        ({"size": 64.5}, ValueError),
        ({"size": 0}, ValueError),
        ({"num_frames": "2"}, ValueError),
        ({"num_frames": True}, ValueError),
        ({"max_patches": float("inf")}, ValueError),
        ({"foo": 3}, TypeError),
    ],
)
def test_settings_without_effect_are_refused_by_name(
    settings: dict[str, Any], error: type[Exception], picture: Path
) -> None:
    (name,) = settings
    with pytest.raises(error, match=name):
        M3RetImageProcessor(**settings)
    with pytest.raises(error, match=name):
        M3RetImageProcessor()(picture, **settings)


def test_settings_without_effect_are_refused_when_loading(tmp_path: Path, picture: Path) -> None:
    """Of what is unknown, transformers leaves out all, as it may be meant for a model of the same pipeline."""
    expected = M3RetImageProcessor(size=64)
    expected.save_pretrained(tmp_path)
    for settings in ({"do_resize": False}, {"do_center_crop": True}, {"crop_size": 32}, {"resample": 3}):
        with pytest.raises((TypeError, ValueError), match=next(iter(settings))):
            AutoImageProcessor.from_pretrained(tmp_path, **settings)
    for settings in ({"do_center_crop": False}, {"do_pad": False, "do_resize": True}, {"dtype": "auto"}):
        assert_same(AutoImageProcessor.from_pretrained(tmp_path, **settings)(picture), expected(picture))


def test_numbers_of_numpy_are_numbers(tmp_path: Path, picture: Path) -> None:
    of_numpy = {
        "size": np.int64(64),
        "num_frames": np.uint8(8),
        "image_mean": np.float32(0.25),
        "image_std": np.ones(())[()],
    }
    processor, expected = M3RetImageProcessor(**of_numpy), M3RetImageProcessor(64, 8, image_mean=0.25, image_std=1)
    assert processor.to_dict() == expected.to_dict()
    processor.save_pretrained(tmp_path)
    assert_same(AutoImageProcessor.from_pretrained(tmp_path)(picture), expected(picture))
    assert_same(M3RetImageProcessor(32, image_mean=0.25, image_std=1)(picture, size=np.int64(64)), expected(picture))


@pytest.mark.parametrize("std", [0, -1.0, [0.5, 0.0, 0.5]])
def test_deviations_that_cannot_divide_are_refused(std: Any) -> None:
    with pytest.raises(ValueError, match="image_std"):
        M3RetImageProcessor(image_std=std)


@pytest.mark.parametrize("size", [10**4, 10**9])
def test_no_size_exceeds_the_maximum_of_patches(picture: Path, size: int) -> None:
    (grid,) = M3RetImageProcessor(size=size, max_patches=200)(picture)["grid_thw"].tolist()
    assert 150 < np.prod(grid) <= 200
    assert grid[2] / grid[1] == pytest.approx(60 / 40, rel=0.1)


@pytest.mark.parametrize("mean", [[0.485, 0.456], [0.485, 0.456, "0.4"], [0.485, 0.456, float("nan")]])
def test_means_of_another_number_of_channels_are_refused(mean: list[Any]) -> None:
    with pytest.raises(ValueError, match="image_mean"):
        M3RetImageProcessor(image_mean=mean)


def test_nibabel_images_are_read_like_their_file(volume: Path) -> None:
    processor = M3RetImageProcessor(size=32)
    expected = processor(volume)
    assert_same(processor(nib.load(volume)), expected)
    assert_same(processor(nib.Nifti1Image(np.asanyarray(nib.load(volume).dataobj), AFFINE)), expected)
    assert_same(processor([nib.load(volume)], intensity="hounsfield"), processor(volume, intensity="hounsfield"))


def test_simpleitk_images_are_read_like_their_file(volume: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    assert_same(M3RetImageProcessor(size=32)(sitk.ReadImage(str(volume))), M3RetImageProcessor(size=32)(volume))


def test_decoded_values_and_columns_of_datasets_are_read(volume: Path, picture: Path) -> None:
    datasets = pytest.importorskip("datasets")
    processor = M3RetImageProcessor(size=32)
    for feature, file in ((datasets.Image, picture), (datasets.Nifti, volume)):
        for decode in (True, False):
            features = datasets.Features({"scan": feature(decode=decode)})
            rows = datasets.Dataset.from_dict({"scan": [str(file)] * 2}, features=features)
            assert_same(processor(rows[0]["scan"]), processor(file))
            assert_same(processor(rows["scan"]), processor([file, file]))
            assert_same(processor(rows[:2]["scan"]), processor([file, file]))
    row = datasets.Dataset.from_dict({"nifti": [str(volume)]}, features=datasets.Features({"nifti": datasets.Nifti()}))
    assert_same(processor(row[0]), processor(volume))


class VideoDecoder:
    """A stand-in for torchcodec's decoder, which needs FFmpeg: frames are uint8 `(F, C, H, W)`."""

    def __init__(self, frames: np.ndarray):
        self.frames = torch.from_numpy(frames).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.frames)

    def get_frames_at(self, indices: list[int]) -> Any:
        return type("FrameBatch", (), {"data": self.frames[indices]})


def test_video_decoders_are_read_at_the_selected_frames() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (30, 32, 48, 3), dtype=np.uint8)
    processor = M3RetImageProcessor(size=32, num_frames=8)
    assert_same(processor(VideoDecoder(frames)), processor(frames))


def test_file_objects_stay_open(picture: Path) -> None:
    processor = M3RetImageProcessor(size=32)
    with picture.open("rb") as stream:
        assert_same(processor([stream, io.BytesIO(picture.read_bytes())]), processor([picture, picture]))
        assert stream.tell() == 0


@pytest.mark.parametrize(
    "url", ["https://example.org/a.png", "s3://bucket/a.dcm", "data:image/png;base64,iVBORw0KGgo="]
)
def test_urls_are_refused_in_words(url: str) -> None:
    with pytest.raises(M3RetReadError, match="not fetched"):
        M3RetImageProcessor()(url)


def test_voxels_in_nested_lists_are_refused_with_the_way_to_pass_them() -> None:
    with pytest.raises(M3RetReadError, match=r"got an object of type list\. .* numpy\.asarray"):
        M3RetImageProcessor()(np.zeros((1, 4, 32, 32), dtype=np.float32).tolist())


def test_processors_pickle_small_and_equal() -> None:
    processor = M3RetImageProcessor(size=96)
    pickled = pickle.dumps(processor)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).to_dict() == processor.to_dict()


def test_no_backend_is_missing(tmp_path: Path) -> None:
    M3RetModel(tiny_config()).save_pretrained(tmp_path)
    M3RetImageProcessor().save_pretrained(tmp_path)
    for backend in ("pil", "torchvision"):
        assert type(AutoImageProcessor.from_pretrained(tmp_path, backend=backend)) is M3RetImageProcessor


MAP = """
import json, sys
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import AutoImageProcessor
folder, *files = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
def count(rows):
    return {"patches": processor(rows["file"])["grid_thw"].prod(-1).tolist()}
rows = Dataset.from_dict({"file": files}).map(count, batched=True)
hashes = [Hasher.hash(what) for what in (processor, count, lambda row: processor(row["file"]))]
print(json.dumps({
    "module": type(processor).__module__, "hashes": hashes, "fingerprint": rows._fingerprint,
    "patches": rows["patches"][:],
}))
"""


@pytest.mark.slow
def test_map_of_a_remote_processor_is_cached(picture: Path, volume: Path, tmp_path: Path) -> None:
    M3RetImageProcessor(size=64).save_pretrained(tmp_path / "checkpoint")
    M3RetModel(tiny_config()).save_pretrained(tmp_path / "checkpoint")
    first, second = (
        run_new_process(MAP, tmp_path, str(tmp_path / "checkpoint"), str(picture), str(volume)) for _ in range(2)
    )
    assert first["module"].startswith("transformers_modules.")
    assert first == second
    assert first["patches"] == M3RetImageProcessor(size=64)([picture, volume])["grid_thw"].prod(-1).tolist()
