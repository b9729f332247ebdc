"""Scale the intensities of a scan to [0, 1], or to the 8 or 16 bits in which a dataset stores them.

What a dataset row, a caller or a header declares comes first; otherwise 8-bit images are divided by 255, and everything
else is scaled by percentiles of the scan. Values are Hounsfield units only if that is declared: an organ of a CT has no
air, and phases and field maps of MRI have values as low as air, so values alone cannot tell them apart. This file
is copied into every checkpoint and imports only NumPy.
"""

from __future__ import annotations

import numpy as np

from .scan_m3ret import AnyScan, Description, ReadRequest, Scan, Spacing, StoredScan


HU_RANGE = (-1000.0, 1000.0)  # air to dense bone, as in SPECTRE and most CT foundation models
PERCENTILES = (0.5, 99.5)  # per scan, if no unit is declared (nnU-Net's clipping range)
ONE_GREY_LEVEL = 1 / 256  # what varies by less shows nothing
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)  # 1 divided by a smaller range is infinite
PERCENTILE_SAMPLE = 1_000_000  # approximate number of voxels for percentiles; more change them by less than 0.1 %
# Mapping of stored values to [0, 1]: divided by 255; HU clipped to `HU_RANGE`; clipped to `PERCENTILES` of the scan;
# divided by the largest value of their type.
INTENSITIES = ("8-bit", "hounsfield", "percentiles", "full range")
DESCRIBED_RULES = {
    "hounsfield": "hounsfield [-1000, 1000]",
    "percentiles": f"percentiles {PERCENTILES[0]}-{PERCENTILES[1]}",
    "unit range": "already in [0, 1]",
}


def to_unit_range(
    values: np.ndarray,
    spacing: Spacing,
    request: ReadRequest,
    description: Description,
    *,
    scale: tuple[float, float] = (1.0, 0.0),
    rule: str | None = None,
    padding: np.ndarray | None = None,
    inverted: bool = False,
) -> AnyScan:
    """Scale intensities to [0, 1], or to the stored form if the request asks for it.

    What the request declares takes precedence over `rule` and `spacing`, and `rule` over the type of the values.

    Args:
        values: `(C, D, H, W)` of any real type. May be overwritten if `rule` is given.
        spacing: spacing of the file.
        request: the read request.
        description: description of the scan, to which the kind of scaling is added.
        scale: slope and intercept that turn `values` into measured values.
        rule: how to scale, if the file declares it: "8-bit", "hounsfield", "percentiles", or "window" and "bit depth",
            which are already applied. None divides uint8 by 255, leaves fractions within [0, 1] unchanged unless they
            vary by less than a grey level, and clips everything else to `PERCENTILES`.
        padding: `(C, D, H, W)` bool mask of voxels that were never measured. They are ignored, and become 0.
        inverted: whether low values are bright.

    Raises:
        M3RetReadError: if voxels are not finite, or the declared intensity does not fit the type of the voxels.
    """
    spacing = request.spacing or spacing
    if values.dtype == bool:
        values = values.astype(np.uint8) * np.uint8(255)
    declared = _declared_rule(values, scale != (1.0, 0.0), request)
    may_overwrite = rule is not None and declared is None
    rule = declared or rule
    if values.dtype == np.uint8 and scale == (1.0, 0.0) and rule in (None, "8-bit"):
        array = np.ascontiguousarray(values[:1]) if _is_grey(values) else values
        array = 255 - array if inverted else array
        array = array if padding is None else np.where(padding, np.uint8(0), array)
        description["intensity"] = "8-bit"
        if request.return_stored:
            return StoredScan(np.ascontiguousarray(array), "8-bit", spacing, description)
        return _make_scan(array, spacing, description, constant=array.min() == array.max())

    low, high = sorted(float(edge) * scale[0] + scale[1] for edge in (values.min(), values.max()))
    largest = max(abs(low), abs(high))
    if not largest <= FLOAT32_MAX:  # also NaN
        expected, got = "finite voxels within the range of float32", "NaN, infinite or larger voxels"
        raise request.error("unsupported", expected, got, "Replace them before reading.")
    if rule is None:
        fractions = values.dtype.kind == "f" or scale != (1.0, 0.0)
        shows = low >= 0 and high <= 1 and high - low >= ONE_GREY_LEVEL  # unlike a map of mm2/s, below 0.003
        rule = "unit range" if fractions and shows else "percentiles"
    # percentiles do not depend on an offset, which float32 could not represent beside large values
    is_wide = values.dtype.itemsize > 2 or scale != (1.0, 0.0)
    offset = low if rule == "percentiles" and is_wide and largest > 2**10 * (high - low) else 0.0
    array = _as_float32(values, scale, offset, may_overwrite)
    if request.intensity == "full range":
        array *= np.float32(1 / np.iinfo(values.dtype).max)
    measured = _sample_voxels(array, padding)
    width = high - low if padding is None or measured.size == 0 else float(np.ptp(array[~padding]))
    constant = measured.size == 0 or width < FLOAT32_TINY
    description["intensity"] = DESCRIBED_RULES.get(rule, rule)
    if request.return_stored and not inverted:
        stored = _keep_16_bit(np.zeros_like(array) if constant else array, rule, None if constant else padding)
        if stored is not None:
            return StoredScan(stored, rule, spacing, description)
    if rule in ("hounsfield", "percentiles") and not constant:
        are_integers = values.dtype.kind in "iu" and not is_wide
        low, high = HU_RANGE if rule == "hounsfield" else _percentile_range(measured, array, padding, are_integers)
        array -= np.float32(low)
        array *= np.float32(1 / (high - low))
        np.clip(array, 0, 1, out=array)
    if inverted:
        np.subtract(1, array, out=array)
    if padding is not None:
        array[padding] = 0
    if not request.return_stored:
        return _make_scan(array, spacing, description, constant)
    array = np.zeros_like(array) if constant else array
    if array.shape[0] == 3:  # no widely supported image format has colour of 16 bits
        return StoredScan(np.rint(array * 255).astype(np.uint8), "8-bit", spacing, description)
    return StoredScan(np.rint(array * 65535).astype(np.uint16), "full range", spacing, description)


