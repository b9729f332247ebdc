"""Find duplicate scans within a collection, in particular across splits.

Exact duplicates have the same voxels, whatever their format. Near duplicates show the same picture after scaling,
compression or a change of brightness. They are found by a perceptual hash of the middle slice or frame: the signs of
its low frequencies (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions").
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np


THUMBNAIL_SIZE = 32  # pixels per side
HASH_SIZE = 16  # frequencies per axis: 255 bits without the mean. The usual 64 bits confuse chests of two people.
# Largest Hamming distance of near duplicates. Measured on 60 images each of X-ray, ultrasound and endoscopy, in 95% of
# cases: at most 4 to 12 bits (median 2 to 4) for half size, 224 pixels per side, JPEG at quality 50 or both; 4 to 5 for
# noise of 3 grey levels; 10 for 10% more brightness with clipping. The closest of 16,105 pairs of X-rays of different
# patients are 66 bits apart. A crop of 1% per side changes 20 bits (median) and is not found.
MAX_DISTANCE = 15
SPLIT_PRIORITY = {"test": 0, "validation": 1, "train": 2}  # the split that keeps a duplicate


@dataclass(frozen=True)
class Fingerprint:
    """Hashes by which duplicates are found, in hexadecimal. `digest` is the SHA-256 of the voxels."""

    id: str
    split: str
    patient: str
    digest: str
    picture_hash: str


def perceptual_hash(picture: np.ndarray) -> str:
    """Return 256 bits as hexadecimal digits; all are 0 for a blank picture.

    Args:
        picture: `(H, W)` of any real type. The hash does not depend on scale and offset of the grey values.
    """
    from PIL import Image
    from scipy.fft import dctn

    size = (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    thumbnail = Image.fromarray(np.asarray(picture, np.float32)).resize(size, Image.Resampling.BOX)
    low = dctn(np.asarray(thumbnail, np.float64), norm="ortho")[:HASH_SIZE, :HASH_SIZE].ravel()
    bits = low > np.median(low[1:])
    bits[0] = False  # the mean is brightness only
    return np.packbits(bits & (np.abs(low) > 1e-3)).tobytes().hex()


def find_exact_duplicates(fingerprints: Iterable[Fingerprint]) -> list[list[Fingerprint]]:
    """Return groups of two or more scans with equal voxels, in the order of `fingerprints`."""
    groups: dict[str, list[Fingerprint]] = defaultdict(list)
    for fingerprint in fingerprints:
        groups[fingerprint.digest].append(fingerprint)
    return [group for group in groups.values() if len(group) > 1]


def find_near_duplicates(
    fingerprints: Sequence[Fingerprint], max_distance: int = MAX_DISTANCE
) -> Iterator[tuple[Fingerprint, Fingerprint, int]]:
    """Yield pairs of different patients in different splits that look the same, with their Hamming distance.

    Not all pairs are compared: of 16 bands of 16 bits, up to 15 differing bits leave at least one band equal, so
    `max_distance` is at most 15. Blank pictures are ignored.
    """
    if max_distance > 15:
        raise ValueError(f"max_distance: expected at most 15, got {max_distance}.")
    fingerprints = [fingerprint for fingerprint in fingerprints if fingerprint.picture_hash.strip("0")]
    hashes = [list(bytes.fromhex(fingerprint.picture_hash)) for fingerprint in fingerprints]
    bits = np.array(hashes, np.uint8).reshape(-1, HASH_SIZE**2 // 8)
    numbers = {split: number for number, split in enumerate(dict.fromkeys(f.split for f in fingerprints))}
    splits = np.array([numbers[fingerprint.split] for fingerprint in fingerprints], np.intp)
    seen: set[tuple[int, int]] = set()
    for band in bits.view(np.uint16).T:  # (16, n)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=-1))
        ends = np.append(starts[1:], len(order))
        for group in np.flatnonzero(ends - starts > 1):
            members = order[starts[group] : ends[group]]
            for first, second, distance in _compare(members, bits.view(np.uint64), splits, max_distance):
                one, other = fingerprints[first], fingerprints[second]
                if (first, second) not in seen and one.patient != other.patient:
                    seen.add((first, second))
                    yield one, other, distance


def _compare(
    members: np.ndarray, hashes: np.ndarray, splits: np.ndarray, max_distance: int
) -> Iterator[tuple[int, int, int]]:
    """Yield pairs of `members` in different splits, as sorted indices, with their distance. `hashes` is `(n, 4)`."""
    by_split = [members[splits[members] == split] for split in np.unique(splits[members])]
    for ones, others in combinations(by_split, 2):
        step = max(1, 2**18 // len(others))  # bounds the memory of the distance matrix
        for start in range(0, len(ones), step):
            chunk = ones[start : start + step]
            distances = np.bitwise_count(hashes[chunk, None] ^ hashes[None, others]).sum(-1)
            for row, column in np.argwhere(distances <= max_distance):
                first, second = sorted((int(chunk[row]), int(others[column])))
                yield first, second, int(distances[row, column])


def choose_duplicates_to_drop(fingerprints: Sequence[Fingerprint]) -> set[str]:
    """Return the ids to drop so that no picture is in two splits and no voxels are in one split twice.

    Of duplicates in different splits, the one in the test split is retained, otherwise the one in validation.
    """
    dropped: set[str] = set()
    for group in find_exact_duplicates(fingerprints):
        _, *others = sorted(group, key=lambda fingerprint: SPLIT_PRIORITY[fingerprint.split])
        dropped |= {fingerprint.id for fingerprint in others}
    for one, other, _ in find_near_duplicates(fingerprints):
        if one.id not in dropped and other.id not in dropped:
            dropped.add(max((one, other), key=lambda fingerprint: SPLIT_PRIORITY[fingerprint.split]).id)
    return dropped
