"""Test the package as a whole: cost of an import, direction of imports, examples and paths in the documentation."""

from __future__ import annotations

import ast
import doctest
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from modeling_m3ret import classification_m3ret, modeling_m3ret


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modeling_m3ret"
CHECKPOINT_CODE = sorted(path.stem for path in PACKAGE.glob("*_m3ret.py"))  # copied into every checkpoint
PAGES = [ROOT / "README.md", ROOT / "m3ret-vitt" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROOMS = ("phantom", "data", "search", "evaluation", "pretraining", "space")  # a room imports only those before it


@pytest.mark.slow
def test_import_loads_no_heavy_library() -> None:
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


@pytest.mark.parametrize("name", CHECKPOINT_CODE)
def test_checkpoint_code_imports_only_checkpoint_code(name: str) -> None:
    """transformers copies the files that `from .x import y` reaches into one folder; other imports would fail there."""
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module in CHECKPOINT_CODE
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            assert not [module for module in names if module.startswith("modeling_m3ret")]


def test_rooms_import_only_earlier_rooms() -> None:
    for position, room in enumerate(ROOMS):
        for path in (PACKAGE / room).rglob("*.py"):
            package = ("modeling_m3ret", *path.relative_to(PACKAGE).parent.parts)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level:
                    target = [*package[: len(package) - node.level + 1], *str(node.module or "").split(".")]
                    assert target[1] not in ROOMS[position + 1 :], f"{path.name} imports {'.'.join(target)}"


@pytest.mark.parametrize("module", [modeling_m3ret, classification_m3ret])
def test_docstring_examples_give_their_printed_output(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


def test_readme_names_the_ci_script_and_existing_files() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "bash .ci/run" in readme
    for word in readme.split():
        path = word.strip("`()[].,").split("](")[0]
        if path.startswith(("configs/", "dataset_scripts/", "modeling_m3ret/")) and "." in path:
            assert (ROOT / path).exists(), path


def anchors(markdown: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    without_code = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        if "://" not in link:
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link


def test_code_and_configurations_name_existing_pages() -> None:
    for folder in ("modeling_m3ret", "dataset_scripts", "benchmarks", "configs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".yaml", ".md"):
                for page in re.findall(r"(?<![\w/])docs/[\w-]+\.md", path.read_text()):
                    assert (ROOT / page).is_file(), f"{path} names {page}"
