"""The numbers on held-out scans, whoever embeds them, and when they raise the alarm."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config

from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret.data.collection import Record
from modeling_m3ret.data.loading import Pack
from modeling_m3ret.pretraining import quality as quality_module
from modeling_m3ret.pretraining.quality import (
    MEASURED_SCANS,
    OnlineQuality,
    RepeatedEmbedding,
    collapse_alarm,
    measured_sample,
    quality_of,
)
from modeling_m3ret.search.embedding import Embedded, embed_records, encoder_embedder, pooled_embedder


PROCESSOR = M3RetImageProcessor(size=32, num_frames=8)


def test_measured_as_by_the_evaluation_and_decoded_once(records: list[Record]) -> None:
    encoder = M3RetModel(tiny_config()).train()
    quality = OnlineQuality(records[:8], records, PROCESSOR, Accelerator(cpu=True))
    quality.fit_whitening(encoder)
    numbers = quality.measure(encoder)
    assert encoder.training  # as it was
    embedders = [encoder_embedder(encoder.eval()), pooled_embedder(encoder)]
    alone, pooled = embed_records(embedders, PROCESSOR, records, progress=False)
    assert {"held_out/mAP/ct", "held_out/mAP/xray", "held_out/mAP/all", "held_out/knn_accuracy"} <= numbers.keys()
    assert numbers == pytest.approx(quality_of(alone, pooled.embeddings), abs=1e-5)
    # what the whitening was fitted to has mean 0
    assert encoder.whitening(pooled.embeddings[:8]).mean(0).abs().max() <= 1e-4
    for record in records:
        record.location.unlink()
    quality.fit_whitening(encoder)
    assert quality.measure(encoder) == numbers


def patients(count: int, name: str, *modalities: str) -> list[Record]:
    """Scans of so many patients, one of each modality."""
    return [
        Record(f"{name}{patient}{number}", Path("x"), modality, "a", "l", f"{name}{patient}")
        for patient in range(count)
        for number, modality in enumerate(modalities)
    ]


def test_few_held_out_scans_are_all_measured_in_their_order() -> None:
    few = patients(500, "a", "ct", "ct", "xray") + patients(MEASURED_SCANS - 1500, "b", "mri")
    assert measured_sample(few) == few
    assert measured_sample([]) == []


def test_of_many_whole_patients_are_measured_and_modalities_in_equal_parts_as_far_as_they_go() -> None:
    many = patients(3000, "a", "ct", "ct", "xray") + patients(2000, "b", "endoscopy") + patients(9, "c", "mri", "mri")
    sample = measured_sample(many)
    assert MEASURED_SCANS - 2 <= len(sample) <= MEASURED_SCANS
    chosen = {record.group for record in sample}
    assert sample == [record for record in many if record.group in chosen]
    counts = Counter(record.modality for record in sample)
    assert counts["mri"] == 18
    assert abs(counts["xray"] - counts["endoscopy"]) <= 3
    assert counts["ct"] == 2 * counts["xray"]  # as its patients have
    # no other order, and few others where there are more
    assert {record.group for record in measured_sample(many[::-1])} == chosen
    more = {record.group for record in measured_sample(many + patients(300, "d", "ct", "ct", "xray"))}
    assert len(more & chosen) > 0.9 * len(chosen)


def test_a_patient_of_more_scans_than_are_measured_leaves_room_for_others() -> None:
    video = [Record(str(frame), Path("x"), "endoscopy", "a", "l", "video") for frame in range(MEASURED_SCANS + 1)]
    others = patients(5, "a", "endoscopy")
    assert measured_sample(video + others) == others


def test_the_sample_is_what_is_embedded(records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_module, "measured_sample", lambda held_out: held_out[:6])
    quality = OnlineQuality(records[:2], records, PROCESSOR, Accelerator(cpu=True))
    encoder = M3RetModel(tiny_config()).eval()
    numbers = quality.measure(encoder)
    alone, pooled = embed_records([encoder_embedder(encoder), pooled_embedder(encoder)], PROCESSOR, records[:6])
    assert numbers == pytest.approx(quality_of(alone, pooled.embeddings), abs=1e-5)
    assert quality.held_out_scans == len(records)


class Counted:
    """Packs on their way, and how many of one pass were alive at once, at most."""

    def __init__(self, packs: Iterable[Pack]):
        self.packs = packs

    def __iter__(self) -> Iterator[Pack]:
        met: list[weakref.ref[Pack]] = []
        self.most = 0
        for pack in self.packs:
            met.append(weakref.ref(pack))
            self.most = max(self.most, sum(reference() is not None for reference in met))
            yield pack


@pytest.mark.parametrize(("room_for", "most_alive"), [(0, 2), (3, 4)])
def test_scans_that_do_not_fit_are_dropped_at_once_and_not_kept_again(
    records: list[Record], monkeypatch: pytest.MonkeyPatch, room_for: int, most_alive: int
) -> None:
    images = records[::2]  # of one size
    monkeypatch.setattr(quality_module, "MOST_KEPT_BYTES", room_for * 32 * 32 * 4)
    embedding = RepeatedEmbedding(images, PROCESSOR, Accelerator(cpu=True), batch_size=1)
    embedding.packs = counted = Counted(embedding.packs)
    embedder = pooled_embedder(M3RetModel(tiny_config()).eval())
    first = embedding.embed(embedder)
    assert counted.most <= most_alive  # what is kept, or the one at work, and the next
    assert torch.equal(embedding.embed(embedder).embeddings, first.embeddings)
    assert counted.most <= 2


def test_nobody_held_out_and_nobody_readable_measure_nothing(tmp_path: Path) -> None:
    encoder = M3RetModel(tiny_config())
    assert OnlineQuality([], [], PROCESSOR, Accelerator(cpu=True)).measure(encoder) == {}
    missing = [Record("x", tmp_path / "x.npy", "ct", "a", "l", "p")]
    quality = OnlineQuality(missing, missing, PROCESSOR, Accelerator(cpu=True))
    quality.fit_whitening(encoder)
    assert torch.equal(encoder.whitening.matrix, torch.eye(48))
    assert quality.measure(encoder) == {}


def embedded(vectors: torch.Tensor) -> Embedded:
    records = [Record(str(n), Path("x"), "ct", "a", f"l{n % 2}", f"p{n}") for n in range(len(vectors))]
    return Embedded(torch.nn.functional.normalize(vectors, dim=-1), records)


def test_alarm_on_one_point_and_none_on_directions() -> None:
    point = torch.ones(1, 32).expand(20, -1)
    for collapsed in (point, point + 1e-4 * torch.randn(20, 32), torch.full((20, 32), float("nan"))):
        message = collapse_alarm(quality_of(embedded(collapsed), collapsed))
        assert message is not None
        assert "spread by" in message
        assert "effective rank" in message
    # directions within a cone of cosine .95 and more: usual for masked autoencoding, and no collapse
    for healthy in (torch.randn(20, 32), torch.ones(1, 32) + 0.2 * torch.randn(20, 32)):
        assert collapse_alarm(quality_of(embedded(healthy), healthy)) is None


def test_alarm_on_an_expansion_that_equal_features_have() -> None:
    """Of 24 scans equal features have a share of .066."""
    assert collapse_alarm({"expansion_share": 0.07, "collapsed_share": 0.066}) is not None
    assert collapse_alarm({"expansion_share": 0.5, "collapsed_share": 0.066}) is None
    assert collapse_alarm({"loss": 1.0}) is None
