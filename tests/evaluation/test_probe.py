"""The linear probe against scikit-learn, its folds, and its place in the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from modeling_m3ret.data.collection import Record
from modeling_m3ret.evaluation.probe import (
    FOLDS,
    INNER_FOLDS,
    PENALTIES,
    PROBE,
    assign_folds,
    predict,
    probe_accuracy,
)
from modeling_m3ret.evaluation.protocols import ACROSS_BY_ANATOMY, WITHIN_MODALITY, Annotations
from modeling_m3ret.evaluation.table import all_differences, evaluate, format_table, to_json
from modeling_m3ret.search.embedding import Embedded


def make_embedded(
    patients: int = 30, scans: int = 2, labels: int = 3, modalities: tuple[str, ...] = ("ct",), spread: float = 0.7
) -> Embedded:
    """Return scans whose embeddings are loosely clustered by label, of several scans per patient."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(len(modalities), labels, 12))
    records, vectors = [], []
    for number in range(patients * scans):
        patient, which = number // scans, number % len(modalities)
        label = patient % labels
        name = f"{number}"
        records.append(Record(name, Path(name), modalities[which], "chest", f"l{label}", f"p{patient}"))
        vectors.append(centres[which, label] * spread + random.normal(size=12))
    return Embedded(torch.nn.functional.normalize(torch.tensor(np.array(vectors)).float(), dim=1), records)


def reference(train: np.ndarray, classes: np.ndarray, test: np.ndarray, penalty: float) -> np.ndarray:
    """Return the classes that scikit-learn predicts."""
    model = LogisticRegression(C=1 / (penalty * len(train)), tol=1e-6, max_iter=1000)
    with threadpool_limits(1):  # on a busy machine, threads slow small problems down by spinning
        return make_pipeline(StandardScaler(), model).fit(train, classes).predict(test)


@pytest.mark.parametrize("width", [8, 200])
def test_predictions_equal_those_of_scikit_learn(width: int) -> None:
    random = np.random.default_rng(0)
    classes = random.integers(0, 4, 60)
    centres = random.normal(size=(5, width))
    train, test = (centres[c] + 2 * random.normal(size=(len(c), width)) for c in (classes, random.integers(0, 5, 200)))
    train[:, 3] = test[:, 3] = 0.1  # a constant feature
    got = predict(train, np.eye(5)[classes], test, PENALTIES)  # class 4 is not in training
    assert got.shape == (len(PENALTIES), 200)
    for predicted, penalty in zip(got, PENALTIES, strict=True):
        assert (predicted == reference(train, classes, test, penalty)).mean() >= 0.99


def test_accuracy_equals_a_nested_cross_validation_with_scikit_learn() -> None:
    embedded = make_embedded()
    classes = np.array([int(record.label[1:]) for record in embedded.records])
    groups, features = [record.group for record in embedded.records], embedded.embeddings.double().numpy()
    correct, chosen = np.zeros(len(classes)), set()
    fold = assign_folds(np.eye(3)[classes], groups, FOLDS)
    for number in range(FOLDS):
        train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        inner = assign_folds(np.eye(3)[classes[train]], [groups[i] for i in train], INNER_FOLDS)
        hits = []
        for penalty in PENALTIES:
            parts = [(train[inner != n], train[inner == n]) for n in range(INNER_FOLDS)]
            guesses = [reference(features[fit], classes[fit], features[judge], penalty) for fit, judge in parts]
            hits.append(sum((guess == classes[judge]).sum() for guess, (_, judge) in zip(guesses, parts, strict=True)))
        penalty = PENALTIES[int(np.argmax(hits))]
        chosen.add(penalty)
        correct[test] = reference(features[train], classes[train], features[test], penalty) == classes[test]
    assert 0.5 < correct.mean() < 1
    assert len(chosen) > 1
    assert float(probe_accuracy(embedded).mean()) == pytest.approx(correct.mean(), abs=0.02)


def test_folds_separate_patients_and_spread_every_class() -> None:
    classes = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    groups = ["a", "a", "b", "b", "c", "d", "e", "f", "g", "h"]
    fold = assign_folds(np.eye(3)[classes], groups, 3)
    for number in range(3):
        train, test = fold != number, fold == number
        assert not {*np.array(groups)[train]} & {*np.array(groups)[test]}
        assert {*classes[train]} == {0, 1, 2}
    order = np.random.default_rng(0).permutation(10)
    again = assign_folds(np.eye(3)[classes[order]], [groups[i] for i in order], 3)
    assert (again == fold[order]).all()


