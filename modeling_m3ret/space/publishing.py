"""`app.py --push_to_hub ORG/SPACE`: app, model and index as a Hugging Face Space, private until its owner decides.

No pixel of a local gallery leaves the machine: of it the embeddings go, with modality, anatomy, labels and source. A
gallery that can be opened elsewhere by its name (the phantom, a data set on the Hub) is opened there.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
from huggingface_hub import HfApi
from jinja2 import Template

from ..data.collection import open_collection
from ..image_processing_m3ret import M3RetImageProcessor
from ..modeling_m3ret import M3RetModel
from ..phantom import SYNTHETIC_SOURCE
from ..search.index import RetrievalIndex
from .about import card_of
from .gallery import PUBLISHED, Gallery


MODEL_FOLDER = "m3ret-space"  # found by app.py as the newest checkpoint
# what the app imports, directly or for a format; the Space runs the versions that ran here
REQUIREMENTS = (
    "torch", "transformers", "accelerate", "datasets", "huggingface-hub", "faiss-cpu", "numpy", "scipy", "pyarrow",
    "pillow", "nibabel", "pydicom", "python-gdcm", "decord", "av", "tqdm", "safetensors", "filelock", "pebble",
)  # fmt: skip


def push_space(
    repository: str, app: Path, model: M3RetModel, processor: M3RetImageProcessor, gallery: Gallery, model_name: str
) -> str:
    """Upload the Space; its address.

    Args:
        repository: ORG/NAME, made private if it does not exist. app: the script that runs there.
        model_name: folder or Hub id, whose card goes along.
    """
    api = HfApi()
    with tempfile.TemporaryDirectory(prefix="m3ret-space-") as folder:
        write_space(Path(folder), repository.split("/")[-1], app, model, processor, gallery, model_name)
        api.create_repo(repository, repo_type="space", space_sdk="gradio", private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            repo_type="space",
            folder_path=folder,
            commit_message="The app, its model and its gallery",
            delete_patterns=[f"{PUBLISHED}/*", f"{MODEL_FOLDER}/*", "modeling_m3ret/*"],  # of an older version
        )
    return f"{api.endpoint}/spaces/{repository}"


def write_space(
    folder: Path,
    title: str,
    app: Path,
    model: M3RetModel,
    processor: M3RetImageProcessor,
    gallery: Gallery,
    model_name: str,
) -> None:
    """The folder of the Space, as it is uploaded."""
    package = Path(str(files("modeling_m3ret")))
    shutil.copy(app, folder / "app.py")
    shutil.copytree(package, folder / "modeling_m3ret", ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
    model.save_pretrained(folder / MODEL_FOLDER)
    processor.save_pretrained(folder / MODEL_FOLDER)
    if card := card_of(model_name):
        (folder / MODEL_FOLDER / "README.md").write_text(card, encoding="utf-8")
    published = publishable(gallery)
    published.save(folder / PUBLISHED)
    template = Template((package / "space" / "folder" / "README.md").read_text(encoding="utf-8"))
    pictures = "Its scans are made or fetched when the Space starts." if published.collection else "No picture either."
    (folder / "README.md").write_text(
        template.render(
            title=title,
            gradio=importlib.metadata.version("gradio"),
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
            scans=f"{len(published):,} scans",
            pictures=pictures,
        )
        + "\n",
        encoding="utf-8",
    )
    (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")


def requirements() -> list[str]:
    """What is installed here of `REQUIREMENTS`, each with its version; Gradio's stands in the README's header."""
    pinned = []
    for name in REQUIREMENTS:
        try:
            version = importlib.metadata.version(name).split("+")[0]  # a build of torch for one kind of machine
        except importlib.metadata.PackageNotFoundError:
            continue
        pinned.append(f"{name}=={version}")
    return pinned


def publishable(gallery: Gallery) -> Gallery:
    """What may leave: of a named collection its own rows, with pictures where they are synthetic; else the index alone,
    its ids and patients numbered anew."""
    metadata = gallery.index.metadata
    sources = metadata.column("source").to_pylist()
    if gallery.collection is None:
        index = gallery.index
        return Gallery(RetrievalIndex(index.embeddings, numbered(metadata), index.facts, index.approximate))
    known = len(open_collection(gallery.collection))
    ids = metadata.column("id").to_pylist()
    beyond = {id for id in ids if int(id) >= known}  # the samples of a package that the Space may not have
    index = gallery.index.remove(beyond)
    thumbnails = None
    if gallery.thumbnails is not None and all(
        s == SYNTHETIC_SOURCE for s, id in zip(sources, ids, strict=True) if id not in beyond
    ):
        kept = [place for place, id in enumerate(ids) if id not in beyond]
        thumbnails = gallery.thumbnails.take(pa.array(kept))
    return Gallery(index, None, thumbnails, gallery.collection)


def numbered(metadata: pa.Table) -> pa.Table:
    """Ids and patients as numbers in order of appearance: whoever made the index may have used names."""
    numbers: dict[str, str] = {"": ""}
    patients = [numbers.setdefault(name or "", str(len(numbers))) for name in metadata.column("patient").to_pylist()]
    columns = {name: metadata.column(name) for name in metadata.column_names}
    return pa.table(columns | {"id": [str(row) for row in range(len(metadata))], "patient": patients})
