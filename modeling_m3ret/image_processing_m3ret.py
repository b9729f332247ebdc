"""Image processor: read, resize, normalise and pack scans for the encoder.

One size policy serves every scan; it uses the array and the voxel spacing, never the modality. `reading_m3ret` reads
the files. Shapes and the terms row, pack and grid are defined in `packing_m3ret`. This file is copied into every
checkpoint and imports nothing else of the project.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, default_data_collator
from transformers.image_processing_utils import BaseImageProcessor  # `transformers` itself has none without Pillow
from transformers.processing_utils import ImagesKwargs

from .packing_m3ret import split_into_patches
from .reading_m3ret import M3RetReadError, Scan, read_scan


class M3RetImageProcessorKwargs(TypedDict, total=False):
    """Settings that `from_pretrained` may override."""

    size: int
    num_frames: int
    max_patches: int
    patch_size: int
    patch_depth: int
    num_channels: int
    image_mean: float | list[float]
    image_std: float | list[float]


# Standard settings of other image processors that have one possible value here, so that giving it changes nothing.
FIXED_SETTINGS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_center_crop": False,
    "do_pad": False,
    "data_format": "channels_first",
}
SAVED_BY_TRANSFORMERS = ("auto_map", "image_processor_type", "feature_extractor_type", "processor_class")


class M3RetImageProcessor(BaseImageProcessor):
    """Read scans and pack them: `processor(["ct.nii.gz", "clip.mp4", "chest.dcm", "series/"], return_tensors="pt")`.

    A scan is a path, bytes, an open file, a PIL, nibabel or SimpleITK image, an array or tensor (`H W`, `H W C`,
    `D H W` or `D H W C`), a folder with a DICOM series, a list of DICOM slices, a `datasets` row or a value of one,
    decoded or not, or a `Scan`. URLs are not fetched. A call takes one scan, or a list or `datasets` column of scans of
    any kinds. Wrap the slices of one series in a list of their own: `processor([[slice_1, slice_2]])`.

    Channels come last, unless `input_data_format="channels_first"`: then an array is `H W`, `C H W`, or a batch
    `B C H W` of images. Within a list, `C H W` is an image and `D C H W` a clip. Without it, an array `(3, H, W)` is
    refused, as its first axis may be colours or slices.

    The same size policy applies to every scan:

    1. A slice gets the area `size` x `size` at its physical aspect ratio. Its sides are rounded to whole patches.
    2. The depth is limited to `num_frames`, and to the number of slices that makes voxels as deep as wide. It never
       grows. Slices of known spacing are resampled with antialiasing; frames of a video are selected evenly.
    3. A scan that still exceeds `max_patches` is scaled down by one factor along every axis.

    Args:
        size: edge in pixels of the square with the area of a resized slice. ViT, DINO and MAE use 224. A dictionary
            with one number, as other image processors have it (`{"height": 224, "width": 224}`), means that number.
        num_frames: maximum number of slices or frames. With patches of 4 x 16 x 16, 32 gives a CT a grid of
            8 x 14 x 14, about the work of eight X-rays.
        max_patches: maximum number of patches of a scan. 2048 is the next power of two above the 1,568 patches of that
            CT. It bounds the memory of attention and applies only to larger settings and elongated scans.
        patch_size: edge of a patch in pixels. Must equal the encoder's, as must the next two; see `M3RetConfig`.
        patch_depth: slices or frames of a patch.
        num_channels: channels of a patch. Colour is converted to grey if it is 1.
        image_mean: subtracted from values in [0, 1]. By default one number for all channels, since ImageNet's colour
            means do not describe medical scans; encoders that were trained with them need one for each channel. A list
            of equal numbers means that number.
        image_std: divides the centred values. Together with `image_mean`, maps [0, 1] to [-1, 1].

    Raises:
        ValueError: if a size is no integer of at least 1, `image_std` is not positive, or a standard setting of image
            processors has another value than the only one that this processor supports.
        TypeError: if an argument is unknown.
    """

    model_input_names = ["pixel_values", "grid_thw"]
    valid_kwargs = M3RetImageProcessorKwargs  # type: ignore[assignment]

    def __init__(
        self,
        size: int | Mapping[str, int] = 224,
        num_frames: int = 32,
        max_patches: int = 2048,
        patch_size: int = 16,
        patch_depth: int = 4,
        num_channels: int = 3,
        image_mean: float | Sequence[float] = 0.5,
        image_std: float | Sequence[float] = 0.5,
        **kwargs: Any,
    ):
        given = {name: value for name, value in kwargs.items() if name not in SAVED_BY_TRANSFORMERS and name[0] != "_"}
        _check_fixed_settings(given, M3RetImageProcessorKwargs.__annotations__)
        super().__init__(**{name: value for name, value in kwargs.items() if name not in given})
        self.size = _positive_integer("size", _single_number("size", size))
        self.num_frames = _positive_integer("num_frames", num_frames)
        self.max_patches = _positive_integer("max_patches", max_patches)
        self.patch_size = _positive_integer("patch_size", patch_size)
        self.patch_depth = _positive_integer("patch_depth", patch_depth)
        self.num_channels = _positive_integer("num_channels", num_channels)
        self.image_mean = _channel_numbers("image_mean", image_mean, self.num_channels)
        self.image_std = _channel_numbers("image_std", image_std, self.num_channels)
        if np.min(self.image_std) <= 0:
            raise ValueError(f"image_std is out of range: expected positive numbers, got {image_std}.")

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a processor from its settings, as every image processor.

        Raises:
            TypeError, ValueError: if one of `kwargs` is a setting of other image processors that has no effect here;
                transformers would leave it out.
        """
        standard = ImagesKwargs.__annotations__.keys() - M3RetImageProcessorKwargs.__annotations__.keys()
        given = {name: value for name, value in kwargs.items() if name in standard}
        _check_fixed_settings(given, M3RetImageProcessorKwargs.__annotations__)
        return super().from_dict(image_processor_dict, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # by name, because `datasets` hashes classes of remote code by their content, which differs between processes
        return _restore, (type(self).__module__, type(self).__qualname__, self.__dict__)

    def preprocess(
        self,
        images: Any,
        *,
        size: int | Mapping[str, int] | None = None,
        num_frames: int | None = None,
        max_patches: int | None = None,
        intensity: str | None = None,
        input_data_format: str | None = None,
        series: str | int | None = None,
        return_tensors: str | None = "pt",
        **unknown: Any,
    ) -> BatchFeature:
        """Read, resize and pack one scan or a list of scans.

        Args:
            images: one scan or a list of scans; see the class for the kinds.
            size: overrides the processor's setting, as do `num_frames` and `max_patches`.
            intensity: how to scale values of files and arrays that do not declare it, such as "hounsfield" for a CT in
                NIfTI; see `read_scan`.
            input_data_format: "channels_first" or "channels_last", the layout of arrays and tensors.
            series: which DICOM series to read of a folder or list with several: its UID, its index or "largest"; see
                `read_scan`.
            return_tensors: type of the returned arrays, as in every image processor. None returns lists with one array
                per scan, which `datasets.map(batched=True)` needs, since it stores one entry per row.

        Returns:
            `pixel_values (P, C*t*p*p)` float32 and `grid_thw (B, 3)` int64; lists hold those of each scan by itself.

        Raises:
            M3RetReadError: if a scan cannot be read.
            ValueError: if the list is empty, a size is no integer of at least 1, or `series` is neither a string nor
                an integer.
            TypeError: if an argument is unknown.
        """
        call = ("size", "num_frames", "max_patches", "intensity", "input_data_format", "series", "return_tensors")
        _check_fixed_settings(unknown, call)
        size = None if size is None else _single_number("size", size)
        given = {"size": size, "num_frames": num_frames, "max_patches": max_patches}
        settings = {name: None if value is None else _positive_integer(name, value) for name, value in given.items()}
        is_batch = input_data_format == "channels_first" and getattr(images, "ndim", None) == 4
        is_sequence = isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray, memoryview))
        scans = list(images) if is_batch or is_sequence else [images]  # a `datasets` column is a sequence, too
        if not scans:
            raise ValueError("images is empty: expected at least one scan, got an empty list.")
        declared: dict[str, Any] = {"intensity": intensity, "input_data_format": input_data_format, "series": series}
        declared |= {"num_frames": settings["num_frames"], "min_pixels": (settings["size"] or self.size) ** 2}
        rows, grids = self.pack([self.resize(self.read(scan, **declared), **settings) for scan in scans])
        if return_tensors is None:
            of_scans = {"pixel_values": rows.split(grids.prod(1).tolist()), "grid_thw": grids.split(1)}
            return BatchFeature({name: [each.numpy() for each in values] for name, values in of_scans.items()})
        return BatchFeature({"pixel_values": rows, "grid_thw": grids}, tensor_type=return_tensors)

    def read(self, source: Any, num_frames: int | None = None, **declared: Any) -> Scan:
        """Read one scan; of a clip, only the frames that will be used.

        `declared` are further arguments of `read_scan`.
        """
        return read_scan(source, num_frames=self.num_frames if num_frames is None else num_frames, **declared)

    def pack(self, volumes: Sequence[Tensor], compact_images: bool = False) -> tuple[Tensor, Tensor]:
        """Pack resized scans into patch rows, on the device they are on.

        The channel of a grey scan is repeated; for `num_channels` 1, colour becomes its luma (ITU-R BT.601), as in
        Pillow. Each value is written once, directly to its final position.

        Args:
            volumes: resized scans, each `(1 or 3, D, H, W)`.
            compact_images: if all scans are images, store their slice once per row instead of t times.

        Returns:
            `pixel_values (P, C*t*p*p)`, or `(P, C*p*p)` for compact images, and `grid_thw (B, 3)` int64.
        """
        if self.num_channels == 1:
            volumes = [volume if volume.shape[0] == 1 else _to_luma(volume) for volume in volumes]
        grids = [self.grid_shape(volume.shape) for volume in volumes]
        depth = 1 if compact_images and all(volume.shape[1] == 1 for volume in volumes) else self.patch_depth
        values = self.num_channels * depth * self.patch_size**2
        rows = volumes[0].new_empty(sum(math.prod(grid) for grid in grids), values)
        for rows_of_scan, volume in zip(rows.split([math.prod(grid) for grid in grids]), volumes, strict=True):
            patches = split_into_patches(volume[None], depth, self.patch_size)[0]  # (T, h, w, 1 or 3, t, p, p)
            rows_of_scan.view(*patches.shape[:3], self.num_channels, *patches.shape[4:]).copy_(patches)
        return rows, torch.tensor(grids, dtype=torch.int64, device=rows.device)

    def grid_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the patches along depth, height and width of a resized scan of shape `(C, D, H, W)`."""
        D, H, W = shape[1:]
        return -(-D // self.patch_depth), H // self.patch_size, W // self.patch_size

    def resize(self, scan: Scan, **settings: int | None) -> Tensor:
        """Resize a scan by the size policy and normalise it: `(1 or 3, D, H, W)` float32.

        The settings are `size`, `num_frames` and `max_patches`, as in `preprocess`.
        """
        return self.normalise(self.resample(scan, **settings).contiguous())

    @property
    def normalises_per_channel(self) -> bool:
        """Whether the channels have means or deviations of their own."""
        return isinstance(self.image_mean, list) or isinstance(self.image_std, list)

    def normalise(self, values: Tensor, channel_dim: int = -4) -> Tensor:
        """Return values minus `image_mean`, divided by `image_std`, in a new float32 tensor.

        Args:
            values: uint8, where 255 means 1, or float32 in [0, 1]; by default a scan `(1 or 3, D, H, W)`.
            channel_dim: dimension of the channels, counted from the last. It matters only if the channels have
                statistics of their own. A grey scan then gets all channels.
        """
        values, mean, std = to_unit_floats(values), self.image_mean, self.image_std
        if isinstance(mean, float | int) and isinstance(std, float | int):
            return values.mul(1 / std).sub_(mean / std)
        of_channels = [self._per_channel(numbers, -channel_dim).to(values.device) for numbers in (mean, std)]
        return (values - of_channels[0]) / of_channels[1]

    def denormalise(self, volume: Tensor) -> Tensor:
        """Return values in [0, 1] of a normalised scan or slice `(C, ...)`; undoes `normalise`."""
        std, mean = (self._per_channel(numbers, volume.ndim) for numbers in (self.image_std, self.image_mean))
        return volume * std.to(volume.device) + mean.to(volume.device)

    @staticmethod
    def _per_channel(numbers: float | list[float], ndim: int = 4) -> Tensor:
        """Return one number for all channels, or one for each, as a tensor that broadcasts with `(C, ...)`."""
        return torch.tensor(numbers, dtype=torch.float32).view(-1, *[1] * (ndim - 1))

    def resample(self, scan: Scan, **settings: int | None) -> Tensor:
        """Resize a scan by the size policy: `(1 or 3, D, H, W)`, uint8, where 255 means 1, or float32 in [0, 1].

        The settings are those of `resize`. The result may share the memory of the scan.
        """
        # copied in the order of its memory, since torch cannot wrap read-only arrays
        volume = torch.from_numpy(scan.array if scan.array.flags.writeable else scan.array.copy(order="K"))
        depth, height, width = self.target_shape(tuple(volume.shape[1:]), scan.spacing, **settings)
        C, D, H, W = volume.shape
        if depth < D and scan.spacing[0] is None:
            centres = (torch.arange(depth) + 0.5) * D / depth  # of equal segments of the clip
            volume = volume[:, centres.long()]
        elif depth < D:  # before the plane, so that fewer slices are resized
            volume = _interpolate(volume.float().reshape(C, 1, D, H * W), depth, H * W).view(C, depth, H, W)
            volume = volume / 255 if scan.array.dtype == np.uint8 else volume
        return _interpolate(volume, height, width)

    def target_shape(
        self,
        shape: tuple[int, ...],
        spacing: tuple[float | None, ...],
        *,
        size: int | None = None,
        num_frames: int | None = None,
        max_patches: int | None = None,
    ) -> tuple[int, int, int]:
        """Return the depth, height and width in voxels that the size policy gives a scan.

        Args:
            shape: `(D, H, W)` voxels.
            spacing: mm between voxel centres along D, H, W; None where unknown. Values that are not positive and finite
                count as unknown.
            size: overrides the processor's setting, as do `num_frames` and `max_patches`.

        Raises:
            ValueError: if a setting is not an integer of at least 1.
        """
        size = self.size if size is None else _positive_integer("size", size)
        num_frames = self.num_frames if num_frames is None else _positive_integer("num_frames", num_frames)
        max_patches = self.max_patches if max_patches is None else _positive_integer("max_patches", max_patches)
        D, H, W = shape
        slice_mm, row_mm, column_mm = (mm if mm is not None and 0 < mm < math.inf else None for mm in spacing)
        if row_mm is None or column_mm is None:
            row_mm = column_mm = 1.0
            slice_mm = None  # without a pixel size there is nothing to compare it with
        aspect = math.sqrt((H * row_mm) / (W * column_mm))
        depth = min(D, num_frames)
        if slice_mm is not None and D > 1:
            pixel_mm = math.sqrt(H * row_mm * W * column_mm) / size
            depth = max(1, min(depth, math.ceil(D * slice_mm / pixel_mm)))

        shrink = 1.0
        while True:
            edge = size * shrink
            height = max(1, round(edge * aspect / self.patch_size))
            width = max(1, round(edge / aspect / self.patch_size))
            slices = max(1, round(depth * shrink))
            if -(-slices // self.patch_depth) * height * width <= max_patches or edge < 0.1:
                # an extremely elongated scan, thousands of times longer than wide, is limited along its length
                height, width = min(height, max_patches), min(width, max_patches)
                return slices, height * self.patch_size, width * self.patch_size
            shrink *= 0.98


class M3RetCollator:
    """Join scans, processed one by one, to a batch: `Trainer(..., data_collator=M3RetCollator())`.

    The default collators stack, which scans of different sizes do not allow. Here their rows become one pack, and all
    else is collated as in `default_data_collator`: `label` or `labels` to `labels (B, ...)`, text is left out.
    """

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate B items, each with what the processor returns for one scan, as tensors, arrays or lists.

        Returns:
            `grid_thw (B, 3)` int64, first, as libraries take the batch size from the first tensor; `pixel_values
            (P, C*t*p*p)`, float32 unless the items hold tensors of another type; and the other columns.

        Raises:
            ValueError: if an item lacks `pixel_values` or `grid_thw`, or does not hold exactly one scan. The message
                gives the index of the item.
        """
        grids, rows = [], []
        for number, item in enumerate(items):
            if absent := [name for name in M3RetImageProcessor.model_input_names if item.get(name) is None]:
                raise ValueError(
                    f"item {number} has no {' and no '.join(absent)}: expected the output of the processor for one "
                    f"scan, got {', '.join(item) or 'an empty item'}. If scans are read in a transform, set "
                    "remove_unused_columns=False in TrainingArguments."
                )
            grid, values = (_to_tensor(item[name]) for name in ("grid_thw", "pixel_values"))
            if grid.numel() != 3 or values.ndim != 2 or len(values) != int(grid.prod()):
                raise ValueError(
                    f"item {number} is not one scan: expected grid_thw (1, 3) and one row of pixel_values for each of "
                    f"its patches, got grid_thw {grid.tolist()} and pixel_values {tuple(values.shape)}. Call the "
                    "processor for each scan, or with return_tensors=None in a map with batched=True."
                )
            grids.append(grid.long().reshape(1, 3))
            rows.append(values)
        others = [{k: v for k, v in item.items() if k not in M3RetImageProcessor.model_input_names} for item in items]
        return {"grid_thw": torch.cat(grids), "pixel_values": torch.cat(rows), **default_data_collator(others)}