def _is_grey(values: np.ndarray) -> bool:
    """Return whether all three channels of `(C, D, H, W)` are equal. It stops at the first rows that are not."""
    if values.shape[0] != 3:
        return False
    for channels in values.transpose(1, 0, 2, 3):  # of a slice
        for start in range(0, channels.shape[1], 32):
            red, green, blue = channels[:, start : start + 32]
            if not (np.array_equal(red, green) and np.array_equal(red, blue)):
                return False
    return True


def _as_float32(values: np.ndarray, scale: tuple[float, float], offset: float, overwrite: bool) -> np.ndarray:
    """Return `values * slope + intercept - offset` as float32 in C order, computed in float64 slice by slice."""
    slope, shift = scale[0], scale[1] - offset
    if (slope, shift) == (1.0, 0.0):
        return np.array(
            values, dtype=np.float32, order="C", copy=None if overwrite and values.flags.writeable else True
        )
    array = np.empty(values.shape, np.float32)
    for index in range(values.shape[1]):
        array[:, index] = values[:, index].astype(np.float64) * slope + shift
    return array


def _declared_rule(values: np.ndarray, scaled: bool, request: ReadRequest) -> str | None:
    """Return the rule of a declared intensity, after checking that it fits the voxels."""
    if request.intensity is None:
        return None
    is_bytes, is_grey = values.dtype == np.uint8, values.shape[0] == 1
    fits, expected = {
        "8-bit": (is_bytes and not scaled, "uint8 voxels"),
        "full range": (values.dtype.kind == "u" and not is_bytes, "unsigned integers of more than 8 bits"),
        # 8 bits cannot hold Hounsfield units
        "hounsfield": (is_grey and (scaled or not is_bytes), "grey voxels of more than 8 bits"),
        "percentiles": (True, ""),
    }[request.intensity]
    if not fits:
        advice = f'The intensity "{request.intensity}" is declared by the dataset row or by the caller; correct it.'
        got = f"{'grey' if is_grey else 'colour'} voxels of type {values.dtype}"
        raise request.error("unsupported", expected, got, advice)
    return "bit depth" if request.intensity == "full range" else request.intensity


