"""Read NIfTI volumes.

Voxels are brought to the canonical orientation by the affine of the header, as nibabel defines it. The header is
checked before any voxel is inflated. This file travels inside every checkpoint and imports only NumPy; nibabel is
imported when a file needs it.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

from .intensity_m3ret import blend_over_black, bytes_per_voxel, looks_like_hounsfield, to_unit_range
from .scan_m3ret import NIFTI_1, NIFTI_2, AnyScan, Description, ReadRequest, to_canonical_orientation


def read_nifti(data: bytes, request: ReadRequest) -> AnyScan:
    """Read NIfTI-1 or NIfTI-2 in one file, plain or gzipped. The header is checked before any voxel is inflated."""
    nibabel = request.import_decoder("nibabel", "nibabel")
    gzipped = data[:2] == b"\x1f\x8b"
    head = _gunzip(data, 540) if gzipped else data[:540]
    is_nifti_2 = head[4:8] in NIFTI_2
    magic = head[4:8] if is_nifti_2 else head[344:348]
    if not is_nifti_2 and magic not in NIFTI_1:
        raise request.error("unsupported", "a .nii.gz volume", "gzip of another format")
    if magic.startswith(b"ni"):
        advice = "Save header and voxels in one file."
        raise request.error("unsupported", "a single .nii or .nii.gz file", "the header of a .hdr/.img pair", advice)
    header = nibabel.Nifti2Header(head) if is_nifti_2 else nibabel.Nifti1Header(head[:348])
    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
    channels = len(dtype.names) if dtype.names else 1
    if (dtype.kind not in "iuf" and channels == 1) or offset < 0:
        raise request.error("unsupported", "integer, floating-point or RGB voxels", f"NIfTI voxels of type {dtype}")
    x, y, z = (*shape, 1, 1)[:3]
    request.check_size((x, y, z, channels, int(all(shape[3:]))), 1 if dtype.names else bytes_per_voxel(dtype))
    end = offset + x * y * z * dtype.itemsize
    request.check_size((end,), 1)
    request.check_ratio(end, len(data))
    raw = _gunzip(data, end) if gzipped else data
    if len(raw) < end:
        raise request.error("damaged", f"{end:,} bytes, as the NIfTI header declares", f"{len(raw):,}")
    flat = np.frombuffer(raw, dtype, x * y * z, offset)
    flat = flat.view(np.uint8) if channels > 1 else flat
    voxels = flat.reshape(z, y, x, channels)  # x varies fastest in the file
    voxels = (blend_over_black(voxels) if channels == 4 else voxels).transpose(3, 2, 1, 0)

    description: Description = {"format": "nifti", "volumes": math.prod(shape[3:])}
    description["affine"] = next((form for form in ("sform", "qform") if header[f"{form}_code"] > 0), "pixdim")
    steps = (header.get_base_affine() if description["affine"] == "pixdim" else header.get_best_affine())[:3, :3]
    mm = {"meter": 1000.0, "micron": 0.001}.get(header.get_xyzt_units()[0], 1.0)
    if not np.isfinite(steps).all() or abs(np.linalg.det(steps)) < 1e-12:
        description["affine"], steps = "none", np.diag([-1.0, 1.0, 1.0])  # nibabel assumes the same axes
    voxels, spacing = to_canonical_orientation(voxels, steps * mm, description)
    spacing = (None, None, None) if description["affine"] == "none" else spacing
    slope, intercept = header.get_slope_inter()
    scale = (1.0, 0.0) if slope is None else (float(slope), float(intercept))  # both None if values are not scaled
    if (request.spacing or spacing)[0] is None and voxels.shape[1] > 1:  # without a spacing, only HU are a volume
        measured = voxels if scale == (1.0, 0.0) else voxels * np.float32(scale[0]) + np.float32(scale[1])
        if request.intensity != "hounsfield" if request.intensity else not looks_like_hounsfield(measured):
            voxels = voxels[:, request.select_frames(voxels.shape[1], description)]
    return to_unit_range(voxels, spacing, request, description, scale=scale)


def _gunzip(data: bytes, limit: int) -> bytes:
    """Return the first `limit` bytes of a gzip file of one or more members (bgzip), and verify their checksums."""
    chunks, size = [], 0
    while size < limit and data[:2] == b"\x1f\x8b":
        stream = zlib.decompressobj(31)
        chunks.append(stream.decompress(data, limit - size))
        size += len(chunks[-1])
        if not stream.eof:
            stream.decompress(stream.unconsumed_tail, 1)  # reads on to the checksum, if the voxels end with the stream
        data = stream.unused_data
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