def _to_tensor(values: Any) -> Tensor:
    """Convert an array or nested lists, as `datasets` stores them, to a tensor; float64 becomes float32."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def to_unit_floats(values: Tensor) -> Tensor:
    """Return uint8 values, where 255 means 1, as float32 in [0, 1]. Return float32 values unchanged."""
    return values * (1 / 255) if values.dtype == torch.uint8 else values


def _interpolate(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize the planes of `(C, D, H, W)` to `(C, D, height, width)`, bilinear with antialiasing, in the same dtype."""
    if tuple(frames.shape[2:]) == (height, width):
        return frames
    resize = functools.partial(torch.nn.functional.interpolate, size=(height, width), mode="bilinear")
    C, D, H, W = frames.shape
    if frames.dtype != torch.uint8:  # when nothing shrinks, antialiasing has no effect and doubles the time
        return resize(frames, antialias=height < H or width < W)
    if C == 1 and D > 1:  # torch resizes four channels in less time than one, so each holds every fourth slice
        slices = torch.cat([frames[0], frames[0, -1:].expand(-D % 4, -1, -1)]).unflatten(0, (-1, 4))
        resized = resize(slices.contiguous(memory_format=torch.channels_last), antialias=True)
        return resized.flatten(0, 1)[None, :D]
    # channels_last, which is how decoders store colour, takes an eighth of the time
    images = frames.transpose(0, 1).contiguous(memory_format=torch.channels_last)  # (D, C, H, W)
    return resize(images, antialias=True).transpose(0, 1)


