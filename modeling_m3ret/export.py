"""Export the encoder as one graph for serving: arrays in, retrieval embeddings out, without Python or this package.

    m3ret export --model m3ret-vitb --output m3ret-vitb-onnx
    m3ret export --model m3ret-vitb --output m3ret-vitb-int8 --format onnx-int8
    m3ret export --model m3ret-dinov3 --output dinov3 --format transformers

One graph takes images, clips and volumes. Its input is `pixel_values (B, 3, D, H, W)` float32 with any B and D and with
H and W multiples of the patch size; its output is `embeddings (B, d)`, equal to `embed_scans`. ONNX needs
`pip install -e ".[export]"`. See docs/export.md for preprocessing and for what int8 costs.

The format transformers is no graph but a 2D checkpoint, for encoders that were converted from one
(docs/start-from-a-vit.md).
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from .atomic_io import atomic_folder, atomic_write_text
from .command_line import CommandLine, user_errors
from .convert import export_vit
from .errors import InputError
from .hub import load_pretrained
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
# bytes of weights up to which they are stored in the .onnx file: protobuf's limit is 2 GiB, the graph takes some MB
MAX_INLINE_BYTES = 2**31 - 2**26
# largest accepted difference of an embedding's value from the model's, in float32; that of int8 is only reported
TOLERANCE: dict[str, float] = {"onnx": 1e-4, "torch": 1e-5, "onnx-int8": float("inf")}
# (B, D, patches along H, patches along W) of the scans that the graph is traced and then checked with
TRACED_SHAPE = (2, 7, 3, 4)
CHECKED_SHAPES = {"image": (3, 1, 4, 3), "clip": (1, 6, 2, 5), "volume": (2, 13, 5, 2)}


class DenseEmbedder(nn.Module):
    """`embed_scans` of a batch of equal shapes, with symbolic batch, depth, height and width.

    The depth is padded with the last slice to whole patches. An image is treated the same, so that one graph serves
    images, clips and volumes; an image then pays for embedding four slices, about 3 % of a ViT-B's work.
    """

    def __init__(self, model: M3RetModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map `(B, C, D, H, W)` to L2-normalised embeddings `(B, d)`."""
        config, device = self.model.config, pixel_values.device
        B, _, D, H, W = pixel_values.shape
        T = (D + config.patch_depth - 1) // config.patch_depth
        slices = torch.arange(T * config.patch_depth, device=device).clamp(max=D - 1)
        volumes = pixel_values.index_select(2, slices)  # (B, C, T*t, H, W)
        rows = patchify(volumes, config.patch_depth, config.patch_size).flatten(0, 1)  # (P, C*t*p*p)
        coordinates = grid_coordinates((T, H // config.patch_size, W // config.patch_size), device)  # (T*H*W, 6)
        prefix = config.num_prefix_tokens
        layout = PackLayout(((B, prefix + coordinates.shape[0]),), prefix)
        pooled = self.model.embed_rows(rows, coordinates.repeat(B, 1), layout)
        return nn.functional.normalize(self.model.whitening(pooled), dim=-1)


def trace(model: M3RetModel) -> torch.export.ExportedProgram:
    """Trace a model with dynamic B, D, H and W. The graph holds no path of this machine and no example inputs.

    Raises:
        ValueError: if the model is in training mode, not float32, or not on the CPU.
    """
    if model.training or model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(
            "cannot export this model: expected evaluation mode, torch.float32 and cpu, got "
            f"{'training' if model.training else 'evaluation'} mode, {model.dtype} and {model.device}."
        )
    axis, edge = torch.export.Dim, model.config.patch_size
    # torch.export specialises sizes of 1, so the minimum of height and width is two patches
    height, width = edge * axis("rows", min=2), edge * axis("columns", min=2)
    shapes = {"pixel_values": {0: axis("batch", min=1), 2: axis("depth", min=1), 3: height, 4: width}}
    # without this flag tracing assumes that no axis has length 1, but an image is one patch deep
    with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        example = (_random_scans(model, TRACED_SHAPE),)
        program = torch.export.export(DenseEmbedder(model), example, dynamic_shapes=shapes)
    program.example_inputs = None  # would be pickled into the file
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # holds paths of this machine
    return program


def to_onnx(program: torch.export.ExportedProgram) -> onnx.ModelProto:
    """Convert a traced model to ONNX with named axes and without metadata."""
    names: Any = {"input_names": ["pixel_values"], "output_names": ["embeddings"]}
    converted = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, **names)
    assert converted is not None
    proto = converted.model_proto
    _strip_metadata(proto)
    for value, axes in (
        (proto.graph.input[0], {0: "batch", 2: "depth", 3: "height", 4: "width"}),
        (proto.graph.output[0], {0: "batch"}),
    ):
        for axis, name in axes.items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    return proto


def to_int8(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Quantise the linear layers: int8 weights with a scale per channel, uint8 inputs with a scale per call.

    Attention, norms and the whitening, which amplifies small differences, stay float32. Weights use 7 of 8 bits because
    processors without VNNI saturate sums of larger products at 16 bits without a warning.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    whitening = [node.name for node in proto.graph.node if node.op_type == "MatMul"][-1]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        write_onnx(proto, source)
        quantize_dynamic(source, target, ["MatMul"], per_channel=True, reduce_range=True, nodes_to_exclude=[whitening])
        quantized = onnx.load(target)
    _strip_metadata(quantized)
    return quantized


def write_onnx(proto: onnx.ModelProto, path: Path) -> None:
    """Write an ONNX file; weights beyond protobuf's limit go into a second file, `path` with `.data` appended."""
    import onnx

    large = sum(len(weight.raw_data) for weight in proto.graph.initializer) > MAX_INLINE_BYTES
    onnx.save_model(proto, path, save_as_external_data=large, location=f"{path.name}.data")


def _strip_metadata(proto: onnx.ModelProto) -> None:
    """Remove stack traces, which hold paths of this machine, doc strings and inferred shapes."""
    graph = proto.graph
    for element in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        element.ClearField("metadata_props")
        element.ClearField("doc_string")
    graph.ClearField("value_info")


def load_graph(path: Path) -> Callable[[Tensor], Tensor]:
    """Return a function that runs an exported graph on the CPU: `pixel_values (B, C, D, H, W)` float32 to `(B, d)`."""
    if path.suffix != ".onnx":
        return torch.export.load(path).module()
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixel_values: torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])


