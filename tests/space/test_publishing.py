"""`app.py --push_to_hub`: the published Space runs, and contains no pickle file and no private data."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import Hub
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from space_server import small_gallery, small_phantom

from modeling_m3ret.data.collection import open_collection
from modeling_m3ret.hub import load_pretrained
from modeling_m3ret.model_facts import ModelFacts
from modeling_m3ret.reading_m3ret import FORMATS
from modeling_m3ret.search.index import RetrievalIndex


pytest.importorskip("gradio", reason="the Space needs gradio: pip install m3ret[app]")

from modeling_m3ret.space import pages
from modeling_m3ret.space.gallery import DEMO_FOLDER, Gallery, embed_gallery, open_gallery
from modeling_m3ret.space.publishing import EXTRAS, publishable, requirements, write_space
from modeling_m3ret.space.visible import SAMPLE_SOURCE


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CARD = "---\nlicense: apache-2.0\n---\nThe card."


@pytest.fixture(scope="module")
def files(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Push a Space with a local gallery, and return its files on the Hub."""
    folder = tmp_path_factory.mktemp("pushing")
    records = small_phantom(folder / "secret-ward")
    model, processor, _ = small_gallery(folder / "galleries", records[:1])
    model.save_pretrained(folder / "m3ret-tiny")
    processor.save_pretrained(folder / "m3ret-tiny")
    (folder / "m3ret-tiny" / "README.md").write_text(CARD)
    repo_id = hub.new_repository("space")
    command = [sys.executable, str(ROOT / "app.py"), "--model", "m3ret-tiny"]
    command += ["--gallery", "secret-ward", "--push_to_hub", repo_id]
    environment = hub.environment(folder) | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"/spaces/{repo_id}" in ran.stdout
    assert hub.is_private(repo_id, "space")
    return hub.files(repo_id, "space")


def test_the_readme_has_the_header_of_a_space(files: dict[str, bytes]) -> None:
    import gradio

    _, header, text = files["README.md"].decode().split("---\n", 2)
    data = yaml.safe_load(header)
    assert (data["sdk"], data["sdk_version"], data["app_file"]) == ("gradio", gradio.__version__, "app.py")
    assert data["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert len(data["short_description"]) <= 60, "the Hub refuses more"
    assert "{" not in text
    assert FORMATS in text


def test_requirements_are_pinned_to_the_installed_versions(files: dict[str, bytes]) -> None:
    lines = files["requirements.txt"].decode().split()
    assert lines == requirements()
    assert all("==" in line and "+" not in line for line in lines)
    assert f"torch=={torch.__version__.split('+')[0]}" in lines


def test_requirements_include_every_package_that_the_app_and_the_readers_import() -> None:
    """A reader imports the decoder of a format by name, so its packages are taken from the source code."""
    package, declared = ROOT / "modeling_m3ret", {canonicalize_name(Requirement(line).name) for line in requirements()}
    files = [
        *package.glob("*.py"),
        *(path for room in ("space", "search", "data") for path in (package / room).iterdir()),
    ]
    distributions, wanted = importlib.metadata.packages_distributions(), set()
    for path in (path for path in [*files, ROOT / "app.py"] if path.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                wanted.add(str(node.module))
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_decoder":
                wanted.add(ast.literal_eval(node.args[0]))
    modules = {name.split(".")[0] for name in wanted} & distributions.keys()
    assert {"SimpleITK", "h5py", "pillow_heif", "nibabel", "pydicom", "av"} <= modules
    transitive = {"m3ret", "gradio", "safetensors", "packaging", "pyyaml", "starlette", "uvicorn", "anyio", "jinja2"}
    transitive |= {"pandas", "pydantic", "pydantic-core"}  # of gradio
    not_needed = {"pymilvus", "onnx", "onnxruntime", "onnxscript"}  # for servers and exports
    missing = {canonicalize_name(distributions[name][0]) for name in modules} - declared - transitive - not_needed
    assert not missing


def test_requirements_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(line for name in EXTRAS for line in project["optional-dependencies"][name])]
    names = {Requirement(line).name for line in declared} - {"gradio"}
    if sys.platform == "linux":
        assert {Requirement(line).name for line in requirements()} == names


def test_a_decoder_that_is_not_installed_keeps_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without_simple_itk(name: str) -> str:
        if name == "SimpleITK":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_simple_itk)
    (line,) = [Requirement(line) for line in requirements() if line.startswith("SimpleITK")]
    assert {bound.operator for bound in line.specifier} == {">=", "<"}


def test_app_package_and_model_card_are_uploaded(files: dict[str, bytes]) -> None:
    assert files["app.py"] == (ROOT / "app.py").read_bytes()
    for path in (ROOT / "modeling_m3ret").rglob("*.py"):
        assert files[str(path.relative_to(ROOT))] == path.read_bytes()
    assert files["m3ret-space/README.md"].decode() == CARD
    unsafe = (".pyc", ".pt", ".bin", ".pkl", ".faiss")
    assert not [name for name in files if "__pycache__" in name or name.endswith(unsafe)]


def test_no_pixel_and_no_name_of_a_local_gallery_is_uploaded(files: dict[str, bytes]) -> None:
    gallery = {name for name in files if name.startswith("gallery/")}
    assert {Path(name).suffix for name in gallery} == {".json", ".parquet", ".safetensors"}
    assert "gallery/thumbnails.parquet" not in gallery
    assert json.loads(files["gallery/gallery.json"]) == {"collection": None, "show_labels": False}
    for name, content in files.items():
        for secret in (b"secret-ward", b"subject-00", b"xray-00", str(ROOT).encode(), b"hf_home"):
            is_source_code = name.startswith("modeling_m3ret/") and secret in (b"subject-00", b"xray-00")
            assert is_source_code or secret not in content, (name, secret)