def _to_luma(volume: Tensor) -> Tensor:
    """Return the grey values `(1, D, H, W)` of a colour scan `(3, D, H, W)`."""
    weights = volume.new_tensor([0.299, 0.587, 0.114])
    return torch.einsum("c,cdhw->dhw", weights, volume)[None]


def _single_number(name: str, value: Any) -> Any:
    """Return the single number of a setting: a number, or a mapping or sequence whose values are all equal.

    Raises:
        ValueError: if the values differ or are not finite numbers. The message names the setting.
    """
    if isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str)):
        numbers = set(value.values() if isinstance(value, Mapping) else value)
        if len(numbers) != 1:
            expected = "one number (equal height and width)" if name == "size" else "one number for all channels"
            raise ValueError(f"{name} is not supported: expected {expected}, got {value}.")
        (value,) = numbers
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} is not supported: expected a finite number, got {value!r}.")
    return value


def _channel_numbers(name: str, value: Any, num_channels: int) -> float | list[float]:
    """Return the number for all channels of a setting, or the list of one number for each if they differ.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(value, Sequence) and not isinstance(value, str) and len(set(value)) > 1:
        if len(value) != num_channels:
            raise ValueError(f"{name} is not supported: expected {num_channels} numbers, got {value}.")
        return [float(_single_number(name, number)) for number in value]
    return float(_single_number(name, value))


def _check_fixed_settings(settings: Mapping[str, Any], known: Iterable[str]) -> None:
    """Check settings that the processor does not have itself.

    Raises:
        TypeError: if one is unknown; the message lists the `known` ones.
        ValueError: if one of `FIXED_SETTINGS` has another value than the supported one.
    """
    unknown = sorted(settings.keys() - FIXED_SETTINGS.keys())
    if unknown:
        raise TypeError(f"unknown argument: expected {', '.join(known)}, got {', '.join(unknown)}.")
    for name, value in settings.items():
        if value not in (None, FIXED_SETTINGS[name]):
            raise ValueError(
                f"{name} is not supported: expected {FIXED_SETTINGS[name]!r}, got {value!r}. Leave it out."
            )


def _restore(module: str, name: str, settings: dict[str, Any]) -> Any:
    """Return an image processor of the class with this name. For pickle."""
    cls = getattr(importlib.import_module(module), name)
    processor = cls.__new__(cls)
    processor.__dict__.update(settings)
    return processor


def _positive_integer(name: str, value: Any) -> int:
    """Return the value of a setting as an integer.

    Raises:
        ValueError: if it is not an integer of at least 1. The message names the setting.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 1 or value != int(value):
        raise ValueError(f"{name} is out of range: expected an integer of at least 1, got {value!r}.")
    return int(value)


__all__ = ["M3RetCollator", "M3RetImageProcessor", "M3RetReadError"]
