"""The exporters of transformers with dynamic axes: a graph serves other batches and sizes than the traced ones."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config

from modeling_m3ret import M3RetModel


pytestmark = pytest.mark.slow

SHAPES = {  # the first is traced
    "images": [(2, 3, 32, 48), (1, 3, 32, 48), (5, 3, 64, 32)],
    "volumes": [(2, 3, 8, 32, 48), (1, 3, 8, 32, 48), (3, 3, 16, 48, 32)],
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("exporter", ["dynamo", "onnx"])
def test_exported_graph_computes_the_outputs_of_the_model(exporter: str, kind: str) -> None:
    name = exporter.capitalize()
    module = pytest.importorskip(f"transformers.exporters.exporter_{exporter}", reason="needs a newer transformers")
    if exporter == "onnx":
        pytest.importorskip("onnxruntime", reason="needs the extra `export`")
    model = M3RetModel(tiny_config(num_hidden_layers=1)).eval()
    settings = getattr(module, f"{name}Config")(dynamic=True)
    exported = getattr(module, f"{name}Exporter")().export(
        model, {"pixel_values": torch.rand(SHAPES[kind][0])}, settings
    )
    for shape in SHAPES[kind]:
        scans = torch.rand(shape)
        with torch.no_grad():
            expected = model(scans)
        output = exported(pixel_values=scans)
        for field in ("last_hidden_state", "pooler_output"):
            torch.testing.assert_close(torch.as_tensor(output[field]), expected[field], atol=1e-5, rtol=0)
