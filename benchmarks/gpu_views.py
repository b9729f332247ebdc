"""Random views that a GPU renders: loader workers only draw numbers, and the scans lie in the memory of the device.

The views follow `data/views.py`, with these differences:

- The side ratio of a crop is that of its view, one of three for each view of a batch, so a batch has few lengths and
  no crop is distorted.
- Crops are cut from scans that are already resized and compressed, and are resized without antialiasing.
- Clips and volumes are sampled at four or eight slices, the nearest ones.
- There is no loss of resolution among the intensity changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from gpu_corpus import PackedScan
from torch import Tensor, nn

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.data.loading import Pack, Planner
from modeling_m3ret.data.views import Jitter, ViewKind
from modeling_m3ret.packing_m3ret import Movable, split_into_patches


NUMBERS = 21  # random numbers in [0, 1) for each view
UNCHANGED = np.array([1, 0, 1, 1, 1, 1, 1, 0, 0, 1e-3])  # intensity changes, see `jitter_numbers`


@dataclass
class ViewGroup(Movable):
    """Views of equal shape.

    Attributes:
        shape: `(C, D, h, w)` of each view.
        starts: index of the first voxel of each plane in the store, int64 `(n, C*D)`.
        sizes: height and width of the planes, int64 `(n, 2)`.
        boxes: top, left, height and width of the crop in pixels, float32 `(n, 4)`.
        flips: whether a view is mirrored, bool `(n,)`.
        jitter: intensity changes, float32 `(n, 10)`; None leaves all as they are.
    """

    shape: tuple[int, int, int, int]
    starts: Tensor
    sizes: Tensor
    boxes: Tensor
    flips: Tensor
    jitter: Tensor | None


@dataclass
class ViewBatch(Movable):
    """All views of a batch, to be rendered: groups, and the pack without values."""

    groups: tuple[ViewGroup, ...]
    pack: Pack
    number: int = 0  # of the batch, which seeds the noise


@dataclass(eq=False)
class Store:
    """Voxels of all scans in one uint8 tensor on a device."""

    scans: Sequence[PackedScan]
    voxels: Tensor
    offsets: np.ndarray = field(init=False)  # of each scan

    def __post_init__(self) -> None:
        counts = np.array([scan.shape for scan in self.scans]).prod(1)
        self.offsets = counts.cumsum() - counts

    @classmethod
    def from_volumes(cls, scans: Sequence[PackedScan], volumes: Sequence[Tensor], device: torch.device) -> Store:
        return cls(scans, torch.cat([volume.flatten() for volume in volumes]).to(device))

    def without_voxels(self) -> Store:
        """Return what loader workers need."""
        return Store(self.scans, torch.empty(0, dtype=torch.uint8))

    def render(self, batch: ViewBatch) -> Pack:
        """Return the pack of a batch, with its voxels, on this device."""
        device = self.voxels.device
        generator = torch.Generator(device).manual_seed(batch.number)
        values = []
        for group in batch.to(device).groups:
            views = render_views(self.voxels, group)
            if group.jitter is not None:
                views = change_intensity(views, group.jitter, generator)
            depth = 1 if group.shape[1] == 1 else 4
            values.append(split_into_patches(views, depth, 16).flatten())
        return replace(batch.pack.to(device), values=torch.cat(values))

    def gather(
        self,
        processor: M3RetImageProcessor,
        indices: np.ndarray,
        shapes: np.ndarray,
        boxes: np.ndarray,
        slices: np.ndarray,
        flips: np.ndarray,
        jitter: np.ndarray | None,
    ) -> ViewBatch:
        """Group views for `render`.

        Args:
            processor: processor of the model.
            indices: scan of each view, `(n,)`.
            shapes: `(D, h, w)` of each view, `(n, 3)`.
            boxes: top, left, height and width of each crop, `(n, 4)`.
            slices: first and last slice of each view, `(n, 2)`.
            flips: `(n,)`.
            jitter: `(n, 10)` or None.
        """
        of_scan = np.array([self.scans[index].shape for index in indices])  # (n, 4)
        whole = np.concatenate([of_scan[:, :1], shapes], axis=1)  # (n, 4): C, D, h, w
        kinds, kind = np.unique(whole, axis=0, return_inverse=True)
        rendered = np.argsort(kind.ravel(), kind="stable")
        groups = []
        for number, (C, D, h, w) in enumerate(kinds.tolist()):
            members = rendered[kind.ravel()[rendered] == number]
            depth, height, width = of_scan[members, 1:].T
            first, last = slices[members].T
            z = np.rint(first[:, None] + (last - first)[:, None] * np.linspace(0, 1, D)).astype(np.int64)  # (m, D)
            planes = np.arange(C)[:, None] * depth[:, None, None] + z[:, None]  # (m, C, D)
            starts = self.offsets[indices[members]][:, None, None] + planes * (height * width)[:, None, None]
            groups.append(
                ViewGroup(
                    (C, D, h, w),
                    torch.from_numpy(starts.reshape(len(members), -1)),
                    torch.from_numpy(np.stack([height, width], axis=1)),
                    torch.from_numpy(boxes[members].astype(np.float32)),
                    torch.from_numpy(flips[members]),
                    None if jitter is None else torch.from_numpy(jitter[members].astype(np.float32)),
                )
            )
        # blocks of the views as rendered, then in the given order
        in_order = Pack(shapes=[tuple(shape) for shape in whole[rendered].tolist()])
        blocks = in_order.row_blocks(processor, compact_images=True)
        grids = np.array([processor.grid_shape(tuple(shape)) for shape in whole.tolist()])
        counts = grids.prod(1)
        starts = np.empty_like(counts)
        starts[rendered] = counts[rendered].cumsum() - counts[rendered]
        rows = np.arange(counts.sum()) + (starts - (counts.cumsum() - counts)).repeat(counts)
        pack = Pack(
            shapes=[tuple(shape) for shape in whole.tolist()],
            scans=indices.tolist(),
            blocks=blocks[torch.from_numpy(rows)],
        )
        return ViewBatch(tuple(groups), pack)

    def whole_scans(self, processor: M3RetImageProcessor, indices: np.ndarray) -> ViewBatch:
        """Return whole scans as views of their own size; the depth of a volume is cut to whole patches."""
        shapes = np.array([self.scans[index].shape[1:] for index in indices])
        D, H, W = shapes.T
        shapes[:, 0] = np.where(D == 1, 1, np.maximum(4, D // 4 * 4))
        boxes = np.stack([np.zeros_like(H), np.zeros_like(W), H, W], axis=1)
        slices = np.stack([np.zeros_like(D), D - 1], axis=1)
        return self.gather(processor, indices, shapes, boxes, slices, np.zeros(len(indices), dtype=bool), None)


@dataclass(eq=False)
class ViewSampler(torch.utils.data.Dataset):
    """Draw the views of a batch. An item is `(number, [(visit, index), ...])`, and all that its draws depend on."""

    store: Store  # without voxels
    processor: M3RetImageProcessor
    kinds: Sequence[ViewKind]
    plan: Planner
    seed: int

    def __getitem__(self, item: tuple[int, Sequence[tuple[int, int]]]) -> ViewBatch:
        number, keys = item
        slots = [kind for kind in self.kinds for _ in range(kind.count)]
        of_batch = np.random.default_rng([self.seed, number])
        sides = np.array([view_sides((kind.size or self.processor.size) // 16, of_batch) for kind in slots])
        random = np.stack(  # (B, V, NUMBERS)
            [np.random.default_rng([self.seed, visit, index]).random((len(slots), NUMBERS)) for visit, index in keys]
        )
        indices = np.array([index for _, index in keys])
        of_scan = np.array([self.store.scans[index].shape for index in indices])
        _, D, H, W = (column[:, None] for column in of_scan.T)  # (B, 1) each
        h, w = 16 * sides.T  # (V,) each

        def between(column: int, ranges: np.ndarray) -> np.ndarray:  # (V, 2) -> (B, V)
            return ranges[:, 0] + (ranges[:, 1] - ranges[:, 0]) * random[..., column]

        area = between(0, np.array([kind.ranges.area for kind in slots]))
        scale = np.sqrt(area * H * W / (h * w))
        scale = np.minimum(scale, np.minimum(H / h, W / w))  # a crop that does not fit keeps its sides' ratio
        height, width = scale * h, scale * w
        boxes = np.stack([random[..., 1] * (H - height), random[..., 2] * (W - width), height, width], axis=-1)
        flips = random[..., 3] < np.array([kind.flip_probability for kind in slots])
        single = random[..., 4] < np.array([kind.ranges.single_slice_probability for kind in slots])
        depth = np.maximum(1, np.rint(D * between(5, np.array([kind.ranges.depth for kind in slots]))))
        depth = np.where(single | (D == 1), 1, np.maximum(depth, np.minimum(D, 2))).astype(np.int64)
        first = np.floor(random[..., 6] * (D - depth + 1)).astype(np.int64)
        slices = np.stack([first, first + depth - 1], axis=-1)
        shapes = np.stack(np.broadcast_arrays(np.where(depth == 1, 1, np.where(depth < 8, 4, 8)), h, w), axis=-1)
        jitter = jitter_numbers(random[..., 7:], slots)
        n = indices.size * len(slots)
        batch = self.store.gather(
            self.processor,
            indices.repeat(len(slots)),
            shapes.reshape(n, 3),
            boxes.reshape(n, 4),
            slices.reshape(n, 2),
            flips.reshape(n),
            jitter.reshape(n, -1),
        )
        grids = [self.processor.grid_shape(shape) for shape in batch.pack.shapes]
        noise = torch.from_numpy(of_batch.random(len(batch.pack.blocks), dtype=np.float32))
        return ViewBatch(batch.groups, replace(batch.pack, plan=self.plan(grids, noise)), number)


def view_sides(patches: int, generator: np.random.Generator) -> tuple[int, int]:
    """Return height and width of a view in patches: square, portrait or landscape."""
    change = int(generator.integers(-1, 2)) if patches > 1 else 0
    return patches + change, patches - change


def jitter_numbers(random: np.ndarray, slots: Sequence[ViewKind]) -> np.ndarray:
    """Return the intensity changes `(B, V, 10)` from random numbers `(B, V, 14)`, as `Jitter` describes them.

    The columns are contrast, brightness, gamma, white balance (3), saturation, greyness, noise and blur.
    """
    numbers = np.broadcast_to(UNCHANGED, (*random.shape[:2], len(UNCHANGED))).copy()
    for slot, kind in enumerate(slots):
        jitter: Jitter | None = kind.jitter
        if jitter is None:
            continue
        u = random[:, slot]
        ranges = np.array(
            [jitter.contrast, jitter.brightness, jitter.gamma, *[jitter.white_balance] * 3, jitter.saturation]
        )
        drawn = ranges[:, 0] + (ranges[:, 1] - ranges[:, 0]) * u[:, 1:8]
        applies = u[:, :1] < jitter.probability
        numbers[:, slot, :7] = np.where(applies, drawn, UNCHANGED[:7])
        numbers[:, slot, 7] = u[:, 8] < jitter.grey_probability
        noise, blur = (
            low + (high - low) * u[:, column] for (low, high), column in ((jitter.noise, 10), (jitter.blur, 12))
        )
        numbers[:, slot, 8] = np.where(u[:, 9] < jitter.noise_probability, noise, UNCHANGED[8])
        numbers[:, slot, 9] = np.where(u[:, 11] < jitter.blur_probability, blur, UNCHANGED[9])
    return numbers


def render_views(voxels: Tensor, group: ViewGroup) -> Tensor:
    """Cut and resize the views of a group, bilinear without antialiasing: `(n, C, D, h, w)` float32 in [0, 1]."""
    C, D, h, w = group.shape
    top, left, height, width = group.boxes.T[..., None]  # (n, 1) each
    full_height, full_width = group.sizes.T[..., None]
    y = top + (torch.arange(h, device=voxels.device) + 0.5) * height / h - 0.5
    x = left + (torch.arange(w, device=voxels.device) + 0.5) * width / w - 0.5
    x = torch.where(group.flips[:, None], x.flip(1), x)
    y, x = torch.minimum(y.clamp(min=0), full_height - 1), torch.minimum(x.clamp(min=0), full_width - 1)
    above, before = y.long(), x.long()
    below, after = torch.minimum(above + 1, full_height - 1), torch.minimum(before + 1, full_width - 1)
    of_row, of_column = (y - above)[:, None, :, None], (x - before)[:, None, None, :]  # weights of the later neighbour

    def at(rows: Tensor, columns: Tensor) -> Tensor:  # (n, C*D, h, w)
        lines = group.starts[..., None] + (rows * full_width)[:, None]
        return voxels[lines[..., None] + columns[:, None, None, :]].float()

    upper = torch.lerp(at(above, before), at(above, after), of_column)
    lower = torch.lerp(at(below, before), at(below, after), of_column)
    return torch.lerp(upper, lower, of_row).unflatten(1, (C, D)) / 255


def change_intensity(views: Tensor, numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Change the intensities of views `(n, C, D, h, w)` in [0, 1] by `jitter_numbers (n, 10)`."""
    n, C, D, h, w = views.shape
    contrast, brightness, gamma, _, _, _, saturation, grey, noise, _ = numbers.T.view(-1, n, 1, 1, 1, 1)
    offsets = torch.arange(-3, 4, device=views.device)  # three standard deviations
    kernels = torch.exp(-0.5 * (offsets / numbers[:, 9:]) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(C * D, 0)  # (n*C*D, 7)
    planes = views.reshape(1, n * C * D, h, w)
    for shape, padding in (((-1, 1, 7, 1), (0, 0, 3, 3)), ((-1, 1, 1, 7), (3, 3, 0, 0))):
        planes = nn.functional.conv2d(
            nn.functional.pad(planes, padding, mode="replicate"), kernels.view(shape), groups=n * C * D
        )
    views = planes.view(n, C, D, h, w)
    if C == 3:
        views = views * numbers[:, 3:6, None, None, None]
        mean = views.mean(1, keepdim=True)
        views = (mean + (views - mean) * saturation).clamp(0, 1)
    views = views.clamp(min=0).pow(gamma)
    mean = views.mean((1, 2, 3, 4), keepdim=True)
    views = ((views - mean) * contrast + mean + brightness).clamp(0, 1)
    if C == 3:
        views = torch.lerp(views, views.mean(1, keepdim=True).expand_as(views), grey)
    return (views + noise * torch.randn(views.shape, device=views.device, generator=generator)).clamp(0, 1)
