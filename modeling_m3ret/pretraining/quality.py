"""What is the encoder worth so far? Measured on the held-out patients while it trains, and a word when it collapses."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from ..data.collection import Record
from ..data.loading import Pack, WholeScans, embedding_loader
from ..evaluation.metrics import feature_std, knn_accuracy, rank_me
from ..evaluation.table import ACROSS, ALL_MODALITIES, Row, evaluate
from ..evaluation.untrained_baseline import whitening_sample
from ..image_processing_m3ret import M3RetImageProcessor
from ..modeling_m3ret import M3RetModel
from ..search.embedding import Embedded, Embedder, pooled_embedder


# resized scans that each rank keeps of a collection between measurements: at 96 px some tens of thousands of images
MOST_KEPT_BYTES = 2**30
# held-out scans that are measured: to compare so many takes each rank 6 s of one core (768 wide), and time grows with
# the square, to hours for the 260,000 that a holdout of .3 leaves of the paper's 867,653
MEASURED_SCANS = 4096


def measured_sample(held_out: Sequence[Record], most: int = MEASURED_SCANS) -> list[Record]:
    """At most so many of them, all scans of a patient or none, in their order; all where there are no more.

    Modalities get equal parts as far as they go, since each weighs the same in the mean over them. Patients come by a
    hash of their name alone, so most stay when data is added.
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
        elif patient not in chosen and counts.total() + len(patients[patient]) <= most:
            chosen.add(patient)
            counts.update(record.modality for record in patients[patient])
    return [record for record in held_out if record.group in chosen]


class RepeatedEmbedding:
    """Embeds the same scans again and again, each rank its part; decoded once where its part fits into memory."""

    def __init__(
        self,
        records: Sequence[Record],
        processor: M3RetImageProcessor,
        accelerator: Accelerator,
        *,
        batch_size: int = 16,
        num_workers: int = 0,
    ):
        self.records = records
        self.processor = processor
        self.own = list(range(accelerator.process_index, len(records), accelerator.num_processes))
        dataset = WholeScans([records[index] for index in self.own], processor)
        self.packs: DataLoader[Pack] | list[Pack] = embedding_loader(dataset, batch_size, num_workers)
        self.fits = True  # until a measurement has shown that it does not

    @torch.inference_mode()
    def embed(self, embedder: Embedder) -> Embedded:
        """Embeddings of all that can be read, in order, on every rank; to be called by all of them at once."""
        kept: list[Pack] = []
        room = MOST_KEPT_BYTES
        embedded: list[tuple[int, torch.Tensor]] = []
        for pack in self.packs:
            room -= pack.values.nbytes
            self.fits = self.fits and room >= 0
            if self.fits:
                kept.append(pack)
            else:
                kept.clear()
            if pack.scans:
                features = embedder(pack.inputs(self.processor)).float().cpu()
                embedded += zip([self.own[index] for index in pack.scans], features, strict=True)
        if self.fits:
            self.packs = kept
        everything = sorted(gather_object(embedded), key=lambda pair: pair[0])
        embeddings = torch.stack([features for _, features in everything]) if everything else torch.empty(0, 0)
        return Embedded(embeddings, [self.records[index] for index, _ in everything])


class OnlineQuality:
    """Measures an encoder on held-out scans, its whitening fitted to scans of training. All ranks call at once.

    training, held_out: samples of both, see `whitening_sample` and `measured_sample`.
    """

    def __init__(
        self,
        training: Sequence[Record],
        held_out: Sequence[Record],
        processor: M3RetImageProcessor,
        accelerator: Accelerator,
        num_workers: int = 0,
    ):
        fitted, measured = whitening_sample(training), measured_sample(held_out)
        self.training = RepeatedEmbedding(fitted, processor, accelerator, num_workers=num_workers)
        self.held_out = RepeatedEmbedding(measured, processor, accelerator, num_workers=num_workers)
        self.held_out_scans = len(held_out)

    def fit_whitening(self, encoder: M3RetModel) -> bool:
        """Fit the encoder's whitening to what it makes of training scans; False, and as it was, where they are no
        numbers."""
        with _evaluating(encoder):
            pooled = self.training.embed(pooled_embedder(encoder)).embeddings
        fits = len(pooled) > 0 and bool(pooled.isfinite().all())
        if fits:
            encoder.whitening.fit(pooled.to(encoder.device))
        return fits

    def measure(self, encoder: M3RetModel) -> dict[str, float]:
        """Numbers named `held_out/...`, the same on each rank, or none of nobody.

        Retrieval mAP of each modality, over all and across; accuracy of 5 nearest neighbours; RankMe; feature std.
        """
        with _evaluating(encoder):
            pooled = self.held_out.embed(pooled_embedder(encoder))
        if not pooled.records:
            return {}
        white = encoder.whitening(pooled.embeddings.to(encoder.device)).cpu()
        embeddings = torch.nn.functional.normalize(white, dim=-1)  # as `get_image_features`, of one pass for both
        return quality_of(Embedded(embeddings, pooled.records), pooled.embeddings)


