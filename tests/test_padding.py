# SPDX-License-Identifier: Apache-2.0
"""Widths that no quantization block divides are filled with zeros, which changes no result."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from starkv.errors import CheckpointError
from starkv.export.data_file import DataFile
from starkv.export.graph import GraphBuilder
from starkv.export.journal import Journal
from starkv.export.progress import NoProgress
from starkv.export.quantize.blockwise import dequantize_blockwise, quantize_blockwise
from starkv.export.weights import WeightWriter

HIDDEN, INTERMEDIATE = 64, 100


class RandomMlp:
    """A gated MLP whose width is a multiple of no block size, as in the vision tower (3420)."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        shapes = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN)}
        shapes["down_proj"] = (HIDDEN, INTERMEDIATE)
        self.tensors = {}
        for name, shape in shapes.items():
            self.tensors[f"mlp.{name}.weight"] = random.standard_normal(shape).astype(np.float32)
            self.tensors[f"mlp.{name}.bias"] = random.standard_normal(shape[0]).astype(np.float32)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.tensors[name][start:stop]

    def packed(self, name: str) -> None:
        return None

    def input_divisors(self, norm: str) -> None:
        return None

    def rounded(self, name: str) -> np.ndarray:
        """The weight [N,K] as 8-bit blocks of 32 would have it."""
        weight = self.tensors[f"mlp.{name}.weight"].T
        filled = np.pad(weight, ((0, -len(weight) % 32), (0, 0)))
        return dequantize_blockwise(*quantize_blockwise(filled, 8, 32))[: len(weight)].T

    def __call__(self, x: np.ndarray) -> np.ndarray:
        gate, up, down = (self.rounded(name) for name in ("gate_proj", "up_proj", "down_proj"))
        bias = {name: self.tensors[f"mlp.{name}.bias"] for name in ("gate_proj", "up_proj", "down_proj")}
        gated = x @ gate.T + bias["gate_proj"]
        inner = gated / (1 + np.exp(-gated)) * (x @ up.T + bias["up_proj"])
        return inner @ down.T + bias["down_proj"]


def build(folder: Path, source: RandomMlp) -> Path:
    folder.mkdir(exist_ok=True)
    weights = WeightWriter(
        source, DataFile(folder / "mlp.data", Journal(folder)), NoProgress(), 32, origin="here"
    )
    graph = GraphBuilder("mlp", weights, "int8")
    x = graph.input("x", ir.DataType.FLOAT, ["S", HIDDEN])
    y = graph.gated_mlp(x, "mlp", INTERMEDIATE, bias=True)
    graph.output(y, "y", ir.DataType.FLOAT, ["S", HIDDEN])
    ir.save(graph.model(), folder / "mlp.onnx")
    return folder / "mlp.onnx"


def test_a_padded_mlp_computes_what_its_rounded_weights_say(tmp_path: Path) -> None:
    source = RandomMlp()
    options = onnxruntime.SessionOptions()
    # As it is written: no kernel that rounds activations as well.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(build(tmp_path, source), options, ["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((5, HIDDEN)).astype(np.float32)
    (y,) = session.run(None, {"x": x})
    expected = source(x)
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["mlp.up_proj.weight", "mlp.down_proj.bias"])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, name: str, value: float) -> None:
    source = RandomMlp()
    source.tensors[name].flat[7] = value
    with pytest.raises(CheckpointError, match=f"here: tensor {name} holds values that are not finite"):
        build(tmp_path, source)
