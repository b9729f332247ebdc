"""Render a phantom subject as arrays in each modality: CT, MRI, X-ray, ultrasound and endoscopy.

Each rendering draws its own pose, field of view, contrast, noise and borders, so that comparing pixels fails while the
structure of the tissue remains. The physics is of first order: Beer-Lambert line integrals; echoes at impedance steps
with speckle, attenuation and shadow; Rician magnitude images; a light source at the camera. The output for a given seed
is part of the phantom's version (`dataset.VERSION`): no change here may alter it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .anatomy import Anatomy, Array, Tissue, Vector, format_index, random_stream, smooth_noise


# Per tissue: HU, T1-weighted signal, T2-weighted signal, echogenicity, impedance, ultrasound attenuation per voxel.
# Textbook orders of magnitude, except that the contrast of grey and white matter in CT is raised above the noise.
PROPERTIES = {
    Tissue.AIR: (-1000, 0.00, 0.00, 0.60, 0.0, 0.060),
    Tissue.FAT: (-100, 0.90, 0.65, 0.45, 1.35, 0.010),
    Tissue.MUSCLE: (55, 0.42, 0.30, 0.22, 1.65, 0.010),
    Tissue.FASCIA: (130, 0.18, 0.12, 0.90, 1.90, 0.014),
    Tissue.CORTICAL_BONE: (1100, 0.04, 0.04, 1.00, 5.0, 0.200),
    Tissue.TRABECULAR_BONE: (550, 0.30, 0.22, 0.80, 3.2, 0.040),
    Tissue.MARROW: (40, 0.80, 0.60, 0.30, 1.8, 0.025),
    Tissue.LUNG: (-820, 0.08, 0.08, 0.60, 0.6, 0.060),
    Tissue.BLOOD: (180, 0.25, 0.16, 0.03, 1.66, 0.004),
    Tissue.FLUID: (0, 0.14, 1.00, 0.01, 1.50, 0.002),
    Tissue.PARENCHYMA: (95, 0.58, 0.36, 0.50, 1.62, 0.009),
    Tissue.GREY_MATTER: (75, 0.46, 0.62, 0.25, 1.60, 0.010),
    Tissue.WHITE_MATTER: (20, 0.68, 0.40, 0.55, 1.64, 0.010),
    Tissue.CARTILAGE: (160, 0.36, 0.48, 0.08, 1.75, 0.010),
    Tissue.GLAND: (70, 0.34, 0.46, 0.75, 1.60, 0.012),
}
TABLE = np.array([PROPERTIES[tissue] for tissue in Tissue], np.float32)
HU, T1, T2, ECHO, IMPEDANCE, LOSS = TABLE.T

AXIAL = np.eye(3)  # column n: patient direction (z, y, x) of array axis n (slice, row, column)
SAGITTAL = np.array([[0, -1, 0], [0, 0, 1], [1, 0, 0]], float)  # slices to the left, rows downwards
CORONAL = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]], float)
PLANES = ((AXIAL, "axial"), (SAGITTAL, "sagittal"), (CORONAL, "coronal"))
Matrix = NDArray[np.float64]
Pose = tuple[Matrix, Matrix]  # rotation matrix, and (3,) shift of the centre as a fraction of the label volume
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rendering:
    """One scan as an array, before it is written to a file. The `render_` functions state its shape and type."""

    array: NDArray[Any]
    spacing_mm: Vector  # along D, H, W; 0 if there is none
    directions: Matrix  # (3, 3); column n is the patient direction (z, y, x) of array axis n
    to_anatomy: Matrix  # (4, 4); maps an index (d, h, w, 1) of a CT or MRI volume to voxels of the label volume
    note: str  # the random choice that was made, such as the view


def _rotation(z: float, y: float, x: float) -> Matrix:
    """Return the rotation matrix of (z, y, x) vectors from angles in degrees about the three axes."""
    result = np.eye(3)
    for angle, (first, second) in zip(np.deg2rad((z, y, x)), ((1, 2), (0, 2), (0, 1)), strict=True):
        step = np.eye(3)
        step[first, first] = step[second, second] = np.cos(angle)
        step[first, second], step[second, first] = -np.sin(angle), np.sin(angle)
        result = step @ result
    return result


def _pose(rng: np.random.Generator, tilt: float = 15, roll: float = 20, shift: float = 0.1) -> Pose:
    """Return a random pose: 15 degrees are a badly positioned patient, and a roll of 20 defeats comparing pixels."""
    return _rotation(rng.uniform(-roll, roll), *rng.uniform(-tilt, tilt, 2)), rng.uniform(-shift, shift, 3)


def _to_anatomy(anatomy: Anatomy, pose: Pose, shape: Shape, spacing_mm: Vector, directions: Matrix) -> Matrix:
    """Return the matrix that maps an index of the rendered array to an index of the label volume."""
    rotation, shift = pose
    size = np.array(anatomy.labels.shape)
    matrix = np.eye(4)
    matrix[:3, :3] = rotation @ directions @ np.diag(spacing_mm) / np.array(anatomy.voxel_mm)[:, None]
    middle = (size - 1) / 2 + shift * size
    matrix[:3, 3] = middle - matrix[:3, :3] @ ((np.array(shape) - 1) / 2)
    return matrix


def _sample(volume: Array, matrix: Matrix, shape: Shape, outside: float) -> Array:
    return ndimage.affine_transform(
        volume, matrix[:3, :3], matrix[:3, 3], output_shape=shape, output=np.float32, order=1, cval=outside
    )


def _draw_pixel_edge(anatomy: Anatomy, rng: np.random.Generator, pixels: int) -> float:
    """Return a pixel edge in mm for a field of view of 0.5 to 0.7 of the width of the volume."""
    return round(float(rng.uniform(0.5, 0.7)) * anatomy.voxel_mm[2] * anatomy.labels.shape[2] / pixels, 3)


def _draw_hu(rng: np.random.Generator) -> Array:
    """Return HU per tissue for one scan: beam energy scales bone, contrast agent raises blood and organs."""
    table = HU + rng.normal(0, 20, len(HU)).astype(np.float32)
    bone = [Tissue.CORTICAL_BONE, Tissue.TRABECULAR_BONE]
    table[bone] *= rng.uniform(0.7, 1.2)
    table[Tissue.BLOOD] += rng.uniform(-120, 180)
    table[[Tissue.PARENCHYMA, Tissue.GLAND, Tissue.MUSCLE]] += rng.uniform(-20, 50)
    table[Tissue.AIR] = -1000
    return table


def render_ct(anatomy: Anatomy, rng: np.random.Generator) -> Rendering:
    """Render a CT volume (64 or 28, 96, 96) int16 in HU with a table, a kernel, noise, and in some a round field."""
    # Every other subject is written as a DICOM series with one file per slice, so it has fewer and thicker slices.
    shape = (28 if format_index(anatomy.subject) % 2 else 64, 96, 96)
    edge = _draw_pixel_edge(anatomy, rng, shape[2])
    thickness = round(float(rng.uniform(1.5, 2.6)) * (64 / shape[0]) ** 0.5, 3)
    spacing = (thickness, edge, edge)
    matrix = _to_anatomy(anatomy, _pose(rng), shape, spacing, AXIAL)
    volume = _sample(_draw_hu(rng)[anatomy.labels], matrix, shape, -1000)
    rows, columns = np.ogrid[: shape[1], : shape[2]]
    if rng.random() < 0.7:
        table = rows - (rng.uniform(0.8, 0.97) * shape[1] - rng.uniform(0, 0.004) * (columns - shape[2] / 2) ** 2)
        volume[(np.abs(table) < 1.2) & (volume < -500)] = rng.uniform(-300, 200)
    volume = ndimage.gaussian_filter(volume, (0, *[float(rng.uniform(0, 0.6))] * 2))
    volume += rng.standard_normal(shape, dtype=np.float32) * rng.uniform(5, 20)
    if rng.random() < 0.4:
        round_field = (rows - shape[1] / 2) ** 2 + (columns - shape[2] / 2) ** 2 > (shape[2] / 2) ** 2
        volume[:, round_field] = -1024
    array = np.clip(np.rint(volume), -1024, 3071).astype(np.int16)
    return Rendering(array, spacing, AXIAL, matrix, "axial")


def render_mri(anatomy: Anatomy, rng: np.random.Generator) -> Rendering:
    """Render a magnitude MR volume (D, H, W) int16 with slices of 3-5 mm: T1 or T2, axial, sagittal or coronal."""
    pixels = 112
    directions, plane = PLANES[rng.choice(3, p=(0.7, 0.2, 0.1))]
    edge = _draw_pixel_edge(anatomy, rng, pixels)
    spacing = (round(float(rng.uniform(3, 5)), 3), edge, edge)
    shape = (int(rng.integers(20, 29)), pixels, pixels)
    matrix = _to_anatomy(anatomy, _pose(rng), shape, spacing, directions)
    weighting = "T1" if rng.random() < 0.5 else "T2"
    signal = (T1 if weighting == "T1" else T2) * np.exp(rng.normal(0, 0.08, len(T1))).astype(np.float32)
    # A slice averages over its thickness: it is the mean of two half-slices.
    fine = matrix.copy()
    fine[:3, 0] /= 2
    fine[:3, 3] -= fine[:3, 0] / 2
    volume = _sample(signal[anatomy.labels], fine, (2 * shape[0], *shape[1:]), 0)
    volume = np.float32(0.5) * (volume[::2] + volume[1::2])
    volume *= np.exp(0.25 * smooth_noise(rng, shape, (shape[0], pixels / 2, pixels / 2)))
    noise = rng.standard_normal((2, *shape), dtype=np.float32) * rng.uniform(0.005, 0.025)
    magnitude = np.hypot(volume + noise[0], noise[1]) ** rng.uniform(0.9, 1.15)
    if rng.random() < 0.3:  # a rectangular field of view, padded to a square as scanners do
        border = int(rng.integers(4, 14))
        magnitude[:, :, :border] = magnitude[:, :, -border:] = 0
    array = np.clip(magnitude * rng.uniform(300, 2500), 0, 32767).astype(np.int16)
    return Rendering(array, spacing, directions, matrix, f"{weighting} {plane}")


def render_xray(anatomy: Anatomy, rng: np.random.Generator) -> Rendering:
    """Render a radiograph (H, W) uint16 with 12 bits and bright bone, from line integrals of attenuation."""
    view, angle = (("AP", 0), ("lateral", 90), ("oblique", 45))[rng.integers(3)]
    grid, rows, columns = 144, int(rng.integers(208, 273)), int(rng.integers(208, 273))
    edge = _draw_pixel_edge(anatomy, rng, grid)
    shape, spacing = (64, grid, grid), (anatomy.voxel_mm[1] * 2, edge, edge)
    rotation, shift = _pose(rng, tilt=12, roll=25, shift=0.15)
    matrix = _to_anatomy(anatomy, (_rotation(angle, 0, 0) @ rotation, shift), shape, spacing, CORONAL)
    attenuation = np.maximum(_draw_hu(rng) + 1000, 0) * np.float32(1.7e-5)  # per mm; water: 0.017
    attenuation[Tissue.CORTICAL_BONE : Tissue.MARROW] *= rng.uniform(1.6, 2.2)  # photoelectric
    path = _sample(attenuation[anatomy.labels], matrix, shape, 0).sum(0) * spacing[0]
    photons = np.exp(-path)
    photons += rng.uniform(0.0, 0.03) * ndimage.gaussian_filter(photons, 12)  # scatter
    dose = 10 ** rng.uniform(5.5, 6.5)
    photons = np.maximum(photons + rng.standard_normal(photons.shape, dtype=np.float32) * np.sqrt(photons / dose), 1e-6)
    image = -np.log(photons)
    # Detector software removes most of the slow background; window and gamma vary as between operators.
    image -= rng.uniform(0.8, 1.0) * ndimage.gaussian_filter(image, rng.uniform(5, 7))
    image /= (ndimage.gaussian_filter(image**2, 12) + 1e-3) ** rng.uniform(0.15, 0.25)
    image = ndimage.zoom(image, (rows / grid, columns / grid), order=1)
    low, high = np.percentile(image, (rng.uniform(0.5, 4), rng.uniform(97, 99.7)))
    image = np.clip((image - low) / (high - low), 0, 1) ** rng.uniform(0.8, 1.25)
    image = np.clip(image + rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(0.003, 0.008), 0, 1)
    if rng.random() < 0.4:  # collimation of some sides
        for side in np.flatnonzero(rng.random(4) < 0.5):
            np.rot90(image, int(side))[: rng.integers(5, 30)] = 0
    if rng.random() < 0.6:  # a lead marker
        y, x = rng.integers(8, rows - 30), rng.choice((8, columns - 24))
        image[y : y + 18, x : x + 5] = image[y + 13 : y + 18, x : x + 14] = 1
    pixel = (edge * grid / rows, edge * grid / columns)
    return Rendering((image * 4095).astype(np.uint16), (0.0, *pixel), CORONAL, matrix, view)


def render_ultrasound(anatomy: Anatomy, rng: np.random.Generator) -> Rendering:
    """Render a sweep (D, H, W) uint8 of sector images with speckle, attenuation, and shadow behind bone and gas."""
    frames, samples, lines, columns = 10, 192, 160, int(rng.choice((192, 208, 224)))
    rotation, _ = _pose(rng, tilt=20, roll=70)
    size = np.array(anatomy.labels.shape)
    along, down, across = rotation.T
    target = (size - 1) / 2 + rng.uniform(-0.15, 0.15, 3) * size * (1, 0.7, 0.7)

    def labels_at(points: Matrix) -> NDArray[np.uint8]:
        index = np.rint(points).astype(int)
        inside = ((index >= 0) & (index < size)).all(-1)
        z, y, x = np.moveaxis(np.clip(index, 0, size - 1), -1, 0)
        return np.where(inside, anatomy.labels[z, y, x], Tissue.AIR)

    # The probe is where the line to the target enters the skin, 3 voxels deeper to close the gap as gel does.
    offsets = np.arange(-110, 20)
    skin = labels_at(target + offsets[:, None] * down) != Tissue.AIR
    probe = target + (offsets[int(np.argmax(skin))] + 3 if skin.any() else 0) * down
    depth, half_angle, radius = rng.uniform(46, 58), np.deg2rad(rng.uniform(34, 42)), rng.uniform(10, 24)
    r = radius + np.linspace(0, depth, samples)[:, None]
    angle = np.linspace(-half_angle, half_angle, lines)[None, :]
    plane = probe - radius * down + (r * np.cos(angle))[..., None] * down + (r * np.sin(angle))[..., None] * across
    step = rng.uniform(0.8, 2.0)
    sweep = (np.arange(frames) - (frames - 1) / 2) * step
    points = plane[None] + sweep[:, None, None, None] * along
    # A beam has a width: a jitter of 0.4 voxels softens the steps of the label grid.
    labels = labels_at(points + 0.4 * rng.standard_normal(points.shape, dtype=np.float32))

    impedance = IMPEDANCE[labels]
    jump = np.abs(np.diff(impedance, axis=1, prepend=impedance[:, :1])) / (impedance + 0.5)
    loss = np.cumsum(LOSS[labels] * (depth / samples) * rng.uniform(0.6, 1.0) + 0.08 * np.minimum(jump, 1.2), axis=1)
    transmitted = 0.12 + 0.88 * np.exp(-loss)
    # Compounding averages the speckle of several looks; pulse and beam blur it along and across.
    looks = int(rng.integers(2, 5))
    grain = (0, float(rng.uniform(0.6, 1.2)), float(rng.uniform(1.0, 2.0)))
    speckle = ndimage.gaussian_filter(rng.standard_exponential(labels.shape, dtype=np.float32), grain)
    speckle = 1 + (speckle - 1) * np.float32(0.35 / looks**0.5) / speckle.std()
    speckle = np.maximum(speckle, 0.05)
    echo = ECHO * np.exp(rng.normal(0, 0.15, len(ECHO))).astype(np.float32)
    edges = ndimage.gaussian_filter1d(np.minimum(jump, 1.5), 1.2, axis=1) * rng.uniform(2, 4)
    amplitude = (echo[labels] * speckle + edges * (0.5 + 0.5 * speckle)) * transmitted
    gain = np.linspace(1, np.exp(rng.uniform(0.0, 1.0)), samples)[None, :, None]
    decibels = 20 * np.log10(np.maximum(amplitude * gain, 1e-4))
    dynamic_range, top = rng.uniform(32, 40), rng.uniform(-2, 1)
    brightness = np.clip(1 + (decibels - top) / dynamic_range, 0, 1) ** rng.uniform(0.85, 1.2)

    # Scan conversion: look up the sample and the line of each pixel.
    reach, mm = radius + depth, anatomy.voxel_mm[0]
    width = 2 * reach * np.sin(half_angle) * rng.uniform(0.7, 0.8)  # many machines crop the sides
    rows = round((reach - radius * np.cos(half_angle)) / width * columns * rng.uniform(0.9, 1.05))
    y, x = np.meshgrid(*[(np.arange(n) + 0.5) / columns * width for n in (rows, columns)], indexing="ij")
    y, x = y + radius * np.cos(half_angle) - 0.02 * width, x - width / 2 + rng.uniform(-0.04, 0.04) * width
    row = np.rint((np.hypot(y, x) - radius) / depth * (samples - 1)).astype(int)
    line = np.rint((np.arctan2(x, y) / half_angle + 1) / 2 * (lines - 1)).astype(int)
    seen = (row >= 0) & (row < samples) & (line >= 0) & (line < lines)
    images = np.where(seen, brightness[:, np.clip(row, 0, samples - 1), np.clip(line, 0, lines - 1)], 0)
    images[:, 2:6, 2 : int(rng.integers(10, 60)) : 2] = rng.uniform(0.4, 1)  # imitates a caption
    array = (images * 255).astype(np.uint8)
    spacing = (step * mm, width / columns * mm, width / columns * mm)
    return Rendering(array, spacing, CORONAL, np.eye(4), f"sector {np.rad2deg(half_angle) * 2:.0f} degrees")


def _draw_lumen_wall(anatomy: Anatomy) -> tuple[Array, Array]:
    """Return relief and blood of the wall of a subject's lumen, each (512, 512) float32 over (depth, angle), periodic.

    By class: turbinates, tracheal rings, bronchial openings, haustra, bladder vessels, cartilage fronds, tendon fibres,
    papillae.
    """
    rng = random_stream(anatomy.seed, anatomy.subject, len(RENDERERS) + 1)
    size = (512, 512)
    noise = partial(smooth_noise, rng, size, periodic=True)
    depth, angle = np.ogrid[0 : 2 * np.pi : 512j, 0 : 2 * np.pi : 512j]
    relief, blood = 0.3 * noise(32), np.zeros(size, np.float32)
    if anatomy.name == "head":
        relief = 2.0 * noise((128, 32))
        blood = 1.5 * np.clip(noise(32) - 0.6, 0, 0.8)
    elif anatomy.name == "neck":
        rings = np.sin(rng.integers(24, 29) * depth + 0.5 * noise(64))
        relief = np.where(np.cos(angle + rng.uniform(0, 6)) > -0.8, 1.8 * rings, 0.8 * noise((64, 8)))
    elif anatomy.name == "chest":
        openings = noise(32)
        relief = -1.5 * np.clip(openings - 0.4, 0, 1.2) + 0.2 * noise(32)
        blood = 2.2 * np.clip((openings - 0.9) * 3, 0, 1)
    elif anatomy.name == "abdomen":
        folds = np.sin(rng.integers(6, 9) * depth + 0.8 * np.sin(3 * angle + rng.uniform(0, 6)) + 0.6 * noise(64))
        relief = 4.0 * np.exp(-6 * (1 - folds))
        blood = 0.8 * (np.abs(noise(64)) < 0.05)
    elif anatomy.name == "pelvis":
        blood = 1.6 * (np.abs(noise(16)) < 0.2) + 1.0 * (np.abs(noise(32)) < 0.12)
    elif anatomy.name == "knee":
        spiral = np.sin(rng.integers(14, 19) * (angle + depth) + 0.7 * noise(64))
        relief = 1.6 * spiral + 0.5 * noise(64)
    elif anatomy.name == "hand":
        relief = 0.5 * noise(64)
        blood = 1.2 * (np.sin(rng.integers(30, 41) * angle + noise(64)) > 0)  # pale fibres on a dark ground
    else:
        bumps = np.sin(28 * depth + noise(64)) * np.sin(20 * angle + noise(64))
        relief = 2.2 * np.clip(bumps, 0, 1)
    return np.asarray(relief, np.float32), np.asarray(blood, np.float32)


def render_endoscopy(anatomy: Anatomy, rng: np.random.Generator) -> Rendering:
    """Render a fly-through (D, H, W, 3) uint8 RGB of the lumen, lit from the camera, with highlights and a mask."""
    relief, blood = _draw_lumen_wall(anatomy)
    frames, pixels = int(rng.integers(16, 25)), int(rng.choice((160, 176, 192, 208, 224)))
    slope = np.roll(relief, -2, 0) - np.roll(relief, 2, 0)
    light = np.clip(1 + rng.uniform(0.4, 0.6) * slope + 0.12 * relief, 0.1, 2.2)
    wet = 0.7 * slope + smooth_noise(rng, relief.shape, 8, periodic=True)
    highlight = np.clip((wet - rng.uniform(1.9, 2.6)) * 2, 0, 1) * rng.uniform(0.4, 1)
    # Mucosa is pale to deep red with a random white balance; joints and tendons are paler.
    colour = rng.uniform(0.6, 0.9) * np.array([1, rng.uniform(0.55, 0.75), rng.uniform(0.45, 0.7)])
    colour += (0.12 if anatomy.name in ("knee", "hand") else 0.0) * (1 - colour)
    dark = np.exp(-blood[..., None] * np.array([0.4, 1.0, 0.9]))
    wall = np.clip(light[..., None] * colour * dark + highlight[..., None], 0, 1.3).astype(np.float32)

    # In a tube, a pixel at distance p from the vanishing point shows the wall at depth 1 / p. The vanishing point moves
    # and may leave the image, in which case the camera faces one side of the wall.
    start, end = rng.uniform(-0.6, 0.6, (2, 2))
    path = np.linspace(0, 1, frames)[:, None]
    centre = start + (end - start) * rng.uniform(0.1, 0.5) * path + 0.05 * np.sin(6 * path + rng.uniform(0, 6, 2))
    y, x = (axis[None] for axis in np.meshgrid(*[np.linspace(-1, 1, pixels)] * 2, indexing="ij"))
    dy, dx = (axis - centre[:, i, None, None] for i, axis in enumerate((y, x)))
    around = np.arctan2(dy, dx)
    distance = np.hypot(dy, dx) * (1 + 0.2 * rng.random() * np.cos(rng.integers(2, 4) * around)) + 0.25
    far = 1 / distance
    travel = (rng.random() + rng.uniform(0.03, 0.2) * path * rng.choice((-1, 1)))[..., None]
    roll = rng.random() + rng.uniform(-0.1, 0.1) * path[..., None]
    v = ((far * rng.uniform(0.13, 0.17) + travel) * 512).astype(int) % 512
    u = ((around / (2 * np.pi) + roll) * 512).astype(int) % 512
    lit = rng.uniform(0.8, 1.1) / (1 + (far / rng.uniform(2.5, 5)) ** 2)
    mask = y**2 + x**2 < rng.uniform(0.9, 2.1)  # from a round field to the full square
    vignette = mask * (1 - rng.uniform(0, 0.35) * (y**2 + x**2) / 2)
    images = wall[v, u] * (lit * vignette)[..., None].astype(np.float32)
    images = images ** np.float32(rng.uniform(0.8, 1.15))
    images += rng.standard_normal(images.shape, dtype=np.float32) * np.float32(rng.uniform(0.005, 0.02))
    array = (np.clip(images, 0, 1) * 255).astype(np.uint8)
    return Rendering(array, (0.0, 0.0, 0.0), np.eye(3), np.eye(4), "lumen")


RENDERERS: dict[str, Callable[[Anatomy, np.random.Generator], Rendering]] = {
    "xray": render_xray,
    "ultrasound": render_ultrasound,
    "endoscopy": render_endoscopy,
    "ct": render_ct,
    "mri": render_mri,
}
