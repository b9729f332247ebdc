"""Read volumes: NIfTI, MGH and MINC with nibabel, NRRD and MetaImage with SimpleITK.

All of them are brought to the canonical orientation by the affine of their header. The header is checked before any
voxel is inflated. This file is copied into every checkpoint and imports only NumPy; libraries are imported when a file
needs them.
"""

from __future__ import annotations

import io
import math
import re
import struct
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .intensity_m3ret import blend_over_black, bytes_per_voxel, to_unit_range
from .scan_m3ret import NIFTI_1, NIFTI_2, AnyScan, Description, M3RetReadError, ReadRequest, to_canonical_orientation


LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
COLOUR_INTENTS = (0, 1007, 2003, 2004)  # NIfTI: none, vector (as ITK writes colour), RGB, RGBA
MILLIMETRES = {"m": 1000.0, "cm": 10.0, "mm": 1.0, "um": 1e-3, "µm": 1e-3, "nm": 1e-6}


def _make_scan(
    voxels: np.ndarray,
    steps: np.ndarray | None,
    request: ReadRequest,
    description: Description,
    scale: tuple[float, float] = (1.0, 0.0),
) -> AnyScan:
    """Orient and scale a volume. NaN marks voxels that were not measured.

    Args:
        voxels: `(C, a, b, c)`; or `(T, C, a, b, c)`, a single slice at T times, which becomes a clip.
        steps: `(3, 3)`; column n is the step of one voxel along axis n, in RAS millimetres. None if unknown: the axes
            are taken for those of an axial slice, as nibabel does.
    """
    frames = voxels.shape[0] if voxels.ndim == 5 else None
    voxels = voxels.reshape(-1, *voxels.shape[-3:])
    known = steps is not None and np.isfinite(steps).all() and abs(np.linalg.det(steps)) >= 1e-12
    if not known:
        description["affine"] = "none"
    voxels, spacing = to_canonical_orientation(voxels, steps if known else LPS_TO_RAS, description)  # type: ignore[arg-type]
    spacing = spacing if known else (None, None, None)
    if frames is not None:
        voxels = voxels.reshape(frames, -1, *voxels.shape[-2:]).swapaxes(0, 1)
        spacing = (None, *spacing[1:])
    declares_depth = (request.spacing or spacing)[0] is not None or request.intensity == "hounsfield"
    if frames is None and voxels.shape[1] > 1 and not declares_depth:
        voxels = voxels[:, request.select_frames(voxels.shape[1], description)]
    padding = np.isnan(voxels) if voxels.dtype.kind == "f" else None
    if padding is not None and padding.any():
        description["padding"] = "NaN"
        measured = voxels[~padding]
        voxels = np.where(padding, measured.min() if measured.size else voxels.dtype.type(0), voxels)
    else:
        padding = None
    return to_unit_range(voxels, spacing, request, description, scale=scale, padding=padding)


def _select_time(shape: tuple[int, ...], request: ReadRequest, description: Description) -> list[int]:
    """Return the indices along time to read: the frames of a single slice, or the first of several volumes."""
    times = int(math.prod(shape[3:]))
    if times > 1 and min(shape[:3]) == 1:
        return request.select_frames(times, description)
    description["volumes"] = times
    if times > 1:
        description["volume_index"] = 0
    return [0]


# ----------------------------------------------------------------------------------------------------- NIfTI, MGH, MINC


