"""The metric for the `evaluate` library: loaded offline from its folder, it returns the scores of the package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_m3ret.evaluation.metrics import METRICS, score_queries


ROOT = Path(__file__).parents[1]
NAN = float("nan")

SIMILARITY = [[NAN, 0.9, 0.2, 0.2], [0.9, NAN, 0.1, 0.5], [0.2, 0.1, NAN, 0.3], [0.2, 0.5, 0.3, NAN]]
RELEVANT = [[True, False, True, True], [False, True, True, False], [True, True, True, False], [False] * 3 + [True]]
INPUTS: dict[str, tuple[Any, Any]] = {
    "lists": ([["a", "b", "a"], ["b", "a", "a"], ["b"]], ["a", "a", "c"]),
    "unequal lists": ([["b", "a", "c|b"], [], ["a", "c|a"]], ["b|x", "a", "c"]),
    "numerals": ([["1", "2"]], ["2"]),
    "similarities": (SIMILARITY, RELEVANT),
    "nothing relevant": ([["b"]], ["a"]),
    "unequal rows": ([[0.5, 0.1]], [[True]]),
}


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Compute the metric on INPUTS and run the examples of its docstring, in a process with a fresh cache.

    The library takes seconds to import, and it copies the module into its cache.
    """
    code = """
import doctest, json, sys
import evaluate
metric = evaluate.load("./metrics/m3ret_retrieval")
answers = {}
for name, (predictions, references) in json.load(sys.stdin).items():
    try:
        answers[name] = metric.compute(predictions=predictions, references=references)
    except ValueError as error:
        answers[name] = {"error": type(error).__name__, "message": str(error)}
example = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, "module", None, 0)
failed, attempted = doctest.DocTestRunner().run(example, out=sys.stderr.write)
print(json.dumps({**answers, "examples": [failed, attempted]}))
"""
    settings = {"HF_HOME": str(tmp_path_factory.mktemp("hf_home")), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | settings | {"PYTHONPATH": str(ROOT)},
        input=json.dumps(INPUTS),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.slow
def test_similarities_get_the_scores_of_the_package(computed: dict[str, Any]) -> None:
    similarity = torch.tensor(SIMILARITY)
    expected = score_queries(similarity.nan_to_num(nan=-1), torch.tensor(RELEVANT), ~similarity.isnan())
    assert computed["similarities"].pop("queries") == len(expected.scores) == 3
    assert computed["similarities"].pop("chance mAP") == pytest.approx(
        float(expected.chance[:, METRICS.index("mAP")].mean())
    )
    means = expected.scores.mean(0).tolist()
    assert computed["similarities"] == pytest.approx(dict(zip(METRICS, means, strict=True)))


@pytest.mark.slow
def test_lists_of_labels_are_scored_as_rankings(computed: dict[str, Any]) -> None:
    scores = computed["lists"]
    # the third query has no relevant item
    assert scores["queries"] == 2
    assert scores["mAP"] == pytest.approx(((1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 2)
    assert (scores["MRR"], scores["P@1"], scores["P@5"]) == pytest.approx((3 / 4, 1 / 2, 2 / 5))
    assert scores["macro mAP"] == scores["mAP"]
    assert computed["numerals"]["MRR"] == 1 / 2


@pytest.mark.slow
def test_a_shared_label_is_relevant_in_lists_of_different_lengths(computed: dict[str, Any]) -> None:
    scores = computed["unequal lists"]
    assert scores["queries"] == 2
    first, third = (1 + 2 / 3) / 2, 1 / 2
    assert scores["mAP"] == pytest.approx((first + third) / 2)
    # the first query has the classes b and x, the third has c
    assert scores["macro mAP"] == pytest.approx((2 * first + third) / 3)


@pytest.mark.slow
def test_inputs_that_cannot_be_scored_are_refused(computed: dict[str, Any]) -> None:
    assert computed["nothing relevant"]["error"] == "ValueError"
    assert computed["unequal rows"]["error"] == "ValueError"
    assert "[1, 2]" in computed["unequal rows"]["message"]  # the lengths of the rows


@pytest.mark.slow
def test_docstring_examples_give_their_results(computed: dict[str, Any]) -> None:
    failed, attempted = computed["examples"]
    assert attempted > 5
    assert failed == 0


def test_the_package_does_not_import_evaluate_or_sklearn() -> None:
    for path in (ROOT / "modeling_m3ret").rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (evaluate|sklearn)\b", code, re.MULTILINE), path.name
