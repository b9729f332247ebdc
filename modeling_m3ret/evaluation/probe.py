"""Linear probe: how well a linear classifier of frozen embeddings predicts the labels of patients it has not seen.

Within each modality, every labelled scan is classified once, by multinomial logistic regression on the scans of other
patients (`FOLDS`-fold cross-validation over patients). The strength of the L2 penalty is chosen on the training
patients of each fold alone, again by cross-validation over patients. As in retrieval, a prediction is correct if the
scan has that label, and scans whose labels no other patient has are left out.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from ..data.collection import Record
from ..search.embedding import Embedded
from .protocols import split_labels


PROBE = "probe"  # name of the accuracy in the table
DEFINITION = (
    "accuracy of a linear probe of the embeddings, trained on other patients of the modality; chance is the best "
    "constant prediction"
)
FOLDS, INNER_FOLDS = 5, 3  # 5 is the default of scikit-learn; 3 to choose the penalty at half of the cost
# of the mean cross-entropy of standardised features, from strong to weak; 1 / (penalty * scans) is scikit-learn's C.
# From predicting the most frequent label to separating a few hundred training scans without error.
PENALTIES = (10.0, 1.0, 0.1, 0.01, 0.001)
Floats = NDArray[np.float64]


def probe_accuracy(embedded: Embedded) -> Tensor:
    """Return whether the label that a linear probe predicts for each scan is correct: float64 `(n,)`.

    It is NaN for scans without a label that another patient of the modality has, too.
    """
    correct = torch.full((len(embedded.records),), torch.nan, dtype=torch.float64)
    for indices, targets, groups in _modalities(embedded.records):
        features = embedded.embeddings[indices].double().numpy()
        predicted = _cross_validate(features, targets, groups)
        correct[indices] = torch.from_numpy((targets[np.arange(len(targets)), predicted] > 0).astype(np.float64))
    return correct


def constant_accuracy(records: Sequence[Record]) -> Tensor:
    """Return the same for the best constant prediction: the most frequent label of each modality."""
    correct = torch.full((len(records),), torch.nan, dtype=torch.float64)
    for indices, targets, _ in _modalities(records):
        has = targets > 0
        correct[indices] = torch.from_numpy(has[:, has.sum(0).argmax()].astype(np.float64))
    return correct


def _modalities(records: Sequence[Record]) -> list[tuple[list[int], Floats, list[str]]]:
    """Return for each modality the indices of the n scans to classify, their targets `(n, classes)` and groups.

    A class is a label that at least two patients have. The target of a scan is the uniform distribution over its own.
    """
    parts = []
    for modality in sorted({record.modality for record in records}):
        of_modality = [index for index, record in enumerate(records) if record.modality == modality]
        pairs = {(label, records[i].group) for i in of_modality for label in split_labels(records[i].label)}
        patients = Counter(label for label, _ in pairs)
        classes = sorted(label for label, count in patients.items() if count > 1)
        indices = [i for i in of_modality if set(split_labels(records[i].label)) & {*classes}]
        if indices:
            has = np.array([[name in split_labels(records[i].label) for name in classes] for i in indices], np.float64)
            parts.append((indices, has / has.sum(1, keepdims=True), [records[i].group for i in indices]))
    return parts


def assign_folds(targets: Floats, groups: Sequence[str], folds: int) -> NDArray[np.int64]:
    """Return the fold of each scan `(n,)`. All scans of a patient are in one, and each class is spread over the folds.

    Patients are dealt out in the order of their first label, then of a hash of their name. So two patients of a label
    are in different folds, unless one of them has an earlier label, too.
    """
    first: dict[str, int] = {}
    for group, label in zip(groups, (targets > 0).argmax(1).tolist(), strict=True):
        first[group] = min(label, first.get(group, label))
    order = sorted(first, key=lambda name: (first[name], hashlib.sha256(f"m3ret-probe:{name}".encode()).digest()))
    fold = {group: number % folds for number, group in enumerate(order)}
    return np.array([fold[group] for group in groups])


def _cross_validate(features: Floats, targets: Floats, groups: Sequence[str]) -> NDArray[np.int64]:
    """Return the class that is predicted for each scan by the probe that was trained on the other folds."""
    predicted = np.zeros(len(targets), dtype=np.int64)
    fold = assign_folds(targets, groups, FOLDS)
    for number in range(FOLDS):
        train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        if not (len(train) and len(test)):  # fewer patients than folds
            continue
        inner = assign_folds(targets[train], [groups[i] for i in train.tolist()], INNER_FOLDS)
        hits = np.zeros(len(PENALTIES))
        for held_out in range(INNER_FOLDS):
            fit, judge = train[inner != held_out], train[inner == held_out]
            if len(fit) and len(judge):
                guesses = predict(features[fit], targets[fit], features[judge], PENALTIES)
                hits += (targets[judge, guesses] > 0).sum(1)
        best = PENALTIES[: int(hits.argmax()) + 1]  # of equally good ones the strongest
        predicted[test] = predict(features[train], targets[train], features[test], best)[-1]
    return predicted


def predict(train: Floats, targets: Floats, test: Floats, penalties: Sequence[float]) -> NDArray[np.int64]:
    """Fit a probe to the scans `train (n, d)` with each penalty, from strong to weak, and classify `test (m, d)`.

    Features are standardised by mean and standard deviation of the training scans. The mean cross-entropy plus half
    the penalty times the squared weights, without the bias, is minimised by L-BFGS.

    Returns:
        The predicted classes `(penalties, m)`.
    """
    mean, deviation = train.mean(0), train.std(0)
    deviation[deviation <= 1e-6 * deviation.max()] = 1.0  # of constant features, as far as float32 can tell
    fitted, judged = (torch.from_numpy((features - mean) / deviation) for features in (train, test))
    if fitted.shape[1] > len(fitted):  # the weights are combinations of training scans
        axes = torch.linalg.svd(fitted, full_matrices=False).Vh
        fitted, judged = fitted @ axes.T, judged @ axes.T
    present = np.flatnonzero(targets.sum(0))
    wanted, (n, d), classes = torch.from_numpy(targets[:, present]), fitted.shape, len(present)

    def linear(flat: Floats) -> tuple[Tensor, Tensor]:
        weights = torch.from_numpy(flat)
        return weights[: d * classes].view(d, classes), weights[d * classes :]

    solution, answers = np.zeros((d + 1) * classes), []
    for penalty in penalties:

        def loss(flat: Floats, penalty: float = penalty) -> tuple[float, Floats]:
            weights, bias = linear(flat)
            log_probability = (fitted @ weights + bias).log_softmax(1)
            error = (log_probability.exp() - wanted) / n
            gradient = torch.cat([(fitted.T @ error + penalty * weights).flatten(), error.sum(0)])
            value = -(wanted * log_probability).sum() / n + penalty / 2 * weights.square().sum()
            return float(value), gradient.numpy()

        # starting at the solution of a stronger penalty
        solution = minimize(loss, solution, jac=True, method="L-BFGS-B", options={"gtol": 1e-5, "maxiter": 1000}).x
        weights, bias = linear(solution)
        answers.append(present[(judged @ weights + bias).argmax(1).numpy()])
    return np.stack(answers)
