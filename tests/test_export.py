"""An exported graph is the model: the same embeddings at any batch and grid, in files that are whole and tell nothing
of the machine that made them."""

from __future__ import annotations

import copy
import getpass
import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from conftest import tiny_config

from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret import export as export_module
from modeling_m3ret.export import MANIFEST, differences, export, runner, trace
from modeling_m3ret.model_facts import model_facts


if TYPE_CHECKING:
    import onnx

ROOT = Path(__file__).parents[1]
# (B, D, H, W), none of them the example's: an image, a batch of images, a clip, a volume whose depth fills its patches
SHAPES = [(1, 1, 64, 48), (5, 1, 32, 80), (2, 6, 96, 32), (1, 16, 48, 48), (3, 9, 32, 32)]


def needs_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason='ONNX is optional: pip install -e ".[export]"')


def make_model(pooling: str = "mean") -> M3RetModel:
    """Weights so large that attention and rotary position matter, and whitened: embeddings of noise point anywhere."""
    model = M3RetModel(tiny_config(pooling=pooling, initializer_range=0.2)).eval()
    with torch.no_grad():
        model.whitening.fit(torch.cat([model.embed(torch.randn(40, 3, depth, 32, 48)) for depth in (1, 6)]))
    return model


def make_processor() -> M3RetImageProcessor:
    return M3RetImageProcessor(size=64, num_frames=8)


def only_graph(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.suffix in (".onnx", ".pt2"))