def test_the_uploaded_files_start_and_search(files: dict[str, bytes], hub: Hub, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    script = """
import sys
from pathlib import Path
sys.path.insert(0, ".")
from transformers import AutoImageProcessor, AutoModel
import modeling_m3ret
from app import find_checkpoint
from modeling_m3ret.space.gallery import open_gallery
from modeling_m3ret.space.service import SearchService
assert modeling_m3ret.__file__.startswith(sys.argv[1]), modeling_m3ret.__file__
name = find_checkpoint(Path())
model, processor = AutoModel.from_pretrained(name).eval(), AutoImageProcessor.from_pretrained(name)
service = SearchService(model, processor, open_gallery(None, model, processor, str(name)), readers=None)
print([hit["item"] for hit in service.search(service.query_of_row(0), 3)])
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=tmp_path,
        env=hub.environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    index = RetrievalIndex.load(tmp_path / "gallery")
    expected = (index.embeddings.float() @ index.embeddings[0].float()).argsort(descending=True).tolist()
    assert json.loads(ran.stdout.splitlines()[-1]) == [row for row in expected if row != 0][:3]


def test_the_card_of_a_model_on_the_hub_is_included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "downloaded.md").write_text(CARD)
    cards = {("ORG/m3ret", "README.md"): tmp_path / "downloaded.md"}
    monkeypatch.setattr(pages, "hf_hub_download", lambda *asked: cards[asked])
    records = small_phantom(tmp_path / "p", subjects=2)
    model, processor, gallery = small_gallery(tmp_path / "galleries", records[:1])
    (tmp_path / "space").mkdir()
    write_space(tmp_path / "space", "title", ROOT / "app.py", model, processor, gallery, "ORG/m3ret")
    assert (tmp_path / "space" / "m3ret-space" / "README.md").read_text() == CARD


def test_names_in_an_index_are_not_published(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": ["smith-1", "smith-2", "doe-1"],
            "patient": ["smith", "smith", ""],
            "modality": ["ct", "ct", "smith"],
            "anatomy": ["chest", "smith", ""],
            "labels": [["nodule", "smith"], [], ["smith"]],
            "source": ["CT-RATE", "/data/smith", ""],
        }
    )
    index = RetrievalIndex.build(torch.eye(3), table, ModelFacts("m", "r", "p"))
    published = publishable(Gallery(index)).index.metadata
    assert published.column("id").to_pylist() == ["0", "1", "2"]
    one, two, unknown = published.column("patient").to_pylist()
    assert one == two != ""
    assert unknown == ""
    assert "smith" not in str(published.to_pydict())
    assert published.column("labels").to_pylist() == [["nodule"], [], []]
    assert published.column("source").to_pylist() == ["CT-RATE", "", ""]
    shown = publishable(Gallery(index, show_labels=True))
    assert shown.index.metadata.column("labels").to_pylist() == table.column("labels").to_pylist()
    shown.save(tmp_path)
    assert json.loads((tmp_path / "gallery.json").read_text())["show_labels"], "the Space shows them too"


@pytest.mark.parametrize(
    ("source", "collection", "has_thumbnails"),
    [
        ("phantom (synthetic)", "phantom:9", True),
        ("a hospital", "phantom:9", False),
        ("a hospital", DEMO_FOLDER, True),
    ],
)
def test_only_synthetic_and_demo_thumbnails_of_a_named_collection_are_published(
    source: str, collection: str, has_thumbnails: bool, tmp_path: Path
) -> None:
    records = small_phantom(tmp_path / "p")
    model, processor, _ = small_gallery(tmp_path / "galleries", records[:2])
    of_collection = [replace(record, source=source) for record in records[:3]]
    sample = replace(records[5], source=SAMPLE_SOURCE)  # of a package that the Space may not have
    gallery = embed_gallery([*of_collection, sample], model, processor, "m", collection, tmp_path / "embedded")
    published = publishable(gallery)
    assert (len(published), published.collection) == (3, collection)
    assert (published.thumbnails is not None) == has_thumbnails
    published.save(tmp_path / "saved")
    thumbnails = tmp_path / "saved" / "thumbnails.parquet"
    assert thumbnails.exists() == has_thumbnails
    if has_thumbnails:
        assert pq.read_table(thumbnails).num_rows == 3


def test_the_demo_gallery_is_published_with_its_scans(tmp_path: Path) -> None:
    model, processor, _ = small_gallery(tmp_path / "galleries", small_phantom(tmp_path / "p")[:1])
    gallery = open_gallery(None, model, processor, "m", project=ROOT)
    (tmp_path / "space").mkdir()
    write_space(tmp_path / "space", "title", ROOT / "app.py", model, processor, gallery, str(tmp_path))
    here, there = (
        {path.name: path.read_bytes() for path in (r / DEMO_FOLDER).iterdir()} for r in (ROOT, tmp_path / "space")
    )
    assert here == there
    with contextlib.chdir(tmp_path / "space"):
        opened = open_gallery(None, *load_pretrained("m3ret-space"), "m3ret-space")
    assert opened.records is not None
    assert len(opened) == len(opened.records) == len(open_collection(ROOT / DEMO_FOLDER))
    assert opened.thumbnail(0) is not None