def _percentile_range(
    sample: np.ndarray, array: np.ndarray, padding: np.ndarray | None, are_integers: bool
) -> tuple[float, float]:
    """Return the percentiles of a sample, or the full range of the measured voxels if both percentiles are equal.

    Percentiles that differ by less than the smallest normal float32 count as equal.
    """
    percentiles = _percentiles_of_integers(sample) if are_integers else np.percentile(sample, PERCENTILES)
    low, high = (float(edge) for edge in percentiles)
    if high - low >= FLOAT32_TINY:
        return low, high
    measured = array if padding is None else array[~padding]
    return float(measured.min()), float(measured.max())


def _percentiles_of_integers(sample: np.ndarray) -> np.ndarray:
    """Return `PERCENTILES` of integers of at most 16 bits as `np.percentile` does. Counting is six times as fast."""
    first = sample.min()
    above = sample > first
    # air or masked background is most of many volumes, and counting one value again and again is slow
    counted = sample[above] if 2 * np.count_nonzero(above) < sample.size else sample
    counts = np.bincount((counted - first).astype(np.int64), minlength=1)
    counts[0] += sample.size - counted.size
    ends = counts.cumsum()
    ranks = np.array(PERCENTILES) / 100 * (sample.size - 1)
    below, above = (np.searchsorted(ends, rank, side="right") for rank in (np.floor(ranks), np.ceil(ranks)))
    return first + below + (above - below) * (ranks % 1)


def _keep_16_bit(array: np.ndarray, rule: str, padding: np.ndarray | None) -> np.ndarray | None:
    """Return grey values in 16 bits, or None if that would lose more than the fraction of a Hounsfield unit.

    HU are rounded to integers. Values that are scaled by percentiles must be integers already.
    """
    if array.shape[0] == 3:
        return None
    if rule == "hounsfield":
        if padding is not None:
            array[padding] = HU_RANGE[0]
        return np.rint(array).clip(-32768, 32767).astype(np.int16)
    if rule != "percentiles" or padding is not None or not np.array_equal(array, np.rint(array)):
        return None
    low, high = float(array.min()), float(array.max())
    # planes are stored as PNG, which is unsigned, and volumes as NIfTI, where int16 is the most common type
    for dtype in (np.uint16, np.int16) if array.shape[1] == 1 else (np.int16, np.uint16):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype)
    return None


def _make_scan(array: np.ndarray, spacing: Spacing, description: Description, constant: bool) -> Scan:
    if constant:  # it shows nothing, at any level
        description["constant"], array = True, np.zeros_like(array)
    if array.shape[0] == 3 and array.dtype == np.uint8:
        return Scan(np.ascontiguousarray(array.transpose(1, 2, 3, 0)).transpose(3, 0, 1, 2), spacing, description)
    return Scan(np.ascontiguousarray(array), spacing, description)


def _sample_voxels(array: np.ndarray, padding: np.ndarray | None = None) -> np.ndarray:
    """Return about `PERCENTILE_SAMPLE` evenly spaced voxels without padding, or all of a smaller array."""
    step = array.size // PERCENTILE_SAMPLE | 1  # an odd step avoids sampling a single column
    sample = array.reshape(-1)[::step]
    return sample if padding is None else sample[~padding.reshape(-1)[::step]]


def bytes_per_voxel(dtype: np.dtype) -> int:
    """Return the bytes per voxel while reading: 8-bit images keep their type, everything else becomes float32."""
    return 1 if dtype in (np.uint8, bool) else max(4, dtype.itemsize)


def blend_over_black(array: np.ndarray) -> np.ndarray:
    """Return `(..., 3)` for `(..., 4)`, with transparent pixels in black, as they may hide arbitrary colours."""
    if array.dtype != np.uint8 or array[..., 3].min() == 255:  # the scale of an alpha that is not 8-bit is unknown
        return array[..., :3]
    return ((array[..., :3].astype(np.uint16) * array[..., 3:] + 127) // 255).astype(np.uint8)
