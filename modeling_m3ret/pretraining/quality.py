"""Online evaluation of the encoder on held-out patients during training, and detection of feature collapse."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from ..data.collection import Record
from ..data.loading import Pack, WholeScans, embedding_loader
from ..evaluation.metrics import feature_std, knn_accuracy, rank_me
from ..evaluation.table import ACROSS, ALL_MODALITIES, evaluate
from ..evaluation.untrained_baseline import whitening_sample
from ..image_processing_m3ret import M3RetImageProcessor
from ..modeling_m3ret import M3RetModel
from ..search.embedding import Embedded, Embedder, pooled_embedder
from .distributed import decide_on_main


# resized scans cached by each rank between evaluations: tens of thousands of images at 96 px
MAX_CACHED_BYTES = 2**30
# evaluated held-out scans. Comparing this many 768-dimensional embeddings takes 6 s on one core, and the time grows
# quadratically: hours for the 260,000 scans that a holdout of 0.3 leaves of the paper's 867,653
MEASURED_SCANS = 4096


def measured_sample(held_out: Sequence[Record], max_scans: int = MEASURED_SCANS) -> list[Record]:
    """Return a sample of whole patients with at most `max_scans` scans, in the order of `held_out`.

    Modalities have equal numbers of scans as far as available, since each has the same weight in the mean over
    modalities. Patients are ordered by a hash of their id alone, so the sample changes little when data is added.
    """
    patients: dict[str, list[Record]] = {}
    for record in held_out:
        patients.setdefault(record.group, []).append(record)
    waiting: dict[str, list[str]] = {}
    for group in sorted(patients, key=lambda name: hashlib.sha256(f"m3ret-measured:{name}".encode()).digest()):
        for modality in {record.modality for record in patients[group]}:
            waiting.setdefault(modality, []).append(group)
    queues = {modality: iter(groups) for modality, groups in sorted(waiting.items())}
    chosen: set[str] = set()
    counts: Counter[str] = Counter()
    while queues:
        modality = min(queues, key=counts.__getitem__)
        patient = next(queues[modality], None)
        if patient is None:
            del queues[modality]
        elif patient not in chosen and counts.total() + len(patients[patient]) <= max_scans:
            chosen.add(patient)
            counts.update(record.modality for record in patients[patient])
    return [record for record in held_out if record.group in chosen]


class RepeatedEmbedding:
    """Embed the same scans repeatedly, distributed over ranks. Decoded scans are cached if they fit into memory."""

    def __init__(
        self,
        records: Sequence[Record],
        processor: M3RetImageProcessor,
        accelerator: Accelerator,
        num_workers: int = 0,
        batch_size: int = 16,
    ):
        self.records, self.processor = records, processor
        self.indices = list(range(accelerator.process_index, len(records), accelerator.num_processes))
        dataset = WholeScans([records[index] for index in self.indices], processor)
        self.packs: DataLoader[Pack] | list[Pack] = embedding_loader(dataset, batch_size, num_workers)
        self.fits = True  # until the first pass shows otherwise

    @torch.inference_mode()
    def embed(self, embedder: Embedder) -> Embedded:
        """Return the embeddings of all readable scans, in order, on every rank. All ranks must call it together."""
        cached: list[Pack] = []
        free_bytes = MAX_CACHED_BYTES
        embedded: list[tuple[int, torch.Tensor]] = []
        for pack in self.packs:
            free_bytes -= pack.values.nbytes
            self.fits = self.fits and free_bytes >= 0
            if self.fits:
                cached.append(pack)
            else:
                cached.clear()
            if pack.scans:
                features = embedder(pack.inputs(self.processor)).float().cpu()
                embedded += zip([self.indices[index] for index in pack.scans], features, strict=True)
        if self.fits:
            self.packs = cached
        gathered = sorted(gather_object(embedded), key=lambda pair: pair[0])
        embeddings = torch.stack([features for _, features in gathered]) if gathered else torch.empty(0, 0)
        return Embedded(embeddings, [self.records[index] for index, _ in gathered])


class OnlineQuality:
    """Evaluate an encoder in eval mode on held-out scans and fit its whitening. All ranks must call it together."""

    def __init__(
        self,
        training: Sequence[Record],
        held_out: Sequence[Record],
        processor: M3RetImageProcessor,
        accelerator: Accelerator,
        num_workers: int = 0,
    ):
        self.accelerator = accelerator
        self.training = RepeatedEmbedding(whitening_sample(training), processor, accelerator, num_workers)
        self.held_out = RepeatedEmbedding(measured_sample(held_out), processor, accelerator, num_workers)
        self.held_out_scans = len(held_out)  # before sampling

    def fit_whitening(self, encoder: M3RetModel) -> bool:
        """Fit the encoder's whitening; return False if no training scan could be read or a feature is not finite."""
        pooled = self.training.embed(pooled_embedder(encoder)).embeddings
        fits = len(pooled) > 0 and bool(pooled.isfinite().all())
        if fits:
            encoder.whitening.fit(pooled.to(encoder.device))
        return fits

    def measure(self, encoder: M3RetModel) -> dict[str, float]:
        """Return the metrics of `quality_of`, computed on the main rank; empty if no held-out scan could be read."""
        pooled = self.held_out.embed(pooled_embedder(encoder))

        def evaluate_pooled() -> dict[str, float]:
            if not pooled.records:
                return {}
            white = encoder.whitening(pooled.embeddings.to(encoder.device)).cpu()
            embeddings = torch.nn.functional.normalize(white, dim=-1)  # as embed_scans does
            return quality_of(Embedded(embeddings, pooled.records), pooled.embeddings)

        return decide_on_main(self.accelerator, evaluate_pooled)


