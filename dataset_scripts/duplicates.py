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
# bits of 255 that differ in the same picture at most
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
    bands = bits.view(np.uint16)  # (n, 16)
    seen: set[tuple[int, int]] = set()
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=-1))
        for members in np.split(order, starts[1:]):
            for one, other in _across_splits(members, prints):
                if (one, other) not in seen:
                    seen.add((one, other))
                    distance = int(np.bitwise_count(bits[one] ^ bits[other]).sum())
                    if distance <= most:
                        yield prints[one], prints[other], distance


def _across_splits(members: np.ndarray, prints: Sequence[Fingerprint]) -> Iterator[tuple[int, int]]:
    by_split: dict[str, list[int]] = defaultdict(list)
    for member in sorted(members.tolist()):
        by_split[prints[member].split].append(member)
    for ones, others in combinations(by_split.values(), 2):
        for one in ones:
            for other in others:
                if prints[one].patient != prints[other].patient:
                    yield min(one, other), max(one, other)


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
