"""An exported graph gives the model's embeddings for any batch and grid, and its files hold nothing of this machine."""

from __future__ import annotations

import copy
import functools
import getpass
import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config

from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret import export as export_module
from modeling_m3ret.errors import InputError
from modeling_m3ret.export import MANIFEST, DenseEmbedder, check_graph, export, load_graph, trace
from modeling_m3ret.model_facts import model_facts


ROOT = Path(__file__).parents[1]
# (B, D, H, W), not the traced ones: an image, a batch of images, a clip, a volume whose depth fills its patches
SHAPES = [(1, 1, 64, 48), (5, 1, 32, 80), (2, 6, 96, 32), (1, 16, 48, 48), (3, 9, 32, 32)]
TOLERANCE = {"onnx": 1e-4, "onnx-int8": 0.1, "torch": 1e-5}
load_once = functools.cache(load_graph)  # loading a torch.export program takes seconds
slow = pytest.mark.slow  # tracing takes seconds, converting to ONNX tens of seconds


def make_model(pooling: str = "mean") -> M3RetModel:
    """A whitened model with weights so large that embeddings of noise differ."""
    torch.manual_seed(0)
    model = M3RetModel(tiny_config(pooling=pooling, initializer_range=0.2, num_hidden_layers=2)).eval()
    with torch.no_grad():
        model.whitening.fit(torch.cat([model.embed(torch.randn(40, 3, depth, 32, 48)) for depth in (1, 6)]))
    return model


def make_processor() -> M3RetImageProcessor:
    return M3RetImageProcessor(size=64, num_frames=8)


def only_graph(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.suffix in (".onnx", ".pt2"))


@pytest.fixture(scope="module", autouse=True)
def _converted_once() -> Iterator[None]:
    """Trace and convert each model once; all exports of it share the result."""
    to_onnx = functools.cache(export_module.to_onnx)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(export_module, "trace", functools.cache(export_module.trace))
        patched.setattr(export_module, "to_onnx", lambda program: copy.deepcopy(to_onnx(program)))
        yield


@pytest.fixture(scope="module")
def model() -> M3RetModel:
    return make_model("statistics")


@pytest.fixture(scope="module")
def _needs_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason='ONNX is optional: pip install -e ".[export]"')


