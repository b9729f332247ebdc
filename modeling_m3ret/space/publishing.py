"""Publish app, model and index as a private Hugging Face Space: `app.py --push_to_hub ORG/SPACE`.

No pixel of a local gallery is uploaded, only its embeddings with what visitors may see (`visible.py`). A gallery with a
public name (the phantom, or a dataset on the Hub) is opened by that name on the Space. The demo gallery is uploaded.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import tempfile
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
from huggingface_hub import HfApi
from jinja2 import Template
from packaging.requirements import Requirement

from ..image_processing_m3ret import M3RetImageProcessor
from ..modeling_m3ret import M3RetModel
from ..phantom import SYNTHETIC_SOURCE
from ..reading_m3ret import FORMATS
from ..search.index import RetrievalIndex
from .gallery import DEMO_FOLDER, PUBLISHED, Gallery
from .pages import model_card
from .visible import SAMPLE_SOURCE, visible_columns


MODEL_FOLDER = "m3ret-space"  # app.py finds it as the newest m3ret-*
EXTRAS = ("app", "itk", "minc", "heif")  # what the app imports, and the decoders of all formats
PINNED_BY_README = "gradio"  # its version is in the header of the Space's README


def push_space(
    repo_id: str, app: Path, model: M3RetModel, processor: M3RetImageProcessor, gallery: Gallery, model_name: str
) -> str:
    """Upload the Space ORG/NAME, which is created as a private one, and return its address. See `write_space`."""
    api = HfApi()
    with tempfile.TemporaryDirectory(prefix="m3ret-space-") as folder:
        write_space(Path(folder), repo_id.split("/")[-1], app, model, processor, gallery, model_name)
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type="space",
            folder_path=folder,
            commit_message="Upload app, model and gallery",
            delete_patterns=[f"{PUBLISHED}/*", f"{MODEL_FOLDER}/*", "modeling_m3ret/*"],  # files of an older version
        )
    return f"{api.endpoint}/spaces/{repo_id}"


def write_space(
    folder: Path,
    title: str,
    app: Path,
    model: M3RetModel,
    processor: M3RetImageProcessor,
    gallery: Gallery,
    model_name: str,
) -> None:
    """Write the files of the Space to a folder. It runs the script `app` and shows the card of `model_name`."""
    package = Path(str(files("modeling_m3ret")))
    shutil.copy(app, folder / "app.py")
    shutil.copytree(package, folder / "modeling_m3ret", ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
    model.save_pretrained(folder / MODEL_FOLDER)
    processor.save_pretrained(folder / MODEL_FOLDER)
    if card := model_card(model_name):
        (folder / MODEL_FOLDER / "README.md").write_text(card, encoding="utf-8")
    published = publishable(gallery)
    published.save(folder / PUBLISHED)
    if published.collection == DEMO_FOLDER:  # its licences allow it
        shutil.copytree(app.parent / DEMO_FOLDER, folder / DEMO_FOLDER)
    template = Template((package / "space" / "folder" / "README.md").read_text(encoding="utf-8"))
    readme = template.render(
        title=title,
        gradio=importlib.metadata.version("gradio"),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        scans=f"{len(published):,} scans",
        formats=FORMATS,
        has_scans=published.collection is not None,
    )
    (folder / "README.md").write_text(readme + "\n", encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")


def requirements() -> list[str]:
    """Return the packages of the Space: the dependencies of this project with `EXTRAS`.

    They are pinned to the installed versions. The decoder of a format that is not installed here keeps its bounds.
    """
    lines = []
    for declared in map(Requirement, importlib.metadata.requires("m3ret") or ()):
        applies = declared.marker is None or any(declared.marker.evaluate({"extra": extra}) for extra in EXTRAS)
        if not applies or declared.name == PINNED_BY_README:
            continue
        extras = f"[{','.join(sorted(declared.extras))}]" if declared.extras else ""
        bounds = str(declared.specifier)
        with suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(declared.name).split("+")[0]  # without torch's build tag, e.g. +cpu
            bounds = f"=={version}"
        lines.append(f"{declared.name}{extras}{bounds}")
    return lines


def publishable(gallery: Gallery) -> Gallery:
    """Return the part of a gallery that may be uploaded.

    Of the demo and of a gallery with a public name these are the scans of that collection, with thumbnails if they are
    of the demo or synthetic. Of any other gallery it is the index, with ids and patients replaced by numbers.
    """
    index, thumbnails = gallery.index, None
    if gallery.collection is None:
        keys = pseudonyms(index.metadata)
    else:
        # without the samples of a package that the Space may not have
        sources = index.metadata.column("source").to_pylist()
        samples = {row for row, source in enumerate(sources) if source == SAMPLE_SOURCE}
        index = index.remove({index.metadata.column("id")[row].as_py() for row in samples})
        is_open = gallery.collection == DEMO_FOLDER or set(sources) <= {SYNTHETIC_SOURCE, SAMPLE_SOURCE}
        if gallery.thumbnails is not None and is_open:
            thumbnails = gallery.thumbnails.take(pa.array(sorted(set(range(len(sources))) - samples)))
        keys = {name: index.metadata.column(name).to_pylist() for name in ("id", "patient")}
    visible = visible_columns(index.metadata, gallery.show_labels)
    metadata = pa.table(keys | {name: visible.column(name) for name in visible.column_names})
    published = RetrievalIndex(index.embeddings, metadata, index.facts, index.approximate)
    return Gallery(published, None, thumbnails, gallery.collection, gallery.show_labels)


def pseudonyms(metadata: pa.Table) -> dict[str, list[str]]:
    """Return the columns id and patient as numbers in order of appearance, since an index may contain real names."""
    numbers: dict[str, str] = {"": ""}
    patients = [numbers.setdefault(name or "", str(len(numbers))) for name in metadata.column("patient").to_pylist()]
    return {"id": [str(row) for row in range(len(metadata))], "patient": patients}