def test_recognising_the_patient_does_not_help() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(40, 64)).repeat(5, axis=0) + 0.01 * random.normal(size=(200, 64))
    labels = random.integers(0, 2, 40).repeat(5)
    records = [Record(str(n), Path(str(n)), "ct", "", f"l{labels[n]}", f"p{n // 5}") for n in range(200)]
    accuracy = float(probe_accuracy(Embedded(torch.tensor(vectors).float(), records)).mean())
    assert 0.3 < accuracy < 0.7  # splits that ignore patients give 1


def test_scans_are_left_out_where_retrieval_leaves_them_out() -> None:
    embedded = make_embedded(patients=20)
    records = list(embedded.records)
    records[0] = replace(records[0], label="")
    records[2] = replace(records[2], label="only in this patient")
    records[4] = replace(records[4], label="l0|only here")
    records[6] = replace(records[6], modality="mri")
    changed = Embedded(embedded.embeddings, records)
    accuracy = probe_accuracy(changed)
    relevant, candidate = WITHIN_MODALITY.masks(Annotations(records), torch.arange(len(records)))
    assert torch.equal(accuracy.isfinite(), (relevant & candidate).any(1))
    assert accuracy.isnan().nonzero().flatten().tolist() == [0, 2, 6]


def test_any_label_of_a_scan_is_correct() -> None:
    """Half of the scans have a second label that their embedding does not show: predicting the first is correct."""
    embedded = make_embedded(patients=40, labels=2, spread=3.0)
    records = [
        replace(record, label=record.label + ("|both" if number % 4 < 2 else ""))
        for number, record in enumerate(embedded.records)
    ]
    assert float(probe_accuracy(Embedded(embedded.embeddings, records)).mean()) >= 0.95


def test_probe_joins_the_rows_of_classification_within_a_modality() -> None:
    good = make_embedded(patients=40, modalities=("ct", "xray"), spread=0.5)
    bad = Embedded(torch.randn(80, 12), good.records)
    methods = {"pixels": bad, "trained": good}
    probes = {name: probe_accuracy(method) for name, method in methods.items()}
    rows = evaluate(methods, (WITHIN_MODALITY, ACROSS_BY_ANATOMY), probes=probes)
    by_name = {(row.protocol, row.method): row for row in rows}
    assert {row.protocol for row in rows if PROBE in row.scores} == {"ct", "xray", "all modalities"}
    for modality in ("ct", "xray"):
        of_modality = torch.tensor([record.modality == modality for record in good.records])
        accuracy = float(probes["trained"][of_modality].mean())
        row = by_name[modality, "trained"]
        assert row.scores[PROBE] == pytest.approx(accuracy)
        assert row.probe_interval is not None
        assert row.probe_interval[0] < accuracy < row.probe_interval[1] <= 1
        # one scan per patient and modality: the jackknife is the standard error of a mean
        error = float(probes["trained"][of_modality].std() / 40**0.5)
        assert row.probe_interval[0] == pytest.approx(accuracy - 1.96 * error, abs=1e-6)
        labels = [record.label for record in good.records if record.modality == modality]
        assert by_name[modality, "chance"].scores[PROBE] == max(map(labels.count, labels)) / len(labels)
    mean = (by_name["ct", "trained"].scores[PROBE] + by_name["xray", "trained"].scores[PROBE]) / 2
    assert by_name["all modalities", "trained"].scores[PROBE] == pytest.approx(mean)
    difference = all_differences("trained", rows, PROBE)["all modalities"]["pixels"]
    assert difference.interval[0] > 0
    assert "probe" in format_table(rows).splitlines()[0]
    stored = json.loads(to_json(rows))
    assert PROBE in stored["metrics"]
    assert any(PROBE in row["scores"] and row["probe_interval"] for row in stored["rows"])

    without = evaluate(methods, (WITHIN_MODALITY,))
    assert "probe" not in format_table(without)
    assert [row.interval for row in without] == [row.interval for row in rows if row.protocol != "across modalities"]


def test_equal_embeddings_predict_a_constant() -> None:
    records = make_embedded(patients=20).records
    assert 0 < float(probe_accuracy(Embedded(torch.ones(40, 12), records)).mean()) < 0.5
