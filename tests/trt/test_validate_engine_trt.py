# SPDX-License-Identifier: Apache-2.0
"""``starkv validate engine`` passes right TensorRT engines and finds wrong ones, in bfloat16 as well."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command import Command
from fake_cuda import FakeCuda
from fake_tensorrt import install
from fake_tensorrt.plugin_nodes import Array, reference, run_plugin
from trt_engines import Exports, FakeKernels, build_tensorrt_engine

from starkv.export.build.ort import build_ort_engine
from starkv.export.lower import trt_primitives
from starkv.runtime.engines import trt as trt_engine

SUMS = ("layers.*/Add_*", "blocks.*/Add_*")
Values = Mapping[str, Array]


class WrongPlugins:
    """Plugins of another author."""

    def __init__(self, change: Callable[[onnx.NodeProto, Values], Values]) -> None:
        self._change, self._right = change, reference()

    def __call__(self, node: onnx.NodeProto, values: Values) -> dict[str, Array]:
        return run_plugin(self._right, node, self._change(node, values))


def _lengths_off_by_one(rows_of_call: Callable[[int], bool]) -> WrongPlugins:
    """A call overwrites the last row of the cache, if it has that many rows."""

    def change(node: onnx.NodeProto, values: Values) -> Values:
        if node.op_type != "KVAttention" or not rows_of_call(values[node.input[0]].shape[1]):
            return values
        lengths = node.input[5]
        return {**values, lengths: np.maximum(values[lengths] - 1, 0)}

    return WrongPlugins(change)


def _flipped_heads(node: onnx.NodeProto, values: Values) -> Values:
    """Compression gets the queries' heads the wrong way round."""
    if node.op_type != "KVCompress":
        return values
    queries = node.input[2]
    return {**values, queries: np.ascontiguousarray(np.flip(values[queries], axis=2))}


@pytest.fixture(scope="module")
def references(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Preset → engine of ONNX Runtime."""
    quantized = tmp_path_factory.mktemp("references") / "int4"
    build_ort_engine(exports.folders["int4"], quantized)
    return {"fp32": exports.processor_engine, "int4": quantized}


@dataclass(frozen=True)
class Machine:
    """Builds engines, and validates them on a fake card."""

    starkv: Command
    exports: Exports
    references: dict[str, Path]
    monkeypatch: pytest.MonkeyPatch
    out: Path

    def failures(
        self, preset: str = "fp32", export: Path | None = None, plugins: Any = None, **options: Any
    ) -> dict[str, str]:
        """Check → why it failed."""
        state = install(self.monkeypatch, cuda=FakeCuda(), execute=plugins)
        kernels: Any = FakeKernels(state.cuda)
        self.monkeypatch.setattr(trt_engine, "CudaPython", lambda: state.cuda)
        self.monkeypatch.setattr(trt_engine, "kernels_beside", lambda directory: kernels)
        built = build_tensorrt_engine(export or self.exports.folders[preset], self.out / "engine", **options)
        layers = ["--layers"] if options.get("debug_layers") else []
        done = self.starkv(
            *("validate", "engine", built, "--reference", self.references[preset]),
            *("--json", *layers),
        )
        checks = json.loads(done.out)["checks"]
        found = {check["case"]: check["reason"] for check in checks if check["status"] == "failed"}
        assert done.code == (1 if found else 0)
        return found


@pytest.fixture
def machine(
    starkv: Command,
    exports: Exports,
    references: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Machine:
    return Machine(starkv, exports, references, monkeypatch, tmp_path)


@pytest.mark.parametrize("preset", ["fp32", "int4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_right_engines_pass(machine: Machine, preset: str, dtype: str) -> None:
    assert machine.failures(preset, compute_dtype=dtype, debug_layers=SUMS) == {}


def test_wrong_lengths_in_decode_are_found(machine: Machine) -> None:
    found = machine.failures(plugins=_lengths_off_by_one(lambda rows: rows == 1))
    assert "decode" in found
    assert found.keys().isdisjoint({"logits", "keys", "values", "image_embeds"})


def test_wrong_lengths_in_a_second_prefill_are_found(machine: Machine) -> None:
    found = machine.failures(plugins=_lengths_off_by_one(lambda rows: rows > 1))
    assert {"keys", "values"} <= found.keys()


def test_wrong_compression_is_found(machine: Machine) -> None:
    found = machine.failures(plugins=WrongPlugins(_flipped_heads))
    assert "kept_rows" in found
    assert found.keys() <= {"kept_rows", "decode_kept"}


def test_swapped_rotary_tables_are_found(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    right = trt_primitives._rotary

    def swapped(new: Any, node: ir.Node, tables: Any) -> None:
        cos, sin = node.inputs[1:3]
        node.replace_input_with(1, sin)
        node.replace_input_with(2, cos)
        right(new, node, tables)

    monkeypatch.setattr(trt_primitives, "_rotary", swapped)
    found = machine.failures()
    assert {"image_embeds", "keys", "q_window", "tokens"} <= found.keys()
    assert "keys.0" in found["keys"]


def test_a_weight_that_is_a_little_off_is_found_in_its_layer(
    machine: Machine, exports: Exports, tmp_path: Path
) -> None:
    spoiled = tmp_path / "export"
    shutil.copytree(exports.folders["fp32"], spoiled)
    model = onnx.load(spoiled / "decoder.onnx", load_external_data=False)
    product = [n for n in model.graph.node if n.op_type == "MatMul" and n.name.startswith("layers.2/")][-1]
    tensor = next(each for each in model.graph.initializer if each.name == product.input[1])
    place = {entry.key: entry.value for entry in tensor.external_data}
    start, size = int(place["offset"]), int(place["length"])
    data = bytearray((spoiled / place["location"]).read_bytes())
    weights = np.frombuffer(data, np.float32, size // 4, start)
    data[start : start + size] = (weights * np.float32(1.05)).tobytes()
    (spoiled / place["location"]).unlink()
    (spoiled / place["location"]).write_bytes(data)
    found = machine.failures(export=spoiled, debug_layers=SUMS)
    named = [case for case, reason in found.items() if reason.startswith("the first layer of the decoder")]
    assert named == ["layers.2"]
