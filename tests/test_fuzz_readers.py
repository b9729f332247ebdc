"""Mutated files give a scan or an M3RetReadError, and valid files the values of reference readers; a small run."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from modeling_m3ret.reading_m3ret import read_scan


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "fuzz_readers.py"
    spec = importlib.util.spec_from_file_location("fuzz_readers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_readers"] = module  # worker processes import it by name
    spec.loader.exec_module(module)
    return module


def test_comparison_finds_wrong_values(fuzz: ModuleType) -> None:
    values = np.random.default_rng(0).integers(0, 4000, (1, 5, 8, 9)).astype(np.int16)
    scan = read_scan(values[0])
    assert fuzz.compare(scan, values) is None
    for other in (values[:, ::-1], values[..., ::-1], -values, values[:, :2], np.where(values > 2000, 0, values)):
        assert fuzz.compare(scan, other) is not None


@pytest.mark.slow
def test_small_run_finds_no_failure(fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(fuzz.__file__).parent))
    status = fuzz.main(["--cases", "300", "--seed", "1", "--output", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failures"] == []
    assert report["cases"] == 375
    assert status == 0


@pytest.mark.slow
def test_case_is_a_function_of_seed_and_number(fuzz: ModuleType) -> None:
    for index in range(60):
        assert fuzz.make_case(3, index).source == fuzz.make_case(3, index).source
