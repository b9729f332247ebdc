"""Online metrics on held-out scans, and the alarm on collapse."""

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


def test_metrics_equal_those_of_the_evaluation_and_scans_are_decoded_once(records: list[Record]) -> None:
    encoder = M3RetModel(tiny_config()).eval()
    quality = OnlineQuality(records[:8], records, PROCESSOR, Accelerator(cpu=True))
    quality.fit_whitening(encoder)
    numbers = quality.measure(encoder)
    embedders = [encoder_embedder(encoder), pooled_embedder(encoder)]
    alone, pooled = embed_records(embedders, PROCESSOR, records, progress=False)
    assert {"held_out/mAP/ct", "held_out/mAP/xray", "held_out/mAP/all", "held_out/knn_accuracy"} <= numbers.keys()
    assert numbers == pytest.approx(quality_of(alone, pooled.embeddings), abs=1e-5)
    # the scans that the whitening was fitted to have mean 0
    assert encoder.whitening(pooled.embeddings[:8]).mean(0).abs().max() <= 1e-4
    for record in records:
        record.location.unlink()
    quality.fit_whitening(encoder)
    assert quality.measure(encoder) == numbers


def patients(count: int, name: str, *modalities: str) -> list[Record]:
    """Return records of `count` patients with one scan of each modality."""
    return [
        Record(f"{name}{patient}{number}", Path("x"), modality, "a", "l", f"{name}{patient}")
        for patient in range(count)
        for number, modality in enumerate(modalities)
    ]


def test_few_held_out_scans_are_all_sampled_in_their_order() -> None:
    few = patients(500, "a", "ct", "ct", "xray") + patients(MEASURED_SCANS - 1500, "b", "mri")
    assert measured_sample(few) == few
    assert measured_sample([]) == []


def test_sample_has_whole_patients_and_balanced_modalities() -> None:
    many = patients(3000, "a", "ct", "ct", "xray") + patients(2000, "b", "endoscopy") + patients(9, "c", "mri", "mri")
    sample = measured_sample(many)
    assert MEASURED_SCANS - 2 <= len(sample) <= MEASURED_SCANS
    chosen = {record.group for record in sample}
    assert sample == [record for record in many if record.group in chosen]
    counts = Counter(record.modality for record in sample)
    assert counts["mri"] == 18
    assert abs(counts["xray"] - counts["endoscopy"]) <= 3
    assert counts["ct"] == 2 * counts["xray"]  # as in each patient
    # it does not depend on the order, and changes little when data is added
    assert {record.group for record in measured_sample(many[::-1])} == chosen
    more = {record.group for record in measured_sample(many + patients(300, "d", "ct", "ct", "xray"))}
    assert len(more & chosen) > 0.9 * len(chosen)


def test_patient_with_more_scans_than_the_sample_is_left_out() -> None:
    video = [Record(str(frame), Path("x"), "endoscopy", "a", "l", "video") for frame in range(MEASURED_SCANS + 1)]
    others = patients(5, "a", "endoscopy")
    assert measured_sample(video + others) == others


def test_only_the_sample_is_embedded(records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_module, "measured_sample", lambda held_out: held_out[:6])
    quality = OnlineQuality(records[:2], records, PROCESSOR, Accelerator(cpu=True))
    encoder = M3RetModel(tiny_config()).eval()
    numbers = quality.measure(encoder)
    alone, pooled = embed_records([encoder_embedder(encoder), pooled_embedder(encoder)], PROCESSOR, records[:6])
    assert numbers == pytest.approx(quality_of(alone, pooled.embeddings), abs=1e-5)
    assert quality.held_out_scans == len(records)


class CountedPacks:
    """Iterate over packs, and record how many of one pass are alive at once."""

    def __init__(self, packs: Iterable[Pack]):
        self.packs = packs

    def __iter__(self) -> Iterator[Pack]:
        references: list[weakref.ref[Pack]] = []
        self.max_alive = 0
        for pack in self.packs:
            references.append(weakref.ref(pack))
            self.max_alive = max(self.max_alive, sum(reference() is not None for reference in references))
            yield pack


@pytest.mark.parametrize(("cacheable", "max_alive"), [(0, 2), (3, 4)])
def test_scans_that_do_not_fit_into_the_cache_are_dropped_at_once(
    records: list[Record], monkeypatch: pytest.MonkeyPatch, cacheable: int, max_alive: int
) -> None:
    images = records[::2]  # all of the same size
    monkeypatch.setattr(quality_module, "MAX_CACHED_BYTES", cacheable * 32 * 32 * 4)
    embedding = RepeatedEmbedding(images, PROCESSOR, Accelerator(cpu=True), batch_size=1)
    embedding.packs = counted = CountedPacks(embedding.packs)
    embedder = pooled_embedder(M3RetModel(tiny_config()).eval())
    first = embedding.embed(embedder)
    assert counted.max_alive <= max_alive  # cached packs, or the current one, and the next
    assert torch.equal(embedding.embed(embedder).embeddings, first.embeddings)
    assert counted.max_alive <= 2


def test_without_readable_scans_there_are_no_metrics_and_no_whitening(tmp_path: Path) -> None:
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


def test_alarm_on_equal_features_but_not_on_similar_ones() -> None:
    point = torch.ones(1, 32).expand(20, -1)
    for collapsed in (point, point + 1e-4 * torch.randn(20, 32), torch.full((20, 32), float("nan"))):
        message = collapse_alarm(quality_of(embedded(collapsed), collapsed))
        assert message is not None
        assert "feature_std" in message
        assert "rank_me" in message
    # features within a cone of cosine 0.95 are usual for masked autoencoding
    for healthy in (torch.randn(20, 32), torch.ones(1, 32) + 0.2 * torch.randn(20, 32)):
        assert collapse_alarm(quality_of(embedded(healthy), healthy)) is None


def test_alarm_on_the_expansion_of_equal_features() -> None:
    """For 24 scans, equal features have a share of 0.066."""
    assert collapse_alarm({"expansion_share": 0.07, "collapsed_share": 0.066}) is not None
    assert collapse_alarm({"expansion_share": 0.5, "collapsed_share": 0.066}) is None
    assert collapse_alarm({"loss": 1.0}) is None
