"""Generate the anatomy of a phantom subject: one random, synthetic 3D body region as a volume of tissue labels.

Nothing here comes from a patient. A class (head, chest, ...) is defined by its tissues and their structure at scales of
a few voxels (gyri, trabeculae, lung vessels, bowel gas, muscle fibres), not by position or brightness: `rendering.py`
varies pose, crop and contrast, and the structure remains.

Axes are (z, y, x) = (superior, posterior, left), as in DICOM; voxels are cubes. The output for a given seed is part of
the phantom's version (`dataset.VERSION`): no change here may alter it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Box = tuple[slice, slice, slice]
Vector = tuple[float, float, float]  # (z, y, x)

# Fine enough that a structure of 3-8 voxels spans 3-15 px in an image of 112 px, and small enough to generate a subject
# in a fraction of a second.
SHAPE = (96, 128, 128)

ANATOMY_STREAM = 0  # random stream of the anatomy; the renderings use the following ones


# The values of a label volume, from 0.
Tissue = IntEnum(
    "Tissue",
    "AIR FAT MUSCLE FASCIA CORTICAL_BONE TRABECULAR_BONE MARROW LUNG BLOOD FLUID PARENCHYMA GREY_MATTER WHITE_MATTER "
    "CARTILAGE GLAND",
    start=0,
)


@dataclass(frozen=True)
class Anatomy:
    """Ground truth of one synthetic subject."""

    seed: int  # of the collection
    subject: int
    name: str  # class, one of `CLASSES`
    labels: NDArray[np.uint8]  # (96, 128, 128) with `Tissue` values
    voxel_mm: Vector  # edges of a voxel


def random_stream(seed: int, subject: int, stream: int) -> np.random.Generator:
    """Return a generator that depends only on these keys, not on the order of calls or the number of workers."""
    return np.random.default_rng(np.random.SeedSequence((seed, subject, stream)))


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, ...], cell: float | tuple[float, ...], periodic: bool = False
) -> Array:
    """Return float32 noise with mean 0 and variance 1.

    Random knots are interpolated by a quadratic B-spline along one axis after the other. BLAS is avoided, as its
    threads could change the last bit.

    Args:
        rng: source of randomness.
        shape: shape of the noise.
        cell: distance between knots in voxels, one number or one per axis.
        periodic: whether the noise tiles without a seam. Every length must then be a multiple of its cell.
    """
    cells = (cell,) * len(shape) if isinstance(cell, int | float) else cell
    knots = [round(n / c) if periodic else int(np.ceil(n / c)) + 3 for n, c in zip(shape, cells, strict=True)]
    noise = rng.standard_normal(knots, dtype=np.float32)
    for axis, (length, c) in enumerate(zip(shape, cells, strict=True)):
        position = np.arange(length) / c + (0.0 if periodic else rng.random())
        left = position.astype(int)
        t = (position - left).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        taps = [noise.take((left + step) % knots[axis], axis) for step in range(3)]
        noise = 0.5 * (1 - t) ** 2 * taps[0] + (0.75 - (t - 0.5) ** 2) * taps[1] + 0.5 * t**2 * taps[2]
    # The sum of the squared weights is 0.55 on average over t; dividing by its root restores a variance of 1.
    return noise / np.float32(0.55 ** (len(shape) / 2))


class Canvas:
    """A label volume that is painted in steps. Coordinates are voxels from the centre of the volume."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.labels = np.zeros(SHAPE, np.uint8)
        axes = [np.arange(n, dtype=np.float32) - (n - 1) / 2 for n in SHAPE]
        self.z, self.y, self.x = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
        self.trabeculae: Mask | None = None  # where trabeculae are, for a class that is defined by its bone
        self.wobble = smooth_noise(rng, SHAPE, 24)  # a cell of 24 voxels makes organs irregular, not rough

    def jitter(self, spread: float) -> float:
        """Return a random offset in [-spread, spread]."""
        return float(self.rng.uniform(-spread, spread))

    def noise(self, cell: float | tuple[float, ...], box: Box | None = None) -> Array:
        """Return smooth noise over a box, by default the whole volume."""
        return smooth_noise(self.rng, SHAPE if box is None else self.labels[box].shape, cell)

    def waves(self, length: float, plane: Vector = (1, 1, 1)) -> Array:
        """Return the sum of four plane waves of random directions.

        Unlike `noise`, they have a sharp scale and long-range order. As in real tissue, the order makes a masked patch
        predictable from its neighbours.

        Args:
            length: wavelength in voxels.
            plane: factor per axis of the wave vectors; 0 keeps an axis constant (fibres along z).
        """
        total = np.zeros(SHAPE, np.float32)
        for _ in range(4):
            direction = self.rng.standard_normal(3) * plane
            kz, ky, kx = (direction * (2 * np.pi / length / np.linalg.norm(direction))).astype(np.float32)
            across = ky * self.y + kx * self.x + np.float32(self.rng.uniform(0, 2 * np.pi))
            total += np.cos(kz * self.z) * np.cos(across) - np.sin(kz * self.z) * np.sin(across)
        return total * np.float32(0.5**0.5)

    def sheets(self, cell: float | tuple[float, ...], width: float, box: Box | None = None) -> Mask:
        """Return the mask of folded sheets, where noise is close to 0 (septa, folds, trabeculae)."""
        return np.abs(self.noise(cell, box)) < width

    def strands(self, cell: float | tuple[float, ...], width: float, box: Box | None = None) -> Mask:
        """Return the mask of a net of curved tubes, where two sheets cross (vessels, ducts)."""
        return self.noise(cell, box) ** 2 + self.noise(cell, box) ** 2 < width**2

    def box(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> Box:
        """Return the slices between two corners, clipped to the volume: small shapes are computed in small boxes."""
        size = np.array(SHAPE)
        start = np.clip(np.floor(low + size / 2), 0, size - 1).astype(int)
        stop = np.clip(np.ceil(high + size / 2) + 1, start + 1, size).astype(int)
        z, y, x = map(slice, start, stop)
        return z, y, x

    def ellipsoid(self, centre: Vector, radii: Vector, rough: float = 0.12) -> tuple[Box, Array]:
        """Return a box and the squared relative radius in it, which is below 1 inside the ellipsoid."""
        reach = np.array(radii) * 1.3
        box = self.box(centre - reach, centre + reach)
        z, y, x = self.z[box[0]], self.y[:, box[1]], self.x[:, :, box[2]]
        (cz, cy, cx), (rz, ry, rx) = centre, radii
        relative = ((z - cz) / rz) ** 2 + ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2
        return box, relative + np.float32(rough) * self.wobble[box]

    def tube(self, start: Vector, end: Vector, radius: float) -> tuple[Box, Array]:
        """Return a box and the squared relative distance from a segment in it, which is below 1 inside the tube."""
        box = self.box(np.minimum(start, end) - radius * 1.3, np.maximum(start, end) + radius * 1.3)
        offset = [c - s for c, s in zip((self.z[box[0]], self.y[:, box[1]], self.x[:, :, box[2]]), start, strict=True)]
        along = [e - s for s, e in zip(start, end, strict=True)]
        length = max(sum(a * a for a in along), 1e-6)
        fraction = np.clip(sum(o * a for o, a in zip(offset, along, strict=True)) / length, 0, 1)
        distance = sum((o - fraction * a) ** 2 for o, a in zip(offset, along, strict=True))
        return box, np.asarray(distance / radius**2 + np.float32(0.1) * self.wobble[box], np.float32)

    def paint(self, box: Box, inside: Mask, tissue: Tissue | NDArray[np.uint8], within: Tissue | None = None) -> None:
        """Set the tissue of a box where `inside` is true, and only over the tissue `within` if it is given."""
        region = self.labels[box]
        if within is not None:
            inside = inside & (region == within)
        region[inside] = tissue[inside] if isinstance(tissue, np.ndarray) else tissue

    def paint_bone(self, box: Box, relative: Array, shell: float, cell: float | tuple[float, ...] = 3.5) -> None:
        """Paint trabeculae of a cell size in a cortical shell, which takes the fraction `shell` of the radius."""
        trabeculae = self.sheets(cell, 0.45, box) if self.trabeculae is None else self.trabeculae[box]
        spongiosa = np.where(trabeculae, Tissue.TRABECULAR_BONE, Tissue.MARROW).astype(np.uint8)
        self.paint(box, relative < 1, Tissue.CORTICAL_BONE)
        self.paint(box, relative < (1 - shell) ** 2, spongiosa)

    def paint_body(self, radius_y: float, radius_x: float, fat: float) -> Array:
        """Paint an elliptic column of muscle in fat, and return the relative radius over the volume."""
        relative = np.sqrt((self.y / radius_y) ** 2 + (self.x / radius_x) ** 2) + np.float32(0.04) * self.wobble
        self.labels[relative < 1] = Tissue.FAT
        self.labels[relative < 1 - fat] = Tissue.MUSCLE
        return relative

    def paint_fibres(self, cell: Vector, width: float) -> None:
        """Divide all muscle into bundles along the longest edge of `cell`."""
        self.labels[(self.labels == Tissue.MUSCLE) & self.sheets(cell, width)] = Tissue.FASCIA

    def paint_spine(self, centre_y: float, radius: float, pitch: float) -> None:
        """Paint vertebral bodies and discs with the period `pitch`, the spinal canal and spinous processes."""
        box, relative = self.ellipsoid((0, centre_y, self.jitter(4)), (900, radius, radius * 1.15), 0.06)
        box = (slice(None), box[1], box[2])
        phase = np.mod(self.z / pitch + self.rng.random(), 1)
        near_disc = np.broadcast_to((phase < 0.3) | (phase > 0.95), relative.shape)
        self.paint_bone(box, np.where(near_disc, np.maximum(relative, 0.75), relative), 0.14)
        self.paint(box, np.broadcast_to(phase < 0.22, relative.shape) & (relative < 0.95), Tissue.CARTILAGE)
        behind = centre_y + radius * 1.45
        box, relative = self.tube((-60, behind, 0), (60, behind, 0), radius * 0.7)
        self.paint(box, relative < 1, Tissue.CORTICAL_BONE)
        self.paint(box, relative < 0.5, Tissue.FLUID)
        box, relative = self.ellipsoid((0, behind + radius, 0), (900, radius * 0.9, radius * 0.28), 0.0)
        box = (slice(None), box[1], box[2])
        process = np.broadcast_to(np.mod(phase + 0.3, 1) < 0.5, relative.shape) & (self.labels[box] != Tissue.AIR)
        self.paint_bone(box, np.where(process, relative, 2), 0.4)


def _paint_head(c: Canvas) -> None:
    """Paint a skull with diploe, a folded brain with ventricles, and air cells in the face."""
    centre = (c.jitter(4), c.jitter(4), c.jitter(4))
    box, relative = c.ellipsoid(centre, (52 + c.jitter(5), 58 + c.jitter(5), 47 + c.jitter(5)), 0.05)
    c.paint(box, relative < 1, Tissue.FAT)
    c.paint_bone(box, np.where(relative < 0.92, np.maximum(relative, 0), 2).astype(np.float32), 0.03, 3)
    c.paint(box, relative < 0.77, Tissue.CORTICAL_BONE)
    c.paint(box, relative < 0.73, Tissue.FLUID)
    folds = np.abs(c.waves(22))[box]  # 11 voxels between sulci are 15-20 px in an image of 112 px
    c.paint(box, (relative < 0.72) & (folds > 0.2), Tissue.GREY_MATTER)
    c.paint(box, (relative < 0.68) & (folds > 0.62), Tissue.WHITE_MATTER)
    for side in (-1, 1):
        start = (centre[0] + 4, centre[1] - 22, centre[2] + side * 7)
        inner, tube = c.tube(start, (centre[0] + 2, centre[1] + 22, centre[2] + side * 11), 5 + c.jitter(1.5))
        c.paint(inner, tube < 1, Tissue.FLUID)
    box, relative = c.ellipsoid((-40, -20, 0), (32, 36, 42))
    cells = np.abs(c.noise(6, box)) > 0.3
    c.paint(box, relative < 1, np.where(cells, Tissue.AIR, Tissue.CORTICAL_BONE).astype(np.uint8))


def _paint_neck(c: Canvas) -> None:
    """Paint many small vertebrae, bundles of long muscles in fat, and a trachea with rings."""
    c.paint_body(54 + c.jitter(6), 56 + c.jitter(6), 0.1)
    c.labels[(c.labels == Tissue.MUSCLE) & (np.abs(c.waves(16, (0, 1, 1))) < 0.4)] = Tissue.FAT
    c.paint_spine(10 + c.jitter(4), 13 + c.jitter(1.5), 15)
    centre_y, radius = -26 + c.jitter(4), 10 + c.jitter(1.5)
    box, relative = c.tube((-60, centre_y, 0), (60, centre_y + c.jitter(6), 0), radius)
    rings = np.broadcast_to(np.mod(c.z / 8, 1) < 0.55, c.labels.shape)[box]
    wall = np.where(rings, Tissue.CORTICAL_BONE, Tissue.MUSCLE).astype(np.uint8)
    c.paint(box, relative < 1.1, wall)
    c.paint(box, relative < 0.6, Tissue.AIR)
    for side in (-1, 1):
        box, relative = c.ellipsoid((-20, centre_y + 2, side * 18), (24, 9, 8))
        c.paint(box, relative < 1, Tissue.PARENCHYMA)
        for shift, width in ((0.0, 5.0), (9.0, 6.5)):
            box, relative = c.tube((-60, -12 + shift, side * 27), (60, -14 + shift, side * 24), width)
            c.paint(box, relative < 1, Tissue.FASCIA)
            c.paint(box, relative < 0.7, Tissue.BLOOD)


def _paint_chest(c: Canvas) -> None:
    """Paint two lungs with a net of vessels, oblique ribs, a heart filled with blood, and the spine."""
    radius_y, radius_x = 50 + c.jitter(5), 61 + c.jitter(4)
    relative = c.paint_body(radius_y, radius_x, 0.06)
    c.paint_fibres((8, 8, 30), 0.2)
    lung = relative < 0.8
    vessels = c.waves(20) ** 2 + c.waves(20) ** 2 < 0.3
    c.labels[lung & (np.abs(c.x) > 7)] = Tissue.LUNG
    c.labels[(c.labels == Tissue.LUNG) & vessels] = Tissue.BLOOD
    pitch = 15 + c.jitter(2)
    phase = np.abs(np.mod((c.z + 0.45 * c.y) / pitch, 1) - 0.5) * 2
    shell = ((relative - 0.875) / 0.06) ** 2 + (phase / 0.42) ** 2
    c.labels[shell < 1] = Tissue.CORTICAL_BONE
    c.labels[shell < 0.4] = Tissue.MARROW
    c.paint_spine(radius_y * 0.6, 12 + c.jitter(1), 22)
    box, heart = c.ellipsoid((-16 + c.jitter(5), -12 + c.jitter(4), 12 + c.jitter(5)), (30, 21, 25))
    c.paint(box, heart < 1, Tissue.MUSCLE)
    c.paint(box, (heart < 0.7) & ~c.sheets(16, 0.3, box), Tissue.BLOOD)
    box, tube = c.tube((60, -6, -2), (10, -6, 0), 7)
    c.paint(box, tube < 1, Tissue.AIR)


def _paint_abdomen(c: Canvas) -> None:
    """Paint a smooth liver with few vessels, kidneys with pyramids, and bowel with gas, contents and walls."""
    radius_y, radius_x = 50 + c.jitter(5), 61 + c.jitter(4)
    relative = c.paint_body(radius_y, radius_x, 0.14)
    c.labels[relative < 0.76] = Tissue.FAT
    loops = c.waves(26)
    cavity = (relative < 0.74) & (c.y < 14)
    c.labels[cavity & (loops > -0.6)] = Tissue.MUSCLE
    c.labels[cavity & (loops > -0.1)] = Tissue.FLUID
    c.labels[cavity & (loops > 0.45)] = Tissue.AIR
    c.paint_spine(radius_y * 0.42, 14 + c.jitter(1), 27)
    side = 1 if c.rng.random() < 0.9 else -1  # situs inversus in 10 %, so that the side is not a cue
    box, liver = c.ellipsoid((22 + c.jitter(6), -4 + c.jitter(4), -side * 32), (28, 30, 24))
    c.paint(box, liver < 1, Tissue.PARENCHYMA)
    c.paint(box, (liver < 0.9) & c.strands(15, 0.22, box), Tissue.BLOOD)
    for x in (-30, 30):
        box, kidney = c.ellipsoid((-20 + c.jitter(8), 22 + c.jitter(3), x + c.jitter(4)), (24, 12, 13))
        c.paint(box, kidney < 1, Tissue.GLAND)
        c.paint(box, (kidney < 0.7) & (c.noise(5, box) > 0.1), Tissue.BLOOD)
        c.paint(box, kidney < 0.15, Tissue.FLUID)


def _paint_pelvis(c: Canvas) -> None:
    """Paint wide curved plates of coarse trabecular bone, ball joints, a bladder, and broad oblique muscles."""
    c.paint_body(48 + c.jitter(5), 61 + c.jitter(4), 0.12)
    layers = np.mod((c.y + 0.3 * c.x) / 9 + 0.5 * c.wobble, 1) < 0.35  # sheets of muscle with fat between them
    c.labels[(c.labels == Tissue.MUSCLE) & layers] = Tissue.FAT
    c.trabeculae = np.abs(c.waves(13)) < 0.55
    for side in (-1, 1):
        centre = (26 + c.jitter(4), 2 + c.jitter(4), side * 14)
        box, wing = c.ellipsoid(centre, (56, 38, 34), 0.1)
        half = np.broadcast_to(c.x[:, :, box[2]] * side > 8, wing.shape)
        plate = np.where(half, ((np.sqrt(np.maximum(wing, 0)) - 0.86) / 0.13) ** 2, 2).astype(np.float32)
        c.paint_bone(box, plate, 0.25)
        joint = (-18 + c.jitter(5), -6 + c.jitter(4), side * (40 + c.jitter(3)))
        box, socket = c.ellipsoid(joint, (21, 21, 20), 0.05)
        c.paint_bone(box, socket, 0.15)
        c.paint(box, socket < 0.64, Tissue.CARTILAGE)
        c.paint_bone(*c.ellipsoid(joint, (15, 15, 15), 0.03), shell=0.1)  # ball
        c.paint_bone(*c.tube(joint, (-60, joint[1], side * 50), 10), shell=0.25)  # shaft
    c.paint_bone(*c.ellipsoid((22, 30, 0), (40, 11, 20), 0.1), shell=0.15)  # sacrum
    box, bladder = c.ellipsoid((-14 + c.jitter(5), -14 + c.jitter(3), c.jitter(4)), (19, 16, 20))
    c.paint(box, bladder < 1.15, Tissue.MUSCLE)
    c.paint(box, bladder < 0.9, Tissue.FLUID)


def _paint_knee(c: Canvas) -> None:
    """Paint two thick bones with fine trabeculae, cartilage and fluid between them, and thin tendons in fat."""
    c.paint_body(50 + c.jitter(6), 50 + c.jitter(6), 0.3)
    c.paint_fibres((50, 4, 4), 0.5)
    # A slightly bent lattice along the lines of load. No other class has such fine regular bone.
    bars = [np.mod(axis / 6.5 + 0.25 * c.wobble, 1) < 0.3 for axis in (c.z, c.y, c.x)]
    c.trabeculae = bars[0] | bars[1] | bars[2]
    gap, centre_y, flexion = c.jitter(8), c.jitter(5), c.jitter(20)
    radius = 28 + c.jitter(3)
    box, joint = c.ellipsoid((gap, centre_y - 2, 0), (14, 36, 42))
    c.paint(box, joint < 1, Tissue.FLUID)
    c.paint(box, (joint < 1) & c.sheets(7, 0.5, box), Tissue.CARTILAGE)
    for sign in (1, -1):
        box, shaft = c.tube((gap + sign * 30, centre_y, 0), (sign * 70 + gap, centre_y + flexion, 0), radius * 0.9)
        c.paint_bone(box, shaft, 0.12)
        for side in (-1, 1):  # condyles
            c.paint_bone(*c.ellipsoid((gap + sign * 24, centre_y, side * 15), (22, radius, 22), 0.06), shell=0.07)
    c.paint_bone(*c.ellipsoid((gap + 14, centre_y - 36, c.jitter(4)), (15, 8, 14), 0.05), shell=0.15)  # knee cap


def _paint_hand(c: Canvas) -> None:
    """Paint five rays of slim, hollow bones with joints, a cluster of small wrist bones, and tendons."""
    palm, relative = c.ellipsoid((-30, 0, 0), (44, 26, 60), 0.08)
    c.paint(palm, relative < 1, Tissue.FAT)
    c.paint(palm, relative < 0.85, Tissue.MUSCLE)
    c.paint(palm, c.waves(9, (0, 1, 1))[palm] > 0.4, Tissue.FASCIA, within=Tissue.MUSCLE)
    spread, curl = c.rng.uniform(0.0, 0.25), c.jitter(10)
    for finger in range(5):
        x, low = (finger - 2) * (23 + c.jitter(1)), -26.0 + c.jitter(3)
        joints = [low, low + 26, low + 46, low + 62, low + 76]
        points = [(z, curl * ((z - low) / 70) ** 2 + c.jitter(2), x * (1 + spread * (z - low) / 70)) for z in joints]
        box, flesh = c.tube(points[0], points[-1], 12.5)
        c.paint(box, flesh < 1, Tissue.FAT, within=Tissue.AIR)
        for number, (start, end) in enumerate(pairwise(points)):
            radius = 7.5 - number + c.jitter(0.5)
            top, bottom = ((z, y - radius - 3, x) for z, y, x in (start, end))
            box, tendon = c.tube(top, bottom, 2.5)
            c.paint(box, tendon < 1, Tissue.FASCIA)
            for point in (start, end):
                box, knuckle = c.ellipsoid(point, (4.5, radius, radius), 0.0)
                c.paint(box, knuckle < 1, Tissue.CARTILAGE)
            box, shaft = c.tube((start[0] + radius, *start[1:]), (end[0] - radius, *end[1:]), radius)
            c.paint_bone(box, shaft, 0.38, 9)
    for row in range(2):
        for column in range(4):
            centre = (-44 + row * 13 + c.jitter(1.5), c.jitter(4), (column - 1.5) * 21 + c.jitter(2))
            c.paint_bone(*c.ellipsoid(centre, (6.5, 9, 9), 0.1), shell=0.3, cell=5)


def _paint_breast(c: Canvas) -> None:
    """Paint fat with curved ligaments, islands of gland around ducts, and specks of calcium; no bone and no air."""
    radius = 60 + c.jitter(6)
    box, relative = c.ellipsoid((c.jitter(5), 20 + c.jitter(6), c.jitter(5)), (56 + c.jitter(6), radius, radius), 0.08)
    c.paint(box, relative < 1, Tissue.MUSCLE)
    c.paint(box, relative < 0.93, Tissue.FAT)
    islands = c.waves(15)[box] + 0.3 * c.noise(20, box)
    density = c.rng.uniform(-0.2, 0.5)
    c.paint(box, (relative < 0.8) & (islands > density), Tissue.GLAND)
    c.paint(box, (relative < 0.9) & c.sheets(10, 0.16, box), Tissue.FASCIA)
    c.paint(box, (relative < 0.7) & c.strands(11, 0.25, box), Tissue.FLUID)
    c.paint(box, (relative < 0.75) & (c.noise(3, box) > 2.6), Tissue.CORTICAL_BONE)
    c.labels[(c.labels != Tissue.AIR) & (c.y > 46 + 3 * c.wobble)] = Tissue.MUSCLE  # chest wall
    c.paint_fibres((6, 6, 40), 0.2)


PAINTERS: dict[str, Callable[[Canvas], None]] = {
    "head": _paint_head,
    "neck": _paint_neck,
    "chest": _paint_chest,
    "abdomen": _paint_abdomen,
    "pelvis": _paint_pelvis,
    "knee": _paint_knee,
    "hand": _paint_hand,
    "breast": _paint_breast,
}
CLASSES = tuple(PAINTERS)


def generate_anatomy(seed: int, subject: int) -> Anatomy:
    """Return the anatomy of a subject. Classes cycle, so that any eight consecutive subjects are of all classes."""
    rng = random_stream(seed, subject, ANATOMY_STREAM)
    name = CLASSES[subject % len(CLASSES)]
    # All classes have the same distribution of sizes (280-410 mm), so that the spacing is not a cue.
    edge = round(float(rng.uniform(2.2, 3.2)), 3)
    canvas = Canvas(rng)
    PAINTERS[name](canvas)
    return Anatomy(seed, subject, name, canvas.labels, (edge, edge, edge))


def format_index(subject: int) -> int:
    """Return the number by which file formats cycle. It advances within each class, so no format is tied to a class."""
    return subject % len(CLASSES) + subject // len(CLASSES)
