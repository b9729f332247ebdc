"""Which scans are in a collection twice, and on both sides of a split?

Exact: the same voxels, whatever the format. Near: the same picture scaled, compressed or brightened anew, by a
perceptual hash (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions"): the signs of the
low frequencies of the middle slice or frame.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np


SIDE = 32  # pixels of the thumbnail whose frequencies are taken
FREQUENCIES = 16  # along each axis: 255 bits without the mean; 64 bits, as is common, confuse chests of two people
# Bits of 255 that differ in the same picture at most. Measured on 60 images each of X-ray, ultrasound and endoscopy:
# half or 224 pixels a side, JPEG of quality 50, or both move at most 4 to 12 bits in 95% (median 2 to 4), noise of 3
# grey levels 4 to 5, brighter by 10% with white clipped 10. Of 16,105 pairs of two people's X-rays the nearest are 66
# bits apart. A crop of 1% on each side moves 20 (median): those are not found.
NEAR = 15


@dataclass(frozen=True)
class Fingerprint:
    """Of one row: its id, split and patient, the sha256 of its voxels and its perceptual hash, both in hex."""

    id: str
    split: str
    patient: str
    digest: str
    picture_hash: str


def perceptual_hash(picture: np.ndarray) -> str:
    """`(H, W)` of any real type -> 256 bits in hex; none is set where the picture shows nothing."""
    from PIL import Image
    from scipy.fft import dctn

    small = Image.fromarray(np.asarray(picture, np.float32)).resize((SIDE, SIDE), Image.Resampling.BOX)
    low = dctn(np.asarray(small, np.float64), norm="ortho")[:FREQUENCIES, :FREQUENCIES].ravel()
    bits = low > np.median(low[1:])
    bits[0] = False  # the mean says how bright it is
    return np.packbits(bits & (np.abs(low) > 1e-3)).tobytes().hex()


def exact_groups(prints: Iterable[Fingerprint]) -> list[list[Fingerprint]]:
    """Scans of equal voxels, two and more, each group in the order of `prints`."""
    groups: dict[str, list[Fingerprint]] = defaultdict(list)
    for fingerprint in prints:
        groups[fingerprint.digest].append(fingerprint)
    return [group for group in groups.values() if len(group) > 1]


def near_pairs(prints: Sequence[Fingerprint], most: int = NEAR) -> Iterator[tuple[Fingerprint, Fingerprint, int]]:
    """Pairs of two patients in two splits whose pictures differ by at most `most` bits, and by how many.

    Found without comparing all with all: of 16 bands of 16 bits, at most 15 differing bits leave one band equal.
    """
    if most > 15:
        raise ValueError(f"the bands find all pairs of up to 15 bits, not of {most}")
    prints = [fingerprint for fingerprint in prints if fingerprint.picture_hash.strip("0")]
    bits = np.array([list(bytes.fromhex(p.picture_hash)) for p in prints], np.uint8).reshape(-1, FREQUENCIES**2 // 8)
    names = {split: number for number, split in enumerate(dict.fromkeys(p.split for p in prints))}
    splits = np.array([names[p.split] for p in prints], np.intp)
    seen: set[tuple[int, int]] = set()
    for band in bits.view(np.uint16).T:  # (16, n)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=-1))
        ends = np.append(starts[1:], len(order))
        for group in np.flatnonzero(ends - starts > 1):
            members = order[starts[group] : ends[group]]
            for one, other, distance in _close(members, bits.view(np.uint64), splits, most):
                if (one, other) not in seen and prints[one].patient != prints[other].patient:
                    seen.add((one, other))
                    yield prints[one], prints[other], distance


def _close(members: np.ndarray, words: np.ndarray, splits: np.ndarray, most: int) -> Iterator[tuple[int, int, int]]:
    """Of rows of `words` `(n, 4)`, sorted by number, the pairs in two splits of at most `most` differing bits."""
    parts = [members[splits[members] == split] for split in np.unique(splits[members])]
    for ones, others in combinations(parts, 2):
        step = max(1, 2**18 // len(others))  # so that a group of a whole collection takes little memory
        for start in range(0, len(ones), step):
            some = ones[start : start + step]
            distances = np.bitwise_count(words[some, None] ^ words[None, others]).sum(-1)
            for row, column in np.argwhere(distances <= most):
                one, other = sorted((int(some[row]), int(others[column])))
                yield one, other, int(distances[row, column])


def to_drop(prints: Sequence[Fingerprint]) -> set[str]:
    """Ids to leave out so that no picture is in two splits and none is twice in one.

    Of two splits the one that is measured on keeps its scan: test, then validation.
    """
    rank = {"test": 0, "validation": 1, "train": 2}
    dropped: set[str] = set()
    for group in exact_groups(prints):
        keeper = min(group, key=lambda fingerprint: rank[fingerprint.split])
        dropped |= {fingerprint.id for fingerprint in group if fingerprint is not keeper}
    for one, other, _ in near_pairs(prints):
        if one.id not in dropped and other.id not in dropped:
            dropped.add(max((one, other), key=lambda fingerprint: rank[fingerprint.split]).id)
    return dropped