@pytest.fixture(scope="module", params=["onnx", "onnx-int8", "torch"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, M3RetModel, Path]:
    """A format, the model, and the folder of its export; the folder has moved since."""
    if request.param != "torch":
        needs_onnx()
    torch.manual_seed(0)
    model, folder = make_model(), tmp_path_factory.mktemp("exported")
    export(model, make_processor(), folder / "made-in-here", name="/of/a/machine/m3ret-tiny", format=request.param)
    return request.param, model, (folder / "made-in-here").rename(folder / "moved")


@pytest.fixture(scope="module")
def converted() -> tuple[M3RetModel, onnx.ModelProto]:
    """A model and its graph in ONNX, not yet written; whoever writes it takes a copy."""
    needs_onnx()
    torch.manual_seed(0)
    model = make_model()
    return model, export_module.to_onnx(trace(model))


@torch.inference_mode()
def test_the_graph_gives_the_model_s_embeddings_at_any_batch_and_grid(exported: tuple[str, M3RetModel, Path]) -> None:
    format, model, folder = exported
    embed = runner(only_graph(folder))
    for B, D, H, W in SHAPES:
        pixel_values = torch.randn(B, 3, D, H, W)
        found, expected = embed(pixel_values), model.get_image_features(pixel_values)
        assert found.shape == (B, 48)
        assert found.dtype == torch.float32
        assert (found.norm(dim=1) - 1).abs().max() < 1e-5
        if format == "onnx-int8":
            assert (found * expected).sum(1).min() > 0.9
        else:
            assert (found - expected).abs().max() <= (1e-4 if format == "onnx" else 1e-5)
        if B > 1:  # and this is no wonder of embeddings that are all alike
            assert (expected @ expected.T - torch.eye(B)).max() < 0.8


@pytest.mark.parametrize("pooling", ["cls", "statistics"])
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_graph_pools_as_the_model_does(format: str, pooling: str, tmp_path: Path) -> None:
    if format == "onnx":
        needs_onnx()
    manifest = export(make_model(pooling), make_processor(), tmp_path / "out", name="tiny", format=format)  # type: ignore[arg-type]
    assert max(manifest["largest_difference"].values()) <= (1e-4 if format == "onnx" else 1e-5)


@torch.inference_mode()
def test_what_the_processor_resizes_is_what_the_graph_takes(exported: tuple[str, M3RetModel, Path]) -> None:
    format, model, folder = exported
    embed, processor = runner(only_graph(folder)), make_processor()
    generator = np.random.default_rng(0)
    scans = [
        generator.integers(0, 255, (90, 70), dtype=np.uint8),  # grey
        generator.integers(0, 255, (90, 70, 3), dtype=np.uint8),
        generator.random((7, 50, 60), dtype=np.float32),  # a depth that does not fill its patches
    ]
    packed = model.get_image_features(**processor(scans))
    for scan, expected in zip(scans, packed, strict=True):
        volume = processor.resize(processor.read(scan))  # (1 or 3, D, H, W)
        found = embed(volume.expand(3, -1, -1, -1)[None].contiguous())[0]
        assert (found - expected).abs().max() <= (1e-4 if format != "onnx-int8" else 0.1)


@torch.inference_mode()
def test_an_image_is_the_volume_that_repeats_it(exported: tuple[str, M3RetModel, Path]) -> None:
    embed, image = runner(only_graph(exported[2])), torch.randn(2, 3, 1, 32, 48)
    assert torch.equal(embed(image), embed(image.expand(-1, -1, 4, -1, -1).contiguous()))


def test_a_size_that_is_no_whole_number_of_patches_is_refused(exported: tuple[str, M3RetModel, Path]) -> None:
    embed = runner(only_graph(exported[2]))
    for H, W in ((40, 32), (32, 40)):
        with pytest.raises(Exception, match=r"(?i)reshape|guard|input"), torch.inference_mode():
            embed(torch.randn(1, 3, 1, H, W))


def test_the_manifest_tells_whose_graph_it_is_and_what_it_takes(exported: tuple[str, M3RetModel, Path]) -> None:
    format, model, folder = exported
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format"] == format
    assert manifest["model"] == vars(model_facts(model, make_processor(), "m3ret-tiny"))
    assert manifest["input"]["shape"] == ["batch", 3, "depth", "height", "width"]
    assert manifest["input"]["multiple_of"] == [1, 1, 1, 16, 16]
    assert manifest["output"]["shape"] == ["batch", 48]
    told = manifest["preprocessing"]
    assert (told["size"], told["num_frames"], told["image_mean"], told["image_std"]) == (64, 8, 0.5, 0.5)
    others = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    del others[MANIFEST]
    assert manifest["files"] == others
    assert [path.name for path in folder.parent.iterdir()] == ["moved"]  # nothing is left of the making


def test_no_file_tells_of_this_machine(exported: tuple[str, M3RetModel, Path]) -> None:
    """Stack traces, doc strings and the names of folders that graphs are made in: all of them hold paths."""
    folder = exported[2]
    contents = {}
    for path in folder.iterdir():
        contents[path.name] = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents |= {name: archive.read(name) for name in archive.namelist()}
    needles = [str(ROOT), sys.prefix, str(Path.home()), torch.__path__[0], f"/{getpass.getuser()}/"]
    needles += [str(folder.parent), "/of/a/machine", "made-in-here", ".partial", "modeling_m3ret.py", "stack_trace"]
    for name, content in contents.items():
        assert not [needle for needle in needles if needle.encode() in content or needle in name], name


def test_a_graph_of_torch_holds_no_pickle(tmp_path: Path) -> None:
    export(make_model(), make_processor(), tmp_path / "out", name="tiny", format="torch")
    with zipfile.ZipFile(tmp_path / "out" / "model.pt2") as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert b'"use_pickle": true' not in content
            assert not zipfile.is_zipfile(io.BytesIO(content)), name  # what torch.save writes


def test_weights_too_large_for_one_file_lie_beside_it(
    converted: tuple[M3RetModel, onnx.ModelProto], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, proto = converted
    monkeypatch.setattr(export_module, "to_onnx", lambda program: copy.deepcopy(proto))
    weights = sum(len(weight.raw_data) for weight in proto.graph.initializer)
    for limit, names in ((weights, ["model.onnx"]), (weights - 1, ["model.onnx", "model.onnx.data"])):
        monkeypatch.setattr(export_module, "INSIDE_UP_TO", limit)
        folder = tmp_path / str(limit)
        manifest = export(model, make_processor(), folder, name="tiny")
        assert list(manifest["files"]) == names
        assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, *names]
        moved = folder.rename(tmp_path / f"moved-{limit}")
        assert max(differences(model, runner(moved / "model.onnx"), "onnx").values()) <= 1e-4
    assert (moved / "model.onnx").stat().st_size < weights / 2


def test_int8_rounds_the_linear_maps_and_not_the_whitening(
    converted: tuple[M3RetModel, onnx.ModelProto], tmp_path: Path
) -> None:
    from onnx import numpy_helper

    model, proto = converted
    quantized = export_module.to_int8(copy.deepcopy(proto), tmp_path)
    kinds = [node.op_type for node in quantized.graph.node]
    layers = model.config.num_hidden_layers
    assert kinds.count("MatMulInteger") == 4 * layers + 1  # qkv, output, up, down; the patch embedding
    assert kinds.count("MatMul") == 2 * layers + 1  # both of attention; the whitening
    assert kinds.count("Gemm") == 0
    weights = [numpy_helper.to_array(weight) for weight in quantized.graph.initializer]
    whitening = model.whitening.matrix.T.numpy()
    assert any(weight.shape == (48, 48) and np.array_equal(weight, whitening) for weight in weights)
    # an AVX2 processor adds two products of uint8 and int8 in 16 bits: these fit, 255 * 127 * 2 would not
    assert all(abs(weight.astype(int)).max() <= 64 for weight in weights if weight.dtype == np.int8)


def test_a_graph_that_is_not_the_model_is_refused() -> None:
    model = make_model()
    for wrong in (2e-4, float("nan")):
        with pytest.raises(RuntimeError, match="differ"):
            differences(model, lambda pixel_values, wrong=wrong: model.get_image_features(pixel_values) + wrong, "onnx")


def test_an_export_appears_as_a_whole_and_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = make_model(), make_processor()
    monkeypatch.setattr(export_module, "TOLERANCE", {"torch": -1.0})
    with pytest.raises(RuntimeError, match="differ"):
        export(model, processor, tmp_path / "out", name="tiny", format="torch")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out"):
        export(model, processor, tmp_path / "out", name="tiny", format="torch")
    assert not list((tmp_path / "out").iterdir())


def test_only_a_float32_model_in_evaluation_is_exported() -> None:
    for model, found in ((make_model().train(), "training"), (make_model().bfloat16(), "bfloat16")):
        with pytest.raises(ValueError, match=found):
            trace(model)


def test_the_command_exports_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "m3ret-tiny")
    make_processor().save_pretrained(tmp_path / "m3ret-tiny")
    arguments = ["--model", str(tmp_path / "m3ret-tiny"), "--output", str(tmp_path / "out"), "--format", "torch"]
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    export_module.main()
    assert "model.pt2" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["model"]["model"] == "m3ret-tiny"
    assert max(differences(model, runner(tmp_path / "out" / "model.pt2"), "torch").values()) <= 1e-5
