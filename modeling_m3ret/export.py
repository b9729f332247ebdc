"""The encoder as one graph for serving: arrays in, retrieval embeddings out, no Python and no code of ours needed.

    python -m modeling_m3ret.export --model m3ret-vitb --output m3ret-vitb-onnx
    python -m modeling_m3ret.export --model m3ret-vitb --output m3ret-vitb-int8 --format onnx-int8

One graph takes images, clips and volumes: `pixel_values (B, 3, D, H, W)` float32, D from 1, H and W multiples of the
patch size, every axis but the channels of any length. It gives `embeddings (B, d)`, what `get_image_features` gives.
Needs `pip install -e ".[export]"`; `docs/export.md` shows how a graph is fed and what int8 costs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel

from .atomic_io import atomic_write_text, sync
from .image_processing_m3ret import M3RetImageProcessor
from .model_facts import model_facts, sha256_of
from .modeling_m3ret import M3RetModel
from .packing_m3ret import PackLayout, grid_coordinates, patchify
from .version import __version__


if TYPE_CHECKING:
    import onnx


Format = Literal["onnx", "onnx-int8", "torch"]
MANIFEST = "manifest.json"
OPSET = 20  # the first with Gelu as one operator
# bytes of weights up to which they lie inside the .onnx file: protobuf allows 2 GiB in all, the graph takes some MB
INSIDE_UP_TO = 2**31 - 2**26
# most that an embedding's coordinate may differ from the model's own, in float32; int8 rounds, its difference is told
TOLERANCE: dict[str, float] = {"onnx": 1e-4, "torch": 1e-5, "onnx-int8": float("inf")}
# (B, D, patches down, patches across) of the graph's example, and of what it is compared on: image, clip, volume
EXAMPLE = (2, 7, 3, 4)
COMPARED = {"image": (3, 1, 4, 3), "clip": (1, 6, 2, 5), "volume": (2, 13, 5, 2)}


class DenseEmbedder(nn.Module):
    """`get_image_features` of dense scans, with the batch and the grid as symbols that a graph can keep.

    An image is its one slice repeated, as any depth that does not fill a patch: so images, clips and volumes are one
    graph, and an image pays for the patch embedding of four slices, some 3 % of a ViT-B's work.
    """

    def __init__(self, model: M3RetModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`(B, C, D, H, W)` -> `(B, d)`, L2-normalised."""
        config, device = self.model.config, pixel_values.device
        B, _, D, H, W = pixel_values.shape
        T = (D + config.patch_depth - 1) // config.patch_depth
        slices = torch.arange(T * config.patch_depth, device=device).clamp(max=D - 1)
        volumes = pixel_values.index_select(2, slices)  # (B, C, T*t, H, W)
        rows = patchify(volumes, config.patch_depth, config.patch_size).flatten(0, 1)  # (P, C*t*p*p)
        places = grid_coordinates((T, H // config.patch_size, W // config.patch_size), device)  # (T*H*W, 3)
        # one group of B equal scans; what a layout lists for each scan only mixed packs and training ask for
        prefix = config.num_prefix_tokens
        layout = PackLayout(order=[], row_ranges=[], prefix=prefix, groups=[(B, prefix + places.shape[0])])
        pooled = self.model.embed_rows(rows, places.repeat(B, 1), layout)
        return nn.functional.normalize(self.model.whitening(pooled), dim=-1)


def trace(model: M3RetModel) -> torch.export.ExportedProgram:
    """The model as a graph with dynamic B, D, H and W, without the machine's paths and without example inputs.

    Raises:
        ValueError: if the model is in training, not float32, or not on the CPU.
    """
    if model.training or model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(
            "expected a model in evaluation, float32, on the CPU; found one in "
            f"{'training' if model.training else 'evaluation'}, {model.dtype}, on {model.device}"
        )
    axis, edge = torch.export.Dim, model.config.patch_size
    shapes = {
        "pixel_values": {
            0: axis("batch", min=1),
            2: axis("depth", min=1),
            # graphs of torch tell one patch across from several
            3: edge * axis("rows", min=2),
            4: edge * axis("columns", min=2),
        }
    }
    # else tracing takes for granted that nothing is of length 1, and an image is one patch deep
    with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(DenseEmbedder(model), (_noise(model, EXAMPLE),), dynamic_shapes=shapes)
    program.example_inputs = None  # else they are pickled into the file
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # holds paths of this machine
    return program


def to_onnx(program: torch.export.ExportedProgram) -> onnx.ModelProto:
    """The graph in ONNX, with axes that have names and nothing of how it was made."""
    converted = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["pixel_values"],
        output_names=["embeddings"],
        opset_version=OPSET,
        verbose=False,
    )
    assert converted is not None
    proto = converted.model_proto
    _strip(proto)
    for value, axes in (
        (proto.graph.input[0], {0: "batch", 2: "depth", 3: "height", 4: "width"}),
        (proto.graph.output[0], {0: "batch"}),
    ):
        for place, name in axes.items():
            value.type.tensor_type.shape.dim[place].dim_param = name
    return proto


def to_int8(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """Weights of the linear maps as int8 with a scale a channel, their inputs as uint8 with a scale a call.

    Attention, norms and the whitening stay float32: whitening multiplies small differences. Weights use 7 of the 8
    bits: where a processor has no VNNI, sums of larger products are cut at 16 bits, and nothing tells so.

    Args:
        folder: for files in between.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    source, target = folder / "float32.onnx", folder / "int8.onnx"
    write_onnx(proto, source)
    whitening = [node.name for node in proto.graph.node if node.op_type == "MatMul"][-1]
    quantize_dynamic(source, target, ["MatMul"], per_channel=True, reduce_range=True, nodes_to_exclude=[whitening])
    quantized = onnx.load(target)
    _strip(quantized)
    return quantized


def write_onnx(proto: onnx.ModelProto, path: Path) -> None:
    """One file; of more weights than protobuf allows two, the weights in `path.data`."""
    import onnx

    large = sum(len(weight.raw_data) for weight in proto.graph.initializer) > INSIDE_UP_TO
    onnx.save_model(proto, path, save_as_external_data=large, location=f"{path.name}.data")


def _strip(proto: onnx.ModelProto) -> None:
    """Without stack traces, doc strings and inferred shapes: paths of this machine, and names that mean nothing."""
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")


def runner(path: Path) -> Callable[[Tensor], Tensor]:
    """What runs a graph's file on the CPU: `pixel_values (B, C, D, H, W)` float32 -> `(B, d)`."""
    if path.suffix != ".onnx":
        return torch.export.load(path).module()
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixel_values: torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])


