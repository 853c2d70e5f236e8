# SPDX-License-Identifier: Apache-2.0
"""Bounds of scratch memory against lowered graphs, run node by node: the bytes that live at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest import TinyModel
from fake_tensorrt.program import Program, constants_of
from numpy.typing import NDArray

from starkv.export.build.trt_vision_bounds import VisionSizes
from starkv.export.cards import resolve_model
from starkv.export.export_model import export_model
from starkv.export.lower import trt_primitives
from starkv.export.lower.trt import OPSET, lower_to_trt
from starkv.export.quantize.presets import PRESETS
from starkv.export.record import ExportRecord, read_record
from starkv.memory_plan import scratch
from starkv.memory_plan.scratch import decoder_scratch, vision_scratch
from starkv.memory_plan.weights import weight_bytes
from starkv.runtime.preprocess.vision_plan import plan_vision
from starkv.trt_compat.version import OLDEST

Array = NDArray[Any]
CAPACITY = 64
GENEROUS = 1.8
"""A bound may be so many times what lives."""


@dataclass(frozen=True)
class Lowered:
    """A model's graphs in the TensorRT dialect."""

    record: ExportRecord
    folder: Path

    def peak(self, graph: str, feeds: dict[str, Array]) -> int:
        """Most bytes that live at once, inputs, outputs and weights left out."""
        model = onnx.load(self.folder / f"{graph}.onnx")
        program = Program(model.graph, constants_of(model.graph, str(self.folder)), OPSET)
        program.run(feeds, idle_plugin)
        return program.peak

    @property
    def expanded(self) -> int:
        """Bytes of the largest 4-bit weight in 16 bits."""
        record = self.record
        return weight_bytes(record.text, record.vision, record.quantization).largest


def idle_plugin(node: onnx.NodeProto, values: dict[str, Array]) -> dict[str, Array]:
    """Outputs of the right shapes; caches are their own inputs."""
    caches = zip(node.output[1:], node.input[3:5], strict=False)
    out = {node.output[0]: np.zeros_like(values[node.input[0]])}
    return out | {new: values[past] for new, past in caches}


def decoder_feeds(record: ExportRecord, sequences: int, rows: int) -> dict[str, Array]:
    text = record.text
    table = np.zeros((sequences, rows, text.head_dim // 2), np.float32)
    cache = np.zeros((sequences, text.kv_heads, CAPACITY, text.head_dim), ml_dtypes.bfloat16)
    return {
        "inputs_embeds": np.zeros((sequences, rows, text.hidden), np.float32),
        "rope_cos": table,
        "rope_sin": table,
        "kv_len": np.zeros((text.layers, sequences), np.int32),
        "last_index": np.zeros(sequences, np.int32),
        **{f"past_{kind}.{layer}": cache for kind in "kv" for layer in range(text.layers)},
    }


def sees(lowered: Lowered, grid: tuple[int, int]) -> tuple[int, int]:
    """What lives at once for an image of so many patches, and the bound."""
    record = lowered.record
    pixels = np.zeros((grid[0] * grid[1], 1176), np.float32)
    peak = lowered.peak("vision", {"pixel_values": pixels, **plan_vision(*grid, record.vision).inputs()})
    merge = record.vision.spatial_merge_size
    sizes = VisionSizes.of_grid(grid[0] // merge, grid[1] // merge, record.vision)
    return peak, vision_scratch(record.vision, record.text.hidden, sizes)


@pytest.fixture(scope="module", params=["tiny fp32", "tiny int4", "gui-tiny fp32", "gui-tiny int4"])
def lowered(
    request: pytest.FixtureRequest, tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Lowered:
    name, preset = str(request.param).split()
    root = tmp_path_factory.mktemp("lowered")
    export = tiny.exports[preset]
    if name == "gui-tiny":
        model, export = resolve_model(name), root / "export"
        export_model(model.folder, model.card, export, PRESETS[preset])
    (root / "trt").mkdir()
    lower_to_trt(export, root / "trt", OLDEST, "bfloat16")
    return Lowered(read_record(export), root / "trt")


@pytest.mark.parametrize(("sequences", "rows"), [(1, 2048), (1, 512), (1, 64), (8, 1), (1, 1)])
def test_no_step_of_the_decoder_needs_more(lowered: Lowered, sequences: int, rows: int) -> None:
    peak = lowered.peak("decoder", decoder_feeds(lowered.record, sequences, rows))
    bound = decoder_scratch(lowered.record.text, sequences, rows, lowered.record.observation_window)
    assert peak <= bound + lowered.expanded <= GENEROUS * (peak + lowered.expanded)


@pytest.mark.parametrize("grid", [(16, 16), (40, 72), (4, 6), (58, 10)])
def test_no_image_needs_more(lowered: Lowered, grid: tuple[int, int]) -> None:
    peak, bound = sees(lowered, grid)
    assert peak <= bound <= GENEROUS * peak


def test_scores_of_whole_images_where_no_plugin_takes_the_heads(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = (40, 40)
    for module in (trt_primitives, scratch):
        monkeypatch.setattr(module, "FULL_ATTENTION_HEAD_DIMS", (64, 128))
    lower_to_trt(tiny.exports["fp32"], tmp_path, OLDEST, "bfloat16")
    peak, bound = sees(Lowered(read_record(tiny.exports["fp32"]), tmp_path), grid)
    scores = 2 * 2 * 1600**2
    assert scores < peak <= bound <= GENEROUS * peak
