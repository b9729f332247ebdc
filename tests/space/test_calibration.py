"""What a similarity means in a gallery, on galleries whose similarities are known in closed form."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest
import torch

from modeling_m3ret.model_facts import ModelFacts
from modeling_m3ret.search.index import RetrievalIndex
from modeling_m3ret.space import calibration as calibration_module
from modeling_m3ret.space.calibration import Calibration


def on_a_circle(degrees: list[float], patients: list[str] | None = None) -> RetrievalIndex:
    """Return an index of unit vectors in a plane: the similarity of two is the cosine of the angle between them."""
    angles = torch.tensor(degrees).deg2rad()
    columns = {"id": [str(row) for row in range(len(degrees))]} | ({"patient": patients} if patients else {})
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    return RetrievalIndex.build(embeddings, pa.table(columns), ModelFacts("m", "r", "p"))


def cosines(*degrees: float) -> torch.Tensor:
    return torch.tensor([math.cos(math.radians(angle)) for angle in degrees])


def test_pairs_are_those_of_different_scans() -> None:
    calibration = Calibration.from_index(on_a_circle([0, 10, 40]))
    torch.testing.assert_close(calibration.pairs, cosines(40, 30, 10), atol=1e-3, rtol=0)


def test_the_nearest_scan_is_another_one_of_another_patient() -> None:
    degrees = [0.0, 10.0, 40.0, 45.0]
    alone = Calibration.from_index(on_a_circle(degrees))
    torch.testing.assert_close(alone.nearest, cosines(10, 10, 5, 5), atol=1e-3, rtol=0)
    patients = Calibration.from_index(on_a_circle(degrees, ["a", "a", "b", "b"]))
    torch.testing.assert_close(patients.nearest, cosines(40, 35, 30, 30), atol=1e-3, rtol=0)
    unknown = Calibration.from_index(on_a_circle(degrees, ["", "", "", ""]))
    torch.testing.assert_close(unknown.nearest, alone.nearest)


def test_a_percentile_counts_pairs_that_are_less_alike() -> None:
    calibration = Calibration(torch.tensor([0.1, 0.2, 0.2, 0.5]), torch.tensor([0.5]))
    similarities = [0.0, 0.1, 0.15, 0.2, 0.3, 0.5, 0.6]
    assert [calibration.percentile(value) for value in similarities] == [0, 0, 25, 25, 75, 75, 100]


def test_the_p_value_is_conformal() -> None:
    nearest = torch.linspace(0.01, 0.99, 99)
    calibration = Calibration(nearest, nearest)
    assert calibration.p_value(0.0) == pytest.approx(1 / 100)
    assert calibration.p_value(0.505) == pytest.approx(51 / 100)
    assert calibration.p_value(1.0) == pytest.approx(1)
    assert [calibration.level(value) for value in (0.0, 0.02, 0.045, 0.055, 0.9)] == [
        "unlike", "weak", "weak", "match", "match"
    ]  # fmt: skip


def test_scans_like_those_of_the_gallery_are_rarely_called_weak() -> None:
    """The guarantee of a conformal test: at most 5 % of exchangeable queries, whatever the distribution."""
    generator = torch.Generator().manual_seed(0)
    scans = torch.nn.functional.normalize(torch.randn(1200, 8, generator=generator), dim=1)
    gallery, queries = scans[:600], scans[600:]
    table = pa.table({"id": [str(row) for row in range(600)]})
    calibration = Calibration.from_index(RetrievalIndex.build(gallery, table, ModelFacts("m", "r", "p")))
    best = (queries @ gallery.T).amax(1)
    weak = sum(calibration.level(value) != "match" for value in best.tolist()) / len(best)
    assert 0.02 < weak < 0.08


def test_a_gallery_too_small_for_a_test_has_no_weak_matches() -> None:
    calibration = Calibration.from_index(on_a_circle([0, 1, 2, 3]))
    assert calibration.level(-1.0) == "match"


def test_a_gallery_of_one_scan_can_be_calibrated() -> None:
    calibration = Calibration.from_index(on_a_circle([0]))
    assert (len(calibration.pairs), len(calibration.nearest)) == (0, 0)
    assert calibration.percentile(0.3) == 100
    assert calibration.level(0.3) == "match"


def test_a_large_gallery_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "SAMPLE", 10)
    calibration = Calibration.from_index(on_a_circle([float(angle) for angle in range(95)]))
    assert len(calibration.nearest) == 10
    assert len(calibration.pairs) == 45
    # of each sampled scan among all scans, not among the sample
    torch.testing.assert_close(calibration.nearest, cosines(*[1] * 10), atol=1e-3, rtol=0)