def export(
    model: M3RetModel, processor: M3RetImageProcessor, output: Path, *, name: str, format: Format = "onnx"
) -> dict[str, Any]:
    """Write the folder `output`: the graph, its weights inside or beside it, and `manifest.json`, which is returned.

    The file is run before the folder appears, on an image, a clip and a volume of other sizes than it was traced with.

    Args:
        model: in evaluation, float32, on the CPU. processor: of the same checkpoint; its settings go into the manifest.
        name: of the checkpoint; of a path the last part is kept.

    Raises:
        FileExistsError: if `output` is there already.
        ValueError: if the model is in training, not float32, or not on the CPU.
        RuntimeError: if the file's embeddings are not the model's.
    """
    if output.exists():
        raise FileExistsError(f"{output} is there already; an export goes into a folder of its own")
    program = trace(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}.{os.getpid()}.partial")
    between = beside / "between"
    try:
        between.mkdir(parents=True)
        graph = beside / ("model.pt2" if format == "torch" else "model.onnx")
        if format == "torch":
            torch.export.save(program, buffer := io.BytesIO())  # a file's name would be kept in it
            graph.write_bytes(buffer.getbuffer())
        else:
            proto = to_onnx(program)
            write_onnx(to_int8(proto, between) if format == "onnx-int8" else proto, graph)
        shutil.rmtree(between)
        manifest = manifest_of(model, processor, name, format)
        manifest["largest_difference"] = differences(model, runner(graph), format)
        manifest["files"] = {path.name: sha256_of(path) for path in sorted(beside.iterdir())}
        atomic_write_text(beside / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        for path in (*beside.iterdir(), beside):
            sync(path)
        beside.rename(output)
        sync(output.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return manifest


def manifest_of(model: M3RetModel, processor: M3RetImageProcessor, name: str, format: Format) -> dict[str, Any]:
    """What someone must know who has the graph and nothing else: whose it is, what it takes, what it gives."""
    config = model.config
    settings = ("size", "num_frames", "max_patches", "patch_size", "patch_depth", "image_mean", "image_std")
    return {
        "format": format,
        "m3ret": __version__,
        "torch": torch.__version__,
        "model": asdict(model_facts(model, processor, name)),
        "input": {
            "name": "pixel_values",
            "dtype": "float32",
            "shape": ["batch", config.num_channels, "depth", "height", "width"],
            "multiple_of": [1, 1, 1, config.patch_size, config.patch_size],
        },
        "output": {
            "name": "embeddings",
            "dtype": "float32",
            "shape": ["batch", config.hidden_size],
            "normalised": "L2",
        },
        "preprocessing": {setting: getattr(processor, setting) for setting in settings},
    }


def differences(model: M3RetModel, embed: Callable[[Tensor], Tensor], format: Format) -> dict[str, float]:
    """The largest difference of a coordinate to the model's own embeddings, of noise as image, clip and volume."""
    found = {}
    with torch.inference_mode():
        for kind, shape in COMPARED.items():
            pixel_values = _noise(model, shape)
            found[kind] = (embed(pixel_values) - model.get_image_features(pixel_values)).abs().max().item()
    if not max(found.values()) <= TOLERANCE[format]:
        raise RuntimeError(f"embeddings of the graph differ from the model's by {found}, expected {TOLERANCE[format]}")
    return found


def _noise(model: M3RetModel, shape: tuple[int, int, int, int]) -> Tensor:
    B, D, h, w = shape
    config, generator = model.config, torch.Generator().manual_seed(0)
    size = (B, config.num_channels, D, h * config.patch_size, w * config.patch_size)
    return torch.randn(size, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--output", required=True, type=Path, help="folder that will hold the graph and its manifest")
    parser.add_argument("--format", choices=get_args(Format), default="onnx")
    arguments = parser.parse_args()
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    model = AutoModel.from_pretrained(arguments.model, dtype=torch.float32).eval()
    manifest = export(model, processor, arguments.output, name=arguments.model, format=arguments.format)
    print(f"{arguments.output}: {', '.join(manifest['files'])}; difference {manifest['largest_difference']}")


if __name__ == "__main__":
    main()