@contextlib.contextmanager
def _evaluating(encoder: M3RetModel) -> Iterator[None]:
    was_training = encoder.training
    encoder.eval()
    yield
    encoder.train(was_training)


def quality_of(embedded: Embedded, pooled: torch.Tensor) -> dict[str, float]:
    """The numbers of `OnlineQuality.measure`; features that are not finite have only their alarm.

    Retrieval is that of the embeddings; rank and spread are those of the pooled features `(n, d)` before whitening,
    which would hide a collapse.
    """
    if not (embedded.embeddings.isfinite().all() and pooled.isfinite().all()):
        return {"held_out/feature_std": float("nan"), "held_out/rank_me": float("nan")}
    rows: list[Row] = evaluate({"trained": embedded}, jackknife=())
    named = {ALL_MODALITIES: "all", ACROSS: "across"}
    numbers = {
        f"held_out/mAP/{named.get(row.protocol, row.protocol)}": row.scores["mAP"]
        for row in rows
        if row.method == "trained"
    }
    if (accuracy := _knn(embedded)) is not None:
        numbers["held_out/knn_accuracy"] = accuracy
    directions = torch.nn.functional.normalize(pooled.float(), dim=-1)
    return numbers | {"held_out/rank_me": rank_me(directions), "held_out/feature_std": feature_std(directions)}


def _knn(embedded: Embedded) -> float | None:
    """Mean over modalities of the 5-nearest-neighbour accuracy, other patients of the modality voting."""
    accuracies = []
    for modality in sorted({record.modality for record in embedded.records}):
        own = [place for place, record in enumerate(embedded.records) if record.modality == modality and record.label]
        records = [embedded.records[place] for place in own]
        labels, groups = (_numbered([getattr(record, key) for record in records]) for key in ("label", "group"))
        candidate = groups[:, None] != groups
        if len(own) and candidate.any(1).all() and len(labels.unique()) > 1:
            features = embedded.embeddings[own]
            accuracies.append(float(knn_accuracy(features @ features.T, labels, candidate).mean()))
    return sum(accuracies) / len(accuracies) if accuracies else None


def _numbered(names: Sequence[str]) -> torch.Tensor:
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.int64)


def collapse_alarm(numbers: Mapping[str, float]) -> str | None:
    """In words, what says that all scans have become one point; None while nothing does.

    Thresholds: a twentieth of the way from the expansion share that equal features have to the maximum; a spread of the
    embeddings below .003 of that of random directions (of scans that look alike .005 was healthy); an effective rank
    below 1.01. Untrained encoders lie near them, so ask after the warm-up.
    """
    signs = []
    share, floor = numbers.get("expansion_share"), numbers.get("collapsed_share")
    if share is not None and floor is not None and share < floor + 0.05 * (1 - floor):
        signs.append(f"the expansion is {share:.3f} of its maximum, and equal features would have {floor:.3f}")
    if (spread := numbers.get("held_out/feature_std")) is not None and not spread >= 0.003:
        signs.append(f"held-out features spread by {spread:.4f} where random directions have 1")
    if (rank := numbers.get("held_out/rank_me")) is not None and not rank >= 1.01:
        signs.append(f"their effective rank is {rank:.2f}")
    if not signs:
        return None
    return f"features are collapsing: {'; '.join(signs)}. What to do: docs/training.md, 'Collapse'"
