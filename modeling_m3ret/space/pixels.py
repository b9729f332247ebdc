"""Turn a scan into what a browser shows: NIfTI files for the viewer, and one small picture.

A NIfTI file is written anew: it holds pixels, spacing and orientation, and no text, whatever the upload's header held.
"""

from __future__ import annotations

import base64
import gzip
import math
from collections.abc import Iterator

import numpy as np
from nibabel.nifti1 import Nifti1Header
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from ..intensity_m3ret import HU_RANGE
from ..reading_m3ret import Scan


# of a volume in the browser: 500 CT slices of 512 x 512; larger ones are shown at a lower resolution
VIEW_BYTES = 2**28
HEAT_SIDE = 128  # voxels; a heatmap has the resolution of patches, at most 14 across
PER_MILLE = 1000  # grey values without a unit are sent as integers of this scale
PREVIEW_WINDOW = (-160.0, 240.0)  # HU of a CT's small picture: soft tissue, level 40 and width 400
# axis (0 left-right, 1 posterior-anterior, 2 inferior-superior) and direction of D, H and W in RAS, see `read_scan`
ORIENTATIONS = {
    "axial": ((2, 1), (1, -1), (0, -1)),
    "coronal": ((1, -1), (2, -1), (0, -1)),
    "sagittal": ((0, -1), (2, -1), (1, -1)),
}
BODY_LEVEL = 0.1  # of the 99th percentile: brighter voxels are not background
BODY_HU = -400.0  # between fat and lung
BODY_SHARE = 0.25  # parts of a slice smaller than this share of the largest are noise, text or the table of a CT
BODY_DETAIL = 1 / 64  # of the longer side: gaps that are closed, and lines that are removed, are up to twice as wide


def is_hounsfield(scan: Scan) -> bool:
    """Return whether the scan's values are Hounsfield units."""
    return str(scan.description.get("intensity", "")).startswith("hounsfield")


def plane_of(scan: Scan) -> str:
    """Return the plane of the slices, or an empty string if the orientation is unknown."""
    return str(scan.description.get("plane", "")) if scan.spacing[0] is not None else ""


def has_mm(scan: Scan) -> bool:
    """Return whether distances within a slice are known in mm."""
    return None not in scan.spacing[1:] and "pixel_aspect_ratio" not in scan.description


def describe_scan(scan: Scan) -> str:
    """Describe size and spacing, without any text from a file header."""
    _, D, H, W = scan.array.shape
    through, down, across = scan.spacing
    total = scan.description.get("frames_total", D)
    if D == 1:
        size = f"{W} × {H} px"
    elif through is None:
        size = f"{D} frames of {W} × {H} px" + (f", sampled from {total}" if total != D else "")
    else:
        size = f"{D} slices of {W} × {H} px"
    mm = []
    if has_mm(scan):
        mm.append(f"{across:.3g} × {down:.3g} mm per pixel")
    if through is not None and D > 1:
        mm.append(f"{through:.3g} mm between slices")
    return " · ".join([size, *(mm or ["spacing unknown"])])


def preview(scan: Scan, side: int = 256) -> Image.Image:
    """Return the middle slice or frame in RGB, of square pixels, its longer side `side` px."""
    _, D, H, W = scan.array.shape
    plane = np.asarray(scan.array[:, D // 2], np.float32) / (255 if scan.array.dtype == np.uint8 else 1)
    if is_hounsfield(scan):
        low, high = ((value - HU_RANGE[0]) / (HU_RANGE[1] - HU_RANGE[0]) for value in PREVIEW_WINDOW)
        plane = (plane - low) / (high - low)
    grey = np.rint(plane.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    _, down, across = scan.spacing
    height, width = (H * down, W * across) if down and across else (float(H), float(W))
    scale = side / max(height, width)
    image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(grey, (H, W, 3))))
    return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)


# ------------------------------------------------------------------------------------------------------------- volumes


def volume_stride(scan: Scan) -> int:
    """Return of how many rows and columns one is sent, so that the volume takes at most `VIEW_BYTES`."""
    bytes_per_voxel = 3 if len(scan.array) == 3 else 2
    return math.ceil(math.sqrt(scan.array[0].size * bytes_per_voxel / VIEW_BYTES))