def export(
    model: M3RetModel, processor: M3RetImageProcessor, output: Path, *, name: str, format: Format = "onnx"
) -> dict[str, Any]:
    """Write a folder with the graph and `manifest.json`, and return the manifest.

    Before the folder appears, the graph is checked on an image, a clip and a volume of other sizes than it was traced
    with.

    Args:
        model: encoder in evaluation mode, float32, on the CPU.
        processor: its image processor, whose settings are written to the manifest.
        output: folder to create.
        name: name, path or Hub id of the checkpoint; the last part is written to the manifest.
        format: file format of the graph.

    Raises:
        InputError: if `output` exists.
        ValueError: if the model is in training mode, not float32, or not on the CPU.
        RuntimeError: if the graph's embeddings differ from the model's.
    """
    if output.exists():
        raise InputError(f"--output: expected a new folder, got {output}, which exists. Choose another one.")
    program = trace(model)
    with atomic_folder(output) as folder:
        graph = folder / ("model.pt2" if format == "torch" else "model.onnx")
        if format == "torch":
            torch.export.save(program, buffer := io.BytesIO())  # a path would be stored in the file
            graph.write_bytes(buffer.getbuffer())
        else:
            proto = to_onnx(program)
            write_onnx(to_int8(proto) if format == "onnx-int8" else proto, graph)
        manifest = make_manifest(model, processor, name, format)
        manifest["largest_difference"] = check_graph(model, load_graph(graph), format)
        manifest["files"] = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
        atomic_write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def make_manifest(model: M3RetModel, processor: M3RetImageProcessor, name: str, format: Format) -> dict[str, Any]:
    """Return a complete description of a graph: its model, input, output and preprocessing."""
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


def check_graph(model: M3RetModel, embed: Callable[[Tensor], Tensor], format: Format) -> dict[str, float]:
    """Return the largest absolute difference of a graph's embeddings from its model's, by kind of random scan.

    Raises:
        RuntimeError: if a difference is above `TOLERANCE` or not finite.
    """
    differences = {}
    with torch.inference_mode():
        for kind, shape in CHECKED_SHAPES.items():
            pixel_values = _random_scans(model, shape)
            difference = embed(pixel_values) - model.embed_scans(pixel_values)
            differences[kind] = difference.abs().max().item()
            if not differences[kind] <= TOLERANCE[format]:
                raise RuntimeError(
                    f"the graph's embeddings differ from the model's: expected at most {TOLERANCE[format]:g}, "
                    f"got {differences[kind]:g} for a {kind}. Report it with the versions of torch and onnxruntime."
                )
    return differences


def _random_scans(model: M3RetModel, shape: tuple[int, int, int, int]) -> Tensor:
    B, D, h, w = shape
    config, generator = model.config, torch.Generator().manual_seed(0)
    size = (B, config.num_channels, D, h * config.patch_size, w * config.patch_size)
    return torch.randn(size, generator=generator)


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--model", required=True, type=str, help="checkpoint folder or Hub id")
    parser.add_argument("--output", required=True, type=Path, help="folder to create for the graph and its manifest")
    formats = (*get_args(Format), "transformers")
    parser.add_argument(
        "--format", choices=formats, default="onnx", help="file format of the graph, or a 2D checkpoint"
    )
    arguments = parser.parse_args()
    with user_errors(parser.prog):
        model, processor = load_pretrained(arguments.model)
        model = model.float()
        if arguments.format == "transformers":
            print(f"{arguments.output}: {export_vit(model, processor, arguments.output)}")
            return
        manifest = export(model, processor, arguments.output, name=arguments.model, format=arguments.format)
    differences = ", ".join(f"{kind} {value:.1e}" for kind, value in manifest["largest_difference"].items())
    print(f"{arguments.output}: {', '.join(manifest['files'])}; largest difference from the model: {differences}")


if __name__ == "__main__":
    main()