def read_nifti(data: bytes, request: ReadRequest) -> AnyScan:
    """Read NIfTI-1 or NIfTI-2, plain or gzipped. The voxels of a pair are read from the file beside the header.

    Of several volumes the first one is read; a single slice at several times is a clip.
    """
    nibabel = request.import_decoder("nibabel", "nibabel")
    head = gunzip(data, 540)
    is_nifti_2 = head[4:8] in NIFTI_2
    magic = head[4:8] if is_nifti_2 else head[344:348]
    if len(head) < (540 if is_nifti_2 else 348):
        raise request.error("damaged", "a complete NIfTI header", f"{len(head)} bytes")
    is_pair = magic in (NIFTI_1[1], NIFTI_2[1])
    header_class, size = (nibabel.Nifti2Header, 540) if is_nifti_2 else (nibabel.Nifti1Header, 348)
    header_error = nibabel.spatialimages.HeaderDataError
    header, dtype = header_class(head[:size], check=False), None
    with suppress(KeyError, header_error):
        dtype = header.get_data_dtype()
    if dtype is None or (dtype.kind not in "iuf" and not dtype.names):
        raise request.error("unsupported", "integer, floating-point or RGB voxels", f"NIfTI voxels of type {dtype}")
    channels = len(dtype.names or (1,))
    try:
        header.check_fix()
        shape, offset = header.get_data_shape(), int(header["vox_offset"])
    except (header_error, ValueError, OverflowError) as error:
        raise request.error("damaged", "a valid NIfTI header", type(error).__name__) from error
    if offset < (0 if is_pair else size + 4):
        raise request.error("damaged", "voxels after the NIfTI header", f"voxels at byte {offset}")
    if is_pair:
        data = _read_nifti_pair(request)
    x, y, z = (*shape, 1, 1)[:3]
    description: Description = {"format": "nifti"}
    planes = shape[4] if len(shape) > 4 else 1  # values of a vector, each stored as a whole volume
    intent = int(header["intent_code"])
    if planes > 1:
        if (
            planes not in (3, 4)
            or dtype != np.uint8
            or intent not in COLOUR_INTENTS
            or math.prod(shape) != x * y * z * planes
        ):
            expected = "a volume, or colour of 8 bits as the fifth dimension"
            raise request.error("unsupported", expected, f"a NIfTI file of vectors, of shape {shape}")
        times = [0]
    else:
        times = _select_time((x, y, z, *shape[3:]), request, description)
    request.check_size((x, y, z, channels * planes, len(times)), 1 if dtype.names else bytes_per_voxel(dtype))
    count = x * y * z * (planes if planes > 1 else times[-1] + 1)
    end = offset + count * dtype.itemsize
    request.check_size((end,), 1)
    request.check_ratio(end, len(data))
    raw = gunzip(data, end)
    # a plain file must hold all of its volumes, a compressed one only those that are inflated
    is_compressed = data[:2] == b"\x1f\x8b"
    required = end if is_compressed else offset + math.prod(shape) * dtype.itemsize
    available = len(raw if is_compressed else data)
    if available < required:
        raise request.error("damaged", f"{required:,} bytes, as the NIfTI header declares", f"{available:,}")
    flat = np.frombuffer(raw, dtype, count, offset)
    if channels > 1 or planes > 1:
        flat = flat.view(np.uint8)
        voxels = flat.reshape(planes, -1).T if planes > 1 else flat
        voxels = voxels.reshape(-1, z, y, x, channels * planes)  # x varies fastest in the file
        voxels = blend_over_black(voxels) if voxels.shape[-1] == 4 else voxels
    else:
        voxels = flat.reshape(-1, z, y, x, 1)
    voxels = voxels.transpose(0, 4, 3, 2, 1)
    voxels = voxels[times] if len(times) > 1 else voxels[times[0]]

    description["affine"] = next((form for form in ("sform", "qform") if header[f"{form}_code"] > 0), "pixdim")
    steps = (header.get_base_affine() if description["affine"] == "pixdim" else header.get_best_affine())[:3, :3]
    unit = header.get_xyzt_units()[0]
    steps = steps * {"meter": 1000.0, "micron": 0.001}.get(unit, 1.0)
    slope, intercept = (float(header[key]) for key in ("scl_slope", "scl_inter"))
    scale = (1.0, 0.0)
    if voxels.shape[-4] == 1 and slope != 0 and math.isfinite(slope):  # the standard does not scale colour
        if not math.isfinite(intercept):
            raise request.error("damaged", "a finite intercept", "NaN or infinity")
        scale = (slope, intercept)
    return _make_scan(voxels, steps, request, description, scale)


def _read_nifti_pair(request: ReadRequest) -> bytes:
    """Return the content of the `.img` file beside the `.hdr` file that is read."""
    for suffix in (".img", ".img.gz"):
        if (voxels := request.open_sibling(suffix)) is not None:
            return voxels
    advice = "Pass the path of the header with its .img file beside it, or save both in one .nii file."
    raise request.error("unsupported", "a .hdr file with its .img file beside it", "the header of a pair alone", advice)