def quality_of(embedded: Embedded, pooled: torch.Tensor) -> dict[str, float]:
    """Return metrics named `held_out/...`. If features are not finite, these are only rank and spread, as NaN.

    Retrieval metrics are the mAP of each modality, their mean (`all`) and `across` modalities, and the accuracy of 5
    nearest neighbours. RankMe and the feature standard deviation are those of `pooled`, features `(n, d)` before
    whitening, which would hide a collapse.
    """
    if not (embedded.embeddings.isfinite().all() and pooled.isfinite().all()):
        return {"held_out/feature_std": float("nan"), "held_out/rank_me": float("nan")}
    rows = [row for row in evaluate({"trained": embedded}, jackknife=()) if row.method == "trained"]
    named = {ALL_MODALITIES: "all", ACROSS: "across"}
    numbers = {f"held_out/mAP/{named.get(row.protocol, row.protocol)}": row.scores["mAP"] for row in rows}
    if (accuracy := _knn(embedded)) is not None:
        numbers["held_out/knn_accuracy"] = accuracy
    directions = torch.nn.functional.normalize(pooled.float(), dim=-1)
    return numbers | {"held_out/rank_me": rank_me(directions), "held_out/feature_std": feature_std(directions)}


def _knn(embedded: Embedded) -> float | None:
    """Return the mean over modalities of the 5-nearest-neighbour accuracy among other patients of the modality."""
    accuracies = []
    for modality in sorted({record.modality for record in embedded.records}):
        indices = [i for i, record in enumerate(embedded.records) if record.modality == modality and record.label]
        labels, groups = (
            torch.from_numpy(np.unique([getattr(embedded.records[i], key) for i in indices], return_inverse=True)[1])
            for key in ("label", "group")
        )
        candidate = groups[:, None] != groups
        if indices and candidate.any(1).all() and len(labels.unique()) > 1:
            features = embedded.embeddings[indices]
            accuracies.append(float(knn_accuracy(features @ features.T, labels, candidate).mean()))
    return sum(accuracies) / len(accuracies) if accuracies else None


def collapse_alarm(numbers: Mapping[str, float]) -> str | None:
    """Return a warning if the features of all scans are nearly equal, else None.

    Thresholds: an expansion share within 5 % of the way from that of equal features to the maximum; a feature standard
    deviation below 0.003 of that of random directions (0.005 was healthy for scans that look alike); an effective rank
    below 1.01. Untrained encoders are near these values, so call it only after the warm-up.
    """
    signs = []
    share, floor = numbers.get("expansion_share"), numbers.get("collapsed_share")
    if share is not None and floor is not None and share < floor + 0.05 * (1 - floor):
        signs.append(f"expansion_share is {share:.3f}, and {floor:.3f} for equal features")
    if (spread := numbers.get("held_out/feature_std")) is not None and not spread >= 0.003:
        signs.append(f"feature_std is {spread:.4f}, and 1 for random directions")
    if (rank := numbers.get("held_out/rank_me")) is not None and not rank >= 1.01:
        signs.append(f"rank_me is {rank:.2f}")
    return f"features are collapsing: {'; '.join(signs)}. See docs/training.md, 'Collapse'." if signs else None
