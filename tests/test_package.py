"""The package as a whole: what an import costs, which way imports point, and that what the texts say is so."""

from __future__ import annotations

import ast
import doctest
import json
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_m3ret import modeling_m3ret


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modeling_m3ret"
TRAVELLING = sorted(path.stem for path in PACKAGE.glob("*_m3ret.py"))


def test_importing_loads_no_heavy_reader() -> None:
    code = """
import json, sys
from transformers import PreTrainedModel, BaseImageProcessor
before = set(sys.modules)
import modeling_m3ret
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(ran.stdout)}
    assert "modeling_m3ret" in loaded
    assert not loaded & {"decord", "nibabel", "pydicom", "av", "gdcm", "scipy", "datasets", "faiss", "evaluate"}


@pytest.mark.parametrize("name", TRAVELLING)
def test_travelling_files_import_nothing_of_the_rest(name: str) -> None:
    """transformers copies what `from .x import y` at module level reaches, flat; anything else would be missing."""
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module in TRAVELLING
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            assert not [module for module in names if module.startswith("modeling_m3ret")]


def test_rooms_point_one_way() -> None:
    """A room imports only rooms that stand before it in this order."""
    order = ("phantom", "data", "search", "evaluation", "pretraining", "space")
    for position, room in enumerate(order):
        for path in (PACKAGE / room).rglob("*.py"):
            package = ("modeling_m3ret", *path.relative_to(PACKAGE).parent.parts)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level:
                    target = [*package[: len(package) - node.level + 1], *str(node.module or "").split(".")]
                    assert target[1] not in order[position + 1 :], f"{path.name} imports {'.'.join(target)}"


def test_examples_in_docstrings_print_what_they_say() -> None:
    results = doctest.testmod(modeling_m3ret)
    assert results.attempted > 0
    assert results.failed == 0


def test_ci_runs_what_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "bash .ci/run" in readme
    for word in readme.split():
        name = word.strip("`()[].,").split("](")[0]
        if name.startswith(("configs/", "dataset_scripts/", "modeling_m3ret/")) and "." in name:
            assert (ROOT / name).exists(), f"the README names {name}"