def read_mgh(data: bytes, request: ReadRequest) -> AnyScan:
    """Read an MGH volume of FreeSurfer."""
    image = request.import_decoder("nibabel.freesurfer.mghformat", "nibabel")
    header = image.MGHHeader.from_fileobj(io.BytesIO(data))
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    description: Description = {"format": "mgh"}
    x, y, z = shape[:3]
    times = _select_time((*shape, 1), request, description)
    request.check_size((x, y, z, len(times)), bytes_per_voxel(dtype))
    count, offset = x * y * z * (times[-1] + 1), header.get_data_offset()
    if len(data) < offset + count * dtype.itemsize:
        expected = f"{offset + count * dtype.itemsize:,} bytes, as the MGH header declares"
        raise request.error("damaged", expected, f"{len(data):,}")
    voxels = np.frombuffer(data, dtype, count, offset).reshape(-1, 1, z, y, x).transpose(0, 1, 4, 3, 2)
    description["affine"] = "header" if header["goodRASFlag"] > 0 else "default"  # of FreeSurfer: 1 mm, coronal
    voxels = voxels[times] if len(times) > 1 else voxels[times[0]]
    return _make_scan(voxels, header.get_affine()[:3, :3], request, description)


def read_minc(data: bytes, request: ReadRequest) -> AnyScan:
    """Read a MINC volume: version 1 in NetCDF, version 2 in HDF5."""
    is_hdf5 = data.startswith(b"\x89HDF")
    try:
        if is_hdf5:
            file = request.import_decoder("h5py", "h5py").File(io.BytesIO(data), "r")
            image = file["minc-2.0/image/0/image"]
            _check_hdf5(file, request)
            minc = request.import_decoder("nibabel.minc2", "nibabel").Minc2File(file)
        else:
            file = request.import_decoder("nibabel.externals.netcdf", "nibabel").netcdf_file(io.BytesIO(data), "r")
            image = file.variables["image"]
            minc = request.import_decoder("nibabel.minc1", "nibabel").Minc1File(file)
    except KeyError as error:
        raise request.error("unsupported", "a MINC volume", f"{'HDF5' if is_hdf5 else 'NetCDF'} without one") from error
    except M3RetReadError:
        raise
    except (OSError, ValueError, TypeError, IndexError, struct.error) as error:
        raise request.error("damaged", "a complete MINC volume", type(error).__name__) from error
    shape = tuple(image.shape)
    if len(shape) != 3 or minc.get_data_dtype().kind not in "iuf":
        raise request.error("unsupported", "a MINC volume of three dimensions", f"voxels of shape {shape}")
    request.check_size(shape, 8)  # scaled in float64
    request.check_ratio(math.prod(shape) * minc.get_data_dtype().itemsize, len(data))
    try:
        voxels = np.asarray(minc.get_scaled_data())[None]
    except (OSError, ValueError) as error:
        raise request.error("damaged", "a complete MINC volume", type(error).__name__) from error
    return _make_scan(voxels, minc.get_affine()[:3, :3], request, {"format": "minc", "affine": "header"})


def _check_hdf5(file: Any, request: ReadRequest) -> None:
    """Refuse an HDF5 file that takes its content from other files."""
    h5py = request.import_decoder("h5py", "h5py")
    for path in ("minc-2.0", "minc-2.0/dimensions", "minc-2.0/image", "minc-2.0/image/0"):
        group = file[path]
        links = [file.get(path, getlink=True), *(group.get(name, getlink=True) for name in group)]
        outside = any(isinstance(link, h5py.ExternalLink) for link in links)
        datasets = [group[name] for name in group if not outside and group.get(name, getclass=True) is h5py.Dataset]
        if outside or any(dataset.external or dataset.is_virtual for dataset in datasets):
            raise request.error("unsupported", "all voxels in one file", "an HDF5 file that refers to other files")


# ------------------------------------------------------------------------------------------------- NRRD and MetaImage

# fields that name the file with the voxels, and the word for voxels that follow the header
DATA_FIELDS = {"nrrd": (rb"data ?file\s*:", b""), "metaimage": (rb"ElementDataFile\s*[=:]", b"LOCAL")}
# of a MetaImage header; SimpleITK corrupts memory for some other lines. It writes keys such as 0008|0060 for DICOM
META_LINE = re.compile(rb"\s*|[^\0-\x08\x0a-\x1f\x7f-\xff=:]{1,200}[=:][^\0-\x08\x0e-\x1f]{0,4000}")