@pytest.fixture(scope="module", params=["onnx", "onnx-int8", "torch"])
def exported(
    request: pytest.FixtureRequest, model: M3RetModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A format and the folder of its export, which was moved after the export."""
    if request.param != "torch":
        request.getfixturevalue("_needs_onnx")
    folder = tmp_path_factory.mktemp("exported")
    export(model, make_processor(), folder / "made-in-here", name="/of/a/machine/m3ret-tiny", format=request.param)
    return request.param, (folder / "made-in-here").rename(folder / "moved")


@torch.inference_mode()
@pytest.mark.parametrize("pooling", ["mean", "cls", "statistics"])
def test_dense_embedder_equals_the_model_for_each_pooling(pooling: str) -> None:
    model = make_model(pooling)
    for B, D, H, W in SHAPES:
        pixel_values = torch.randn(B, 3, D, H, W)
        difference = DenseEmbedder(model)(pixel_values) - model.embed_scans(pixel_values)
        assert difference.abs().max() <= 1e-5


@slow
@torch.inference_mode()
def test_graph_gives_the_embeddings_of_the_model_for_any_batch_and_grid(
    exported: tuple[str, Path], model: M3RetModel
) -> None:
    format, folder = exported
    embed = load_once(only_graph(folder))
    for B, D, H, W in SHAPES:
        pixel_values = torch.randn(B, 3, D, H, W)
        found, expected = embed(pixel_values), model.embed_scans(pixel_values)
        assert found.shape == (B, 48)
        assert found.dtype == torch.float32
        assert (found.norm(dim=1) - 1).abs().max() < 1e-5
        if format == "onnx-int8":
            assert (found * expected).sum(1).min() > 0.9
        else:
            assert (found - expected).abs().max() <= TOLERANCE[format]
        if B > 1:  # the model's embeddings are not all alike
            assert (expected @ expected.T - torch.eye(B)).max() < 0.8


@slow
@torch.inference_mode()
def test_graph_takes_what_the_processor_resizes(exported: tuple[str, Path], model: M3RetModel) -> None:
    format, folder = exported
    embed, processor = load_once(only_graph(folder)), make_processor()
    generator = np.random.default_rng(0)
    scans = [
        generator.integers(0, 255, (90, 70), dtype=np.uint8),  # grey
        generator.integers(0, 255, (90, 70, 3), dtype=np.uint8),
        generator.random((7, 50, 60), dtype=np.float32),  # a depth that does not fill its patches
    ]
    packed = model.embed_scans(**processor(scans))
    for scan, expected in zip(scans, packed, strict=True):
        volume = processor.resize(processor.read(scan))  # (1 or 3, D, H, W)
        found = embed(volume.expand(3, -1, -1, -1)[None].contiguous())[0]
        assert (found - expected).abs().max() <= TOLERANCE[format]


@slow
@torch.inference_mode()
def test_image_equals_the_volume_that_repeats_it(exported: tuple[str, Path]) -> None:
    embed, image = load_once(only_graph(exported[1])), torch.randn(2, 3, 1, 32, 48)
    assert torch.equal(embed(image), embed(image.expand(-1, -1, 4, -1, -1).contiguous()))


@slow
def test_size_that_is_not_a_multiple_of_the_patch_size_is_an_error(exported: tuple[str, Path]) -> None:
    embed = load_once(only_graph(exported[1]))
    for H, W in ((40, 32), (32, 40)):
        with pytest.raises(Exception), torch.inference_mode():  # noqa: B017, PT011 - each runtime has its own
            embed(torch.randn(1, 3, 1, H, W))


@slow
def test_manifest_describes_the_graph(exported: tuple[str, Path], model: M3RetModel) -> None:
    format, folder = exported
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format"] == format
    assert manifest["model"] == vars(model_facts(model, make_processor(), "m3ret-tiny"))
    assert manifest["input"]["shape"] == ["batch", 3, "depth", "height", "width"]
    assert manifest["input"]["multiple_of"] == [1, 1, 1, 16, 16]
    assert manifest["output"]["shape"] == ["batch", 48]
    settings = manifest["preprocessing"]
    assert [settings[key] for key in ("size", "num_frames", "image_mean", "image_std")] == [64, 8, 0.5, 0.5]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    del digests[MANIFEST]
    assert manifest["files"] == digests
    assert [path.name for path in folder.parent.iterdir()] == ["moved"]  # no temporary files are left


@slow
def test_files_hold_no_path_of_this_machine_and_no_pickle(exported: tuple[str, Path]) -> None:
    """Stack traces, doc strings and names of temporary folders are where paths would be."""
    _, folder = exported
    contents = {}
    for path in folder.iterdir():
        contents[path.name] = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents |= {name: archive.read(name) for name in archive.namelist()}
    secrets = [str(ROOT), sys.prefix, str(Path.home()), torch.__path__[0], f"/{getpass.getuser()}/"]
    secrets += [str(folder.parent), "/of/a/machine", "made-in-here", ".partial", "modeling_m3ret.py", "stack_trace"]
    for name, content in contents.items():
        assert not [secret for secret in secrets if secret.encode() in content or secret in name], name
        if name != "model.pt2":
            assert b'"use_pickle": true' not in content
            assert not zipfile.is_zipfile(io.BytesIO(content)), name  # torch.save writes one


@slow
@pytest.mark.usefixtures("_needs_onnx")
def test_large_weights_are_written_to_a_second_file(
    model: M3RetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = export_module.to_onnx(export_module.trace(model)).graph
    weights = sum(len(weight.raw_data) for weight in graph.initializer)
    for limit, names in ((weights, ["model.onnx"]), (weights - 1, ["model.onnx", "model.onnx.data"])):
        monkeypatch.setattr(export_module, "MAX_INLINE_BYTES", limit)
        folder = tmp_path / str(limit)
        manifest = export(model, make_processor(), folder, name="tiny")
        assert list(manifest["files"]) == names
        assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, *names]
        moved = folder.rename(tmp_path / f"moved-{limit}")
        assert max(check_graph(model, load_graph(moved / "model.onnx"), "onnx").values()) <= 1e-4
    assert (moved / "model.onnx").stat().st_size < weights / 2


@slow
@pytest.mark.usefixtures("_needs_onnx")
def test_int8_quantises_linear_layers_but_not_the_whitening(model: M3RetModel) -> None:
    from onnx import numpy_helper

    quantized = export_module.to_int8(export_module.to_onnx(export_module.trace(model)))
    operators = [node.op_type for node in quantized.graph.node]
    layers = model.config.num_hidden_layers
    assert operators.count("MatMulInteger") == 4 * layers + 1  # qkv, output, up, down; the patch embedding
    assert operators.count("MatMul") == 2 * layers + 1  # both of attention; the whitening
    assert operators.count("Gemm") == 0
    weights = [numpy_helper.to_array(weight) for weight in quantized.graph.initializer]
    whitening = model.whitening.matrix.T.numpy()
    assert any(weight.shape == whitening.shape and np.array_equal(weight, whitening) for weight in weights)
    # AVX2 adds two products of uint8 and int8 in 16 bits: 255 * 64 * 2 fits, 255 * 127 * 2 does not
    assert all(abs(weight.astype(int)).max() <= 64 for weight in weights if weight.dtype == np.int8)


@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_graph_that_differs_from_the_model_is_refused(error: float) -> None:
    model = make_model()
    with pytest.raises(RuntimeError):
        check_graph(model, lambda pixel_values: model.embed_scans(pixel_values) + error, "onnx")


@slow
def test_failed_export_leaves_nothing(model: M3RetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "TOLERANCE", {"torch": -1.0})
    with pytest.raises(RuntimeError):
        export(model, make_processor(), tmp_path / "out", name="tiny", format="torch")
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=str(tmp_path / "out")):
        export(make_model(), make_processor(), tmp_path / "out", name="tiny", format="torch")
    assert not list((tmp_path / "out").iterdir())


def test_only_a_float32_model_in_evaluation_mode_is_exported() -> None:
    for model, found in ((make_model().train(), "training"), (make_model().bfloat16(), "torch.bfloat16")):
        with pytest.raises(ValueError, match=found):
            trace(model)


@slow
def test_command_exports_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "m3ret-tiny")
    make_processor().save_pretrained(tmp_path / "m3ret-tiny")
    options = ["--model", str(tmp_path / "m3ret-tiny"), "--output", str(tmp_path / "out"), "--format", "torch"]
    monkeypatch.setattr(sys, "argv", ["export", *options])
    export_module.main()
    assert "model.pt2" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["model"]["model"] == "m3ret-tiny"
    assert max(check_graph(model, load_graph(tmp_path / "out" / "model.pt2"), "torch").values()) <= 1e-5


def test_command_reports_wrong_input_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tmp_path / "missing"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["export", *options])
    with pytest.raises(SystemExit) as raised:
        export_module.main()
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(tmp_path / "missing") in line
