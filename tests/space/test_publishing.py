"""`app.py --push_to_hub`: what arrives runs elsewhere, holds no pickle, and names nobody here."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import Hub
from served import small_gallery, small_phantom

from modeling_m3ret.model_facts import ModelFacts
from modeling_m3ret.search.index import RetrievalIndex
from modeling_m3ret.space import about, publishing
from modeling_m3ret.space.gallery import Gallery, embed_gallery
from modeling_m3ret.space.publishing import publishable, requirements, write_space


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a Space with a local gallery holds on the Hub."""
    pytest.importorskip("gradio", reason="the Space needs gradio: pip install m3ret[app]")
    folder = tmp_path_factory.mktemp("pushing")
    records = small_phantom(folder / "secret-ward")
    model, processor, _ = small_gallery(folder / "galleries", records[:1])
    model.save_pretrained(folder / "m3ret-tiny")
    processor.save_pretrained(folder / "m3ret-tiny")
    (folder / "m3ret-tiny" / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe card.")
    repository = hub.new_repository("space")
    command = [sys.executable, str(ROOT / "app.py"), "--gallery", "secret-ward", "--push_to_hub", repository]
    environment = hub.environment(folder) | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"/spaces/{repository}" in ran.stdout
    assert hub.is_private(repository, "space")
    return hub.files(repository, "space")


def test_the_header_is_one_for_a_space(files: dict[str, bytes]) -> None:
    import gradio

    _, header, text = files["README.md"].decode().split("---\n", 2)
    data = yaml.safe_load(header)
    assert (data["sdk"], data["sdk_version"], data["app_file"]) == ("gradio", gradio.__version__, "app.py")
    assert data["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert len(data["short_description"]) <= 60, "the Hub refuses more"
    assert "not for diagnosis" in text


def test_requirements_are_pinned_to_what_ran_here(files: dict[str, bytes]) -> None:
    lines = files["requirements.txt"].decode().split()
    assert lines == requirements()
    assert all("==" in line and "+" not in line for line in lines)
    assert f"torch=={torch.__version__.split('+')[0]}" in lines


def test_the_app_and_the_package_arrive_whole(files: dict[str, bytes]) -> None:
    assert files["app.py"] == (ROOT / "app.py").read_bytes()
    for path in (ROOT / "modeling_m3ret").rglob("*.py"):
        assert files[str(path.relative_to(ROOT))] == path.read_bytes()
    assert files["m3ret-space/README.md"].endswith(b"The card.")
    assert not [
        name for name in files if "__pycache__" in name or name.endswith((".pyc", ".pt", ".bin", ".pkl", ".faiss"))
    ]


def test_the_card_of_a_model_on_the_hub_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fetched.md").write_text("---\nlicense: mit\n---\nThe card.")
    cards = {("ORG/m3ret", "README.md"): tmp_path / "fetched.md"}
    monkeypatch.setattr(about, "hf_hub_download", lambda *asked: cards[asked])
    records = small_phantom(tmp_path / "p", subjects=2)
    model, processor, gallery = small_gallery(tmp_path / "galleries", records[:1])
    (tmp_path / "space").mkdir()
    write_space(tmp_path / "space", "title", ROOT / "app.py", model, processor, gallery, "ORG/m3ret")
    assert (tmp_path / "space" / "m3ret-space" / "README.md").read_text() == (tmp_path / "fetched.md").read_text()


def test_no_pixel_of_a_local_gallery_and_no_name_arrives(files: dict[str, bytes], hub: Hub) -> None:
    kept = {name for name in files if name.startswith("gallery/")}
    assert {Path(name).suffix for name in kept} == {".json", ".parquet", ".safetensors"}
    assert "gallery/thumbnails.parquet" not in kept
    assert json.loads(files["gallery/gallery.json"]) == {"collection": None}
    for name, content in files.items():
        for word in (b"secret-ward", b"subject-00", b"xray-00", str(ROOT).encode(), b"hf_home"):
            own_code = name.startswith("modeling_m3ret/") and word in (b"subject-00", b"xray-00")
            assert own_code or word not in content, (name, word)


def test_what_arrived_starts_and_finds(files: dict[str, bytes], hub: Hub, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    script = """
import sys
sys.path.insert(0, ".")
from transformers import AutoImageProcessor, AutoModel
import modeling_m3ret
from modeling_m3ret.space.gallery import open_gallery
from modeling_m3ret.space.quickstart import newest_checkpoint
from modeling_m3ret.space.searching import Searching
assert modeling_m3ret.__file__.startswith(sys.argv[1]), modeling_m3ret.__file__
name = newest_checkpoint()
model, processor = AutoModel.from_pretrained(name).eval(), AutoImageProcessor.from_pretrained(name)
searching = Searching(model, processor, open_gallery(None, model, processor, str(name)), readers=None)
print([hit["item"] for hit in searching.search(searching.query_of_row(0), 3)])
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


def test_names_of_anothers_index_become_numbers() -> None:
    table = pa.table({"id": ["smith-1", "smith-2", "doe-1"], "patient": ["smith", "smith", ""], "modality": ["ct"] * 3})
    index = RetrievalIndex.build(torch.eye(3), table, ModelFacts("m", "r", "p"))
    published = publishable(Gallery(index)).index.metadata
    assert published.column("id").to_pylist() == ["0", "1", "2"]
    one, two, unknown = published.column("patient").to_pylist()
    assert one == two != ""
    assert unknown == ""
    assert "smith" not in str(published.to_pydict())


def test_of_a_named_collection_its_own_scans_go_and_pictures_if_they_are_synthetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = small_phantom(tmp_path / "p")
    model, processor, _ = small_gallery(tmp_path / "galleries", records[:2])
    for source, pictures in (("phantom (synthetic)", True), ("a hospital", False)):
        named = [replace(record, source=source) for record in records[:3]]
        gallery = embed_gallery([*named, records[5]], model, processor, "m", "phantom:9", tmp_path / source)
        monkeypatch.setattr(publishing, "open_collection", lambda name, known=named: known)
        published = publishable(gallery)
        assert (len(published), published.collection) == (3, "phantom:9")
        assert (published.thumbnails is not None) == pictures
        published.save(tmp_path / f"saved {source}")
        assert (tmp_path / f"saved {source}" / "thumbnails.parquet").exists() == pictures
        if pictures:
            assert pq.read_table(tmp_path / f"saved {source}" / "thumbnails.parquet").num_rows == 3