def volume_bytes(scan: Scan) -> tuple[int, Iterator[bytes]]:
    """Return the size of a scan's NIfTI file and its parts, slice by slice, so that no copy of the volume is needed.

    Values are Hounsfield units, bytes (8-bit images, colours), or thousandths of the range of the scan.
    """
    stride = volume_stride(scan)
    array = scan.array[:, :, ::stride, ::stride]
    if len(array) == 3:
        dtype: np.dtype = np.dtype([(colour, "u1") for colour in "RGB"])
    else:
        dtype = np.dtype(np.uint8 if array.dtype == np.uint8 and not is_hounsfield(scan) else np.int16)
    head = nifti_head(scan, array.shape[1:], dtype, stride)

    def parts() -> Iterator[bytes]:
        yield head
        for depth in range(array.shape[1]):
            yield _stored_slice(array[:, depth], dtype, is_hounsfield(scan)).tobytes()

    return len(head) + array[0].size * dtype.itemsize, parts()


def _stored_slice(plane: NDArray[np.generic], dtype: np.dtype, hounsfield: bool) -> NDArray[np.generic]:
    """Return a slice `(C, H, W)` as it is stored: `(H, W)`, or `(H, W, 3)` bytes of colours."""
    if plane.dtype == np.uint8:
        if hounsfield:
            return np.rint(plane[0] / 255 * (HU_RANGE[1] - HU_RANGE[0]) + HU_RANGE[0]).astype(dtype)
        return np.ascontiguousarray(plane.transpose(1, 2, 0)) if len(plane) == 3 else plane[0]
    if len(plane) == 3:
        return np.rint(plane.transpose(1, 2, 0) * 255).astype(np.uint8)
    low, high = HU_RANGE if hounsfield else (0, PER_MILLE)
    return np.rint(plane[0] * (high - low) + low).astype(dtype)


def nifti_head(scan: Scan, shape: tuple[int, ...], dtype: np.dtype, stride: int) -> bytes:
    """Return the first 352 bytes of a NIfTI file of every `stride`-th row and column of a scan."""
    header = Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape[::-1])
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    affine = np.zeros((4, 4))
    steps = [(step or 1.0) * scale for step, scale in zip(scan.spacing, (1, stride, stride), strict=True)]
    axes = ORIENTATIONS[plane_of(scan) or "axial"]
    for column, (step, (axis, sign)) in enumerate(zip(reversed(steps), reversed(axes), strict=True)):
        affine[axis, column] = sign * step
    affine[3, 3] = 1
    header.set_sform(affine, code="scanner")
    header.set_zooms(steps[::-1])
    header.set_xyzt_units("mm", "sec")
    return bytes(header.binaryblock) + bytes(4)  # no extensions


def heat_base64(scan: Scan, heat: NDArray[np.uint8]) -> str:
    """Return a heatmap of every `heat_stride`-th row and column as a compressed NIfTI file in base64.

    Values are square roots of the confidence, which NiiVue squares to obtain their opacity.
    """
    roots = np.rint(255 * np.sqrt(heat / 255)).astype(np.uint8)
    data = nifti_head(scan, heat.shape, roots.dtype, heat_stride(scan)) + roots.tobytes()
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def heat_stride(scan: Scan) -> int:
    """Return of how many rows and columns a heatmap keeps one, so that it has at most `HEAT_SIDE` a side."""
    return -(-max(scan.array.shape[2:]) // HEAT_SIDE)


# ---------------------------------------------------------------------------------------------------------------- body


def body_mask(scan: Scan, stride: int = 1) -> NDArray[np.bool_]:
    """Return where a scan shows the body, not air, a collimator, the frame of an endoscope or text.

    The foreground is brighter than a threshold. In each slice gaps are closed and holes are filled, so that lungs
    belong to the body, and then lines and small parts are left out, such as the table of a CT.

    Returns:
        `(D, H, W)` of every `stride`-th row and column; True everywhere if there is no such foreground.
    """
    grey = np.asarray(scan.array[:, :, ::stride, ::stride], np.float32).max(0)
    if scan.array.dtype == np.uint8:
        grey /= 255
    if is_hounsfield(scan):
        level = (BODY_HU - HU_RANGE[0]) / (HU_RANGE[1] - HU_RANGE[0])
    else:
        level = BODY_LEVEL * float(np.percentile(grey, 99))
    radius = max(1, round(max(grey.shape[1:]) * BODY_DETAIL))
    disc = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius
    mask = np.zeros(grey.shape, dtype=bool)
    for plane, foreground in zip(mask, grey > level, strict=True):
        closed = ndimage.binary_closing(np.pad(foreground, 2 * radius), disc)
        solid = ndimage.binary_opening(ndimage.binary_fill_holes(closed), disc)
        labels, _ = ndimage.label(solid[2 * radius : -2 * radius, 2 * radius : -2 * radius])
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0  # of the background
        plane[:] = (sizes >= max(1, BODY_SHARE * sizes.max()))[labels]
    return mask if mask.any() else np.ones_like(mask)