def read_itk(file: bytes | Path, request: ReadRequest) -> AnyScan:
    """Read NRRD or MetaImage with SimpleITK. A detached header may only refer to one file in its own folder."""
    sitk = request.import_decoder("SimpleITK", "'m3ret[itk]'")
    data = request.read_bytes(file) if isinstance(file, Path) else file
    kind = "nrrd" if data.startswith(b"NRRD") else "metaimage"
    header, voxel_file = _split_header(data, kind, request)
    with tempfile.TemporaryDirectory(prefix="m3ret") as folder:
        # copied under our own name, because SimpleITK recognises formats by the suffix
        path = Path(
            folder, ("scan.nrrd" if kind == "nrrd" else "scan.mha") if voxel_file is None else HEADER_NAMES[kind]
        )
        path.write_bytes(data)
        size = len(data)
        if voxel_file is not None:
            content = request.open_sibling(voxel_file)
            if content is None:
                advice = "Pass the path of the header, with the file of the voxels in the same folder."
                raise request.error("not_found", "the file that the header refers to", "no such file", advice)
            Path(folder, voxel_file).write_bytes(content)
            size = len(content)
        reader = sitk.ImageFileReader()
        reader.SetImageIO("NrrdImageIO" if kind == "nrrd" else "MetaImageIO")
        reader.SetFileName(str(path))
        try:
            reader.ReadImageInformation()
            shape, channels = reader.GetSize(), reader.GetNumberOfComponents()
            dtype = sitk.GetArrayFromImage(sitk.Image([1, 1], reader.GetPixelID(), channels)).dtype
        except RuntimeError as error:
            expected = f"a {kind} header that SimpleITK supports"
            raise request.error("unsupported", expected, "a header that it rejects") from error
        description: Description = {"format": kind}
        # each voxel holds a list of values, one per volume
        is_list = len(shape) < 4 and re.search(rb"(?im)^kinds\s*:.*\blist\b", header) is not None
        is_colour = dtype == np.uint8 and channels in (3, 4) and not is_list
        if dtype.kind not in "iuf" or not (channels == 1 or is_colour or is_list) or len(shape) > 4:
            got = f"{len(shape)} dimensions of {channels} values of type {dtype}"
            raise request.error("unsupported", "grey or 8-bit RGB voxels in up to four dimensions", got)
        request.check_size((*shape, channels), bytes_per_voxel(dtype))
        decoded = math.prod(shape) * channels * dtype.itemsize
        request.check_ratio(decoded, size)
        if re.search(rb"(?m)^[ \t]*CompressedData\s*[=:]\s*[TtYy1]", header):
            stream = data[len(header) + 1 :] if voxel_file is None else content or b""
            declared = re.search(rb"(?m)^[ \t]*CompressedDataSize\s*[=:]\s*(\d+)", header)
            if declared or voxel_file is None:  # SimpleITK would return other bytes as voxels
                stream = stream[: int(declared.group(1)) if declared else 0]
            _check_deflated(stream, decoded, request)
        try:
            array = sitk.GetArrayFromImage(reader.Execute())
        except RuntimeError as error:
            raise request.error("damaged", f"complete {kind} voxels", "data that SimpleITK rejects") from error
    array = array if channels > 1 else array[..., None]
    array = array[None] if len(shape) == 2 else array
    if is_list:
        array, shape = np.moveaxis(array, -1, 0)[..., None], (*array.shape[2::-1], channels)
    array = array if len(shape) == 4 else array[None]  # (T, z, y, x, C)
    array = blend_over_black(array) if channels == 4 else array
    times = _select_time((*array.shape[3:0:-1], len(array)), request, description)
    voxels = array.transpose(0, 4, 3, 2, 1)
    voxels = voxels[times] if len(times) > 1 else voxels[times[0]]
    return _make_scan(voxels, _itk_steps(reader, header, description), request, description)


HEADER_NAMES = {"nrrd": "scan.nhdr", "metaimage": "scan.mhd"}


