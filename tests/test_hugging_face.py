"""Libraries of the Hugging Face ecosystem with a checkpoint folder: pipelines and sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from remote_code import run_new_process
from scan_files import CT, dicom, dicom_bytes, nifti_bytes, series
from transformers import (
    AutoModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTImageProcessor,
    pipeline,
)
from transformers.pipelines import ImageClassificationPipeline, ImageFeatureExtractionPipeline

from modeling_m3ret import M3RetForImageClassification, M3RetImageProcessor, M3RetModel


TASK = "image-feature-extraction"
LABELS = {0: "normal", 1: "effusion", 2: "nodule"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return seven scans of different sizes in six formats: DICOM, series, NIfTI, PNG (8 and 16 bits), JPEG, NPY."""
    folder, random = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    volume = random.integers(-900, 900, (30, 40, 9)).astype(np.int16)
    (folder / "one.dcm").write_bytes(dicom_bytes(dicom(random.integers(0, 4000, (50, 60)).astype(np.uint16))))
    (folder / "series").mkdir()
    for number, one in enumerate(
        series(volume, np.diag([2.0, 2.0, 3.0, 1.0]), sop=CT, RescaleSlope=1, RescaleIntercept=0)
    ):
        (folder / "series" / f"{number}.dcm").write_bytes(dicom_bytes(one))
    (folder / "volume.nii.gz").write_bytes(nifti_bytes(volume, np.diag([2.0, 2.0, 3.0, 1.0]), zipped=True))
    Image.fromarray(random.integers(0, 255, (60, 80), dtype=np.uint8)).save(folder / "eight.png")
    Image.fromarray(random.integers(0, 65535, (40, 90)).astype(np.uint16)).save(folder / "sixteen.png")
    Image.fromarray(random.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(folder / "colour.jpg")
    np.save(folder / "clip.npy", random.integers(0, 255, (12, 32, 48, 3), dtype=np.uint8))
    names = ["one.dcm", "series", "volume.nii.gz", "eight.png", "sixteen.png", "colour.jpg", "clip.npy"]
    return [str(folder / name) for name in names]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model whose whitening is fitted, and its image processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = M3RetModel(tiny_config(pooling="statistics"))
    model.whitening.fit(torch.randn(200, model.config.pooled_size))
    model.save_pretrained(folder)
    M3RetImageProcessor(size=64, num_frames=8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny classifier of three labels, and its image processor."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    model = M3RetForImageClassification(tiny_config(pooling="statistics", id2label=LABELS))
    model.m3ret.whitening.fit(torch.randn(200, model.config.pooled_size))
    torch.nn.init.normal_(model.classifier.weight, std=0.3)  # so that scores of scans differ
    model.save_pretrained(folder)
    M3RetImageProcessor(size=64, num_frames=8).save_pretrained(folder)
    return folder


@torch.no_grad()
def score_alone(checkpoint: Path, files: list[str]) -> list[dict[str, float]]:
    """Return the probability of each label of each file, one at a time, without pipelines."""
    model = M3RetForImageClassification.from_pretrained(checkpoint).eval()
    processor = M3RetImageProcessor.from_pretrained(checkpoint)
    rows = [model(**processor(file)).logits[0].softmax(-1).tolist() for file in files]
    return [dict(zip(LABELS.values(), row, strict=True)) for row in rows]


def as_scores(results: list[list[dict]]) -> list[dict[str, float]]:
    return [{each["label"]: each["score"] for each in result} for result in results]


def assert_equal_scores(results: list[list[dict]], expected: list[dict[str, float]]) -> None:
    for got, wanted in zip(as_scores(results), expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-5)


@torch.no_grad()
def read_alone(checkpoint: Path, files: list[str]) -> tuple[list[np.ndarray], np.ndarray]:
    """Return tokens and embedding of each file, one at a time, without pipelines."""
    model, processor = AutoModel.from_pretrained(checkpoint).eval(), M3RetImageProcessor.from_pretrained(checkpoint)
    inputs = [processor(file) for file in files]
    tokens = [model(**each).last_hidden_state.numpy() for each in inputs]
    return tokens, torch.cat([model.embed_scans(**each) for each in inputs]).numpy()


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_pipeline_gives_each_file_its_own_features(checkpoint: Path, files: list[str], batch_size: int) -> None:
    extract = pipeline(TASK, model=str(checkpoint))
    tokens, embeddings = read_alone(checkpoint, files)
    for got, expected in zip(extract(files, batch_size=batch_size), tokens, strict=True):
        np.testing.assert_allclose(np.array(got), expected, atol=1e-5)
    np.testing.assert_allclose(np.array(extract(files, batch_size=batch_size, pool=True)), embeddings, atol=1e-5)


def test_pipeline_of_one_scan_returns_a_list_of_one(checkpoint: Path, files: list[str]) -> None:
    extract = pipeline(TASK, model=str(checkpoint))
    tokens, embeddings = read_alone(checkpoint, files[:1])
    np.testing.assert_allclose(np.array(extract(files[0])), tokens[0][None], atol=1e-5)
    pooled = extract(files[0], pool=True, return_tensors=True)
    assert pooled.shape == (1, 48)
    np.testing.assert_allclose(pooled.numpy(), embeddings, atol=1e-5)
    array = np.load(files[-1])
    np.testing.assert_allclose(np.array(extract(array)), np.array(extract(files[-1])), atol=1e-5)
    slices = [path.read_bytes() for path in Path(files[1]).iterdir()]
    np.testing.assert_allclose(np.array(extract([slices])[0]), np.array(extract(files[1])[0]), atol=1e-5)
    stream = extract((file for file in files[:2]), pool=True)
    np.testing.assert_allclose(np.array(list(stream)), read_alone(checkpoint, files[:2])[1], atol=1e-5)


def test_pipeline_reads_all_16_bits(checkpoint: Path, tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray((ramp / 257).round().astype(np.uint8)).save(tmp_path / "8.png")
    extract = pipeline(TASK, model=str(checkpoint))
    pooled = [
        AutoModel.from_pretrained(checkpoint)(**M3RetImageProcessor(size=64)(str(tmp_path / name))).pooler_output
        for name in ("16.png", "8.png")
    ]
    assert torch.allclose(*pooled, atol=0.01)
    sixteen, eight = extract([str(tmp_path / "16.png"), str(tmp_path / "8.png")])
    assert np.abs(np.array(sixteen) - np.array(eight)).max() < 0.05


def test_pipeline_with_the_package_asks_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked whether to run remote code"))
    extract = pipeline(TASK, model=str(checkpoint))
    assert type(extract).__module__ == "modeling_m3ret.pipeline_m3ret"
    assert type(extract.model) is M3RetModel


def test_pipeline_of_other_models_is_the_standard_one() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    extract = pipeline(TASK, model=Dinov2Model(Dinov2Config(**sizes)), image_processor=ViTImageProcessor(size=28))
    assert type(extract) is ImageFeatureExtractionPipeline
    assert np.shape(extract(Image.new("RGB", (28, 28)))) == (1, 5, 32)


def test_saved_pipeline_loads(checkpoint: Path, files: list[str], tmp_path: Path) -> None:
    extract = pipeline(TASK, model=str(checkpoint))
    extract.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).keys() >= {"custom_pipelines", "auto_map"}
    assert pipeline(TASK, model=str(tmp_path))(files[0]) == extract(files[0])


def test_saving_with_push_to_hub_pushes_all_files(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = {}
    model = AutoModel.from_pretrained(checkpoint)
    monkeypatch.setattr(
        M3RetModel, "push_to_hub", lambda self, repo_id, **options: pushed.update(options, name=repo_id)
    )
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="org/name", private=True)
    assert pushed == {"name": "org/name", "private": True}
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "pipeline_m3ret.py",
    }


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_classification_pipeline_scores_each_file(classifier: Path, files: list[str], batch_size: int) -> None:
    classify = pipeline("image-classification", model=str(classifier))
    expected = score_alone(classifier, files)
    assert_equal_scores(classify(files, batch_size=batch_size), expected)
    assert len({round(each["normal"], 3) for each in expected}) > 3  # scans differ
    best = classify(files, batch_size=batch_size, top_k=1)
    assert [each[0]["label"] for each in best] == [max(each, key=each.__getitem__) for each in expected]


def test_classification_pipeline_of_one_scan(
    classifier: Path, files: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked whether to run remote code"))
    classify = pipeline("image-classification", model=str(classifier))
    assert type(classify).__module__ == "modeling_m3ret.pipeline_m3ret"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert_equal_scores([classify(files[2])], score_alone(classifier, files[2:3]))
    assert_equal_scores([classify(np.load(files[-1]))], score_alone(classifier, files[-1:]))
    small = {"image_processor_kwargs": {"size": 32}}
    assert as_scores([classify(files[3], **small)]) != as_scores([classify(files[3])])


def test_classification_pipeline_of_other_models_is_the_standard_one() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = Dinov2ForImageClassification(Dinov2Config(**sizes, num_labels=3))
    classify = pipeline("image-classification", model=model, image_processor=ViTImageProcessor(size=28))
    assert type(classify) is ImageClassificationPipeline
    assert len(classify(Image.new("RGB", (28, 28)))) == 3


def test_saved_classification_pipeline_loads(classifier: Path, files: list[str], tmp_path: Path) -> None:
    classify = pipeline("image-classification", model=str(classifier))
    classify.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["custom_pipelines"].keys() == {"image-classification"}
    assert pipeline("image-classification", model=str(tmp_path))(files[0]) == classify(files[0])


def test_classification_pipeline_refuses_an_encoder_until_its_head_is_trained(checkpoint: Path) -> None:
    # transformers itself would give the scores of a random head, after a warning
    with pytest.raises(ValueError, match="has no classification head"):
        pipeline("image-classification", model=str(checkpoint))
    model = M3RetForImageClassification.from_pretrained(checkpoint, id2label=LABELS)
    parts = {"model": model, "image_processor": M3RetImageProcessor(size=32)}
    with pytest.raises(ValueError, match="has no classification head"):
        pipeline("image-classification", **parts)
    model(torch.rand(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
    torch.optim.SGD(model.classifier.parameters(), lr=0.1).step()
    assert len(pipeline("image-classification", **parts)(np.zeros((32, 32), dtype=np.uint8))) == len(LABELS)


@pytest.mark.parametrize("task", [TASK, "image-classification"])
def test_pipelines_refuse_unknown_arguments(classifier: Path, files: list[str], task: str) -> None:
    run = pipeline(task, model=str(classifier))
    with pytest.raises(TypeError, match=r"got intensity\. Pass arguments of the image processor"):
        run(files[2], intensity="hounsfield")
    assert run(files[2], image_processor_kwargs={"intensity": "hounsfield"}) != run(files[2])


CLASSIFY = """
import json, sys
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
folder, encoder, *files = sys.argv[1:]
classify = pipeline("image-classification", model=folder, trust_remote_code=True)
extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
of_objects = pipeline("image-classification", model=model, image_processor=processor)
unnamed = [pipeline(model=each, trust_remote_code=True).task for each in (folder, encoder)]
try:
    pipeline("image-classification", model=encoder, trust_remote_code=True)
    raise SystemExit("an encoder was taken for a classifier")
except ValueError as error:
    assert "has no classification head" in str(error), error
print(json.dumps({
    "unnamed": unnamed,
    "modules": [type(classify).__module__, type(extract).__module__, type(of_objects).__module__],
    "scores": [*(classify(files, batch_size=size) for size in (1, 2, 4)), of_objects(files, batch_size=2)],
}))
"""


@pytest.mark.slow
def test_classification_pipeline_runs_without_the_package(
    classifier: Path, checkpoint: Path, files: list[str], tmp_path: Path
) -> None:
    ran = run_new_process(CLASSIFY, tmp_path, str(classifier), str(checkpoint), *files)
    assert ran["unnamed"] == ["image-classification", TASK]
    assert all(module.startswith("transformers_modules.") for module in ran["modules"])
    for scores in ran["scores"]:
        assert_equal_scores(scores, score_alone(classifier, files))


EXTRACT = """
import json, sys
from transformers import AutoImageProcessor, AutoModel, pipeline
folder, *files = sys.argv[1:]
extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
of_objects = pipeline("image-feature-extraction", model=model, image_processor=processor)
print(json.dumps({
    "modules": [type(extract).__module__, type(of_objects).__module__],
    "pooled": [extract(files, batch_size=size, pool=True) for size in (1, 2, 4)],
    "tokens": [extract(files, batch_size=2), of_objects(files, batch_size=2)],
}))
"""


@pytest.mark.slow
def test_pipeline_runs_without_the_package(checkpoint: Path, files: list[str], tmp_path: Path) -> None:
    ran = run_new_process(EXTRACT, tmp_path, str(checkpoint), *files)
    assert all(module.startswith("transformers_modules.") for module in ran["modules"])
    tokens, embeddings = read_alone(checkpoint, files)
    for pooled in ran["pooled"]:
        np.testing.assert_allclose(pooled, embeddings, atol=1e-5)
    for of_files in ran["tokens"]:
        for got, expected in zip(of_files, tokens, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)


ENCODE = """
import json, sys
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
remote, folder, *files = sys.argv[1:]
model = SentenceTransformer(folder, device="cpu", trust_remote_code=remote == "remote")
pictures = [Image.open(file) for file in files[3:6]]
print(json.dumps({
    "module": type(model[0].model).__module__,
    "dimension": model.get_embedding_dimension(),
    "one": model.encode(pictures[0]).tolist(),
    "pictures": model.encode(pictures, batch_size=2).tolist(),
    "paths": model.encode([{"image": file} for file in files], batch_size=3).tolist(),
    "strings": model.encode(files[3:5]).tolist(),
    "similarity": model.similarity(*2 * [model.encode([{"image": file} for file in files])]).tolist(),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False])
def test_sentence_transformer_returns_the_embedding(
    checkpoint: Path, files: list[str], tmp_path: Path, installed: bool
) -> None:
    pytest.importorskip("sentence_transformers")
    code = "import modeling_m3ret\n" + ENCODE if installed else ENCODE
    remote = "package" if installed else "remote"
    ran = run_new_process(code, tmp_path, remote, str(checkpoint), *files, installed=installed)
    _, embeddings = read_alone(checkpoint, files)
    assert ran["module"].startswith("modeling_m3ret." if installed else "transformers_modules.")
    assert ran["dimension"] == 48
    np.testing.assert_allclose(ran["paths"], embeddings, atol=1e-5)
    np.testing.assert_allclose(ran["pictures"], embeddings[3:6], atol=1e-5)
    np.testing.assert_allclose(ran["one"], embeddings[3], atol=1e-5)
    np.testing.assert_allclose(ran["strings"], embeddings[3:5], atol=1e-5)
    np.testing.assert_allclose(ran["similarity"], embeddings @ embeddings.T, atol=1e-5)