def _split_header(data: bytes, kind: str, request: ReadRequest) -> tuple[bytes, str | None]:
    """Return the text of the header, and the name of the file with the voxels; None if they follow the header."""
    field, local = DATA_FIELDS[kind]
    if kind == "nrrd":
        header, blank, _ = data.replace(b"\r\n", b"\n").partition(b"\n\n")
        detached = re.search(rb"(?im)^data ?file\s*:", header)  # needs no blank line
        if not blank and not detached:
            raise request.error("damaged", "a complete NRRD header", "a truncated one")
        if re.search(rb"(?im)^encoding\s*:\s*bz", header):
            raise request.error("unsupported", "NRRD compressed by gzip", "NRRD compressed by bzip2")
    else:
        end = re.search(rb"(?m)^[ \t]*" + field + rb"[^\n]*", data)
        if end is None:
            raise request.error("damaged", "a MetaImage header with ElementDataFile", "a header without it")
        header = data[: end.end()]
        if not all(META_LINE.fullmatch(line) for line in header.splitlines()):
            raise request.error("damaged", "a MetaImage header of lines of text, `Key = value`", "other bytes")
        dimensions = re.findall(rb"(?m)^[ \t]*NDims\s*[=:]\s*(\S+)", header)
        if not all(number.isdigit() and 1 <= int(number) <= 4 for number in dimensions):  # more overflow its buffers
            raise request.error("unsupported", "a MetaImage of at most four dimensions", "another number of them")
    values = re.findall(rb"(?im)^[ \t]*" + field + rb"([^\r\n]*)", header)
    if not values or (len(values) == 1 and values[0].strip().upper() == local):
        return header, None
    name = values[0].strip().decode("utf-8", "replace").removeprefix("./")
    plain = len(values) == 1 and Path(name).name == name and not re.search(r"[%\\:\0]|^LIST", name)
    if not plain or name in HEADER_NAMES.values():
        advice = "Save the volume in one file."
        raise request.error("unsupported", "one file in the folder of the header", "a reference to other files", advice)
    return header, name


def _check_deflated(data: bytes, size: int, request: ReadRequest) -> None:
    """Refuse a zlib stream that does not inflate to exactly `size` bytes. SimpleITK does not check this."""
    stream, inflated = zlib.decompressobj(), 0
    try:
        for start in range(0, len(data), 4096):
            inflated += len(stream.decompress(data[start : start + 4096]))
            if stream.eof or inflated > size:
                break
    except zlib.error:
        inflated = 0
    if not stream.eof or inflated != size:
        raise request.error(
            "damaged", f"a zlib stream of {size:,} bytes of voxels", "a stream of another size or a damaged one"
        )


def _itk_steps(reader: Any, header: bytes, description: Description) -> np.ndarray | None:
    """Return the steps of a SimpleITK image in RAS millimetres, or None if its header declares no spacing."""
    spacing = re.search(rb"(?im)^[ \t]*(?:space directions|spacings|elementspacing|elementsize)\s*[:=](.*)$", header)
    if spacing is None or b"nan" in spacing.group(1).lower():
        return None
    description["affine"] = "header"
    dimension = reader.GetDimension()
    steps = np.diag([1.0, 1.0, 1.0])
    spatial = min(dimension, 3)
    direction = np.reshape(reader.GetDirection(), (dimension, dimension))[:spatial, :spatial]
    steps[:spatial, :spatial] = direction * reader.GetSpacing()[:spatial]
    unit = re.search(rb'(?im)^space units:[ \t]*"([^"\r\n]*)"', header)
    return LPS_TO_RAS @ steps * MILLIMETRES.get(unit.group(1).decode("utf-8", "replace") if unit else "mm", 1.0)


VOLUME_READERS: dict[str, Any] = {
    "nifti": read_nifti,
    "mgh": read_mgh,
    "minc": read_minc,
    "nrrd": read_itk,
    "metaimage": read_itk,
}


def gunzip(data: bytes, limit: int) -> bytes:
    """Return the first `limit` bytes of a gzip file of one or more members (bgzip), and verify their checksums.

    Other data are returned unchanged, up to `limit`.

    Raises:
        EOFError: if the file ends within a member.
        zlib.error: if it is damaged.
    """
    if data[:2] != b"\x1f\x8b":
        return data[:limit]
    chunks, size = [], 0
    while size < limit and data[:2] == b"\x1f\x8b":
        stream = zlib.decompressobj(31)
        chunks.append(stream.decompress(data, limit - size))
        size += len(chunks[-1])
        if not stream.eof:
            stream.decompress(stream.unconsumed_tail, 1)  # reads on to the checksum, if the voxels end with the stream
        if not stream.eof and not stream.unconsumed_tail:
            raise EOFError("gzip file ends within a member")
        data = stream.unused_data
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
