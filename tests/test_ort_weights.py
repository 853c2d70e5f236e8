# SPDX-License-Identifier: Apache-2.0
"""MatMulNBits in place of DequantizeLinear and MatMul: the same codes, the same results."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import TinyModel
from decoder_runner import DecoderRunner, open_session
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import HIDDEN

from starkv.export.build.ort import build_ort_engine
from starkv.export.lower import ort_weights
from starkv.export.lower.ort import lower_to_ort
from starkv.export.record import read_record
from starkv.export.tensor_file import TensorFile

FEATURES, OUTPUTS, BLOCK = 96, 10, 32


def packed(codes: np.ndarray, bits: int) -> bytes:
    """ONNX's own packing, of a tensor of signed codes."""
    return ir.tensor(
        codes.astype(np.int8), dtype=ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    ).tobytes()


def linear_graph(
    folder: Path,
    bits: int,
    zero_points: bool = False,
    bias: bool = False,
    gather: bool = False,
    seed: int = 0,
) -> np.ndarray:
    """Write ``in.onnx`` with one quantized linear layer; returns its weight [K,N]."""
    random = np.random.default_rng(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = random.integers(low, high, (FEATURES, OUTPUTS))
    scales = random.uniform(0.01, 0.1, (FEATURES // BLOCK, OUTPUTS)).astype(np.float32)
    points = random.integers(low, high, scales.shape) if zero_points else np.zeros(scales.shape, int)
    offsets = random.standard_normal(OUTPUTS).astype(np.float32)
    order = random.permutation(FEATURES).astype(np.int64)
    dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    content = bytearray()
    initializers = []
    for name, kind, shape, stored in (
        ("codes", dtype, codes.shape, packed(codes, bits)),
        ("scales", ir.DataType.FLOAT, scales.shape, scales.tobytes()),
        ("points", dtype, points.shape, packed(points, bits)),
        ("offsets", ir.DataType.FLOAT, offsets.shape, offsets.tobytes()),
        ("order", ir.DataType.INT64, order.shape, order.tobytes()),
    ):
        content += b"\0" * (-len(content) % 64)
        tensor = ir.ExternalTensor(
            "in.data", len(content), len(stored), kind, shape=ir.Shape(shape), name=name, base_dir=folder
        )
        content += stored
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(kind), shape=ir.Shape(shape))
        initializers.append(value)
    (folder / "in.data").write_bytes(content)
    weight, scale, point, offset, permutation = initializers
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["S", FEATURES]))
    nodes, taken = [], x
    if gather:
        nodes.append(ir.node("Gather", [x, permutation], {"axis": -1}))
        taken = nodes[-1].outputs[0]
    inputs = [weight, scale, point] if zero_points else [weight, scale]
    nodes.append(ir.node("DequantizeLinear", inputs, {"axis": 0, "block_size": BLOCK}))
    nodes.append(ir.node("MatMul", [taken, nodes[-1].outputs[0]], name="layer/MatMul_1"))
    if bias:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], offset]))
    result = nodes[-1].outputs[0]
    result.name, result.dtype, result.shape = "y", ir.DataType.FLOAT, ir.Shape(["S", OUTPUTS])
    used = [value for value in initializers if value.uses()]
    graph = ir.Graph([x], [result], nodes=nodes, initializers=used, opset_imports={"": 23}, name="linear")
    ir.save(ir.Model(graph, ir_version=10), folder / "in.onnx")
    return (codes - points.repeat(BLOCK, 0)).astype(np.float32) * scales.repeat(BLOCK, 0)


def run(path: Path, x: np.ndarray) -> np.ndarray:
    result: np.ndarray = open_session(path).run(None, {"x": x})[0]
    return result


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_a_linear_layer_stays_what_it_is(
    tmp_path: Path, bits: int, zero_points: bool, bias: bool, gather: bool
) -> None:
    """Bit for bit what ONNX Runtime makes of the canonical form, and the weight that the codes stand for.

    Three blocks: with 4 bits, zero points end in half a byte.
    """
    weight = linear_graph(tmp_path, bits, zero_points, bias, gather)
    lower_to_ort(tmp_path / "in.onnx", tmp_path / "out.onnx")
    lowered = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    expected = (["Gather"] if gather else []) + ["MatMulNBits"]
    assert [node.op_type for node in lowered.graph.node] == expected
    assert {tensor.name for tensor in lowered.graph.initializer} == {
        name for node in lowered.graph.node for name in node.input if name not in ("", "x")
    } - {output for node in lowered.graph.node for output in node.output}
    x = np.random.default_rng(1).standard_normal((5, FEATURES)).astype(np.float32)
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", x), run(tmp_path / "in.onnx", x))

    # Rows of the identity read the weight itself, but for activations rounded to 8 bits.
    zero, identity = np.zeros((1, FEATURES), np.float32), np.eye(FEATURES, dtype=np.float32)
    read = run(tmp_path / "out.onnx", identity) - run(tmp_path / "out.onnx", zero)
    if gather:
        # Row k of the codes belongs to input order[k].
        read = read[_order(tmp_path)]
    np.testing.assert_allclose(read, weight, atol=1e-5)


def _order(folder: Path) -> np.ndarray:
    model = ir.load(folder / "in.onnx")
    tensor = model.graph.initializers["order"].const_value
    assert tensor is not None
    return tensor.numpy()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(1, 5), st.sampled_from([4, 8]), st.integers(0, 99))
def test_codes_keep_their_places_however_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory, pairs: int, blocks: int, bits: int, seed: int
) -> None:
    """Stripes, tiles and pairs of codes: all sizes, against ONNX's own packing."""
    folder = tmp_path_factory.mktemp("codes")
    shape = (blocks * 16, pairs * 2)
    codes = np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
    (folder / "in.data").write_bytes(packed(codes, bits))
    dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    source = ir.ExternalTensor(
        "in.data", 0, None, dtype, shape=ir.Shape(shape), name="codes", base_dir=folder
    )
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as workers:
        patch.setattr(ort_weights, "_STRIPE_BYTES", 64 * 70)
        patch.setattr(ort_weights, "_LEAST_COLUMNS", 7)
        patch.setattr(ort_weights, "_TILE_BYTES", 200)
        patch.setattr(ort_weights, "_COPY_ROWS", 9)
        data = TensorFile(folder / "out.data")
        tensor = ort_weights.unsigned_codes(source, 4 if bits == 4 else 8, 16, data, workers)
    stored = tensor.numpy().reshape(shape[1], -1)
    if bits == 4:
        stored = np.stack([stored & 15, stored >> 4], axis=-1).reshape(shape[1], -1)
    np.testing.assert_array_equal(stored.T.astype(int) - 2 ** (bits - 1), codes)


@pytest.mark.parametrize("preset", ["int8", "int4", "int4-small"])
def test_a_decoder_computes_the_same_bits(tiny: TinyModel, tmp_path: Path, preset: str) -> None:
    export = tiny.exports[preset]
    build_ort_engine(export, tmp_path / "engine")
    text = read_record(export).text
    random = np.random.default_rng(0)
    embeds, angles = random.standard_normal((1, 9, HIDDEN)), random.uniform(0, 6, (1, 9, 32))
    results = [
        DecoderRunner(folder / "decoder.onnx", text).step(embeds, np.cos(angles), np.sin(angles))
        for folder in (export, tmp_path / "engine")
    ]
    # Only the attention operators differ.
    np.testing.assert_allclose(results[1].logits, results[0].logits, rtol=1e-4, atol=1e-4)
    graph = onnx.load(tmp_path / "engine" / "decoder.onnx", load_external_data=False).graph
    operators = {node.op_type for node in graph.node}
    assert "MatMulNBits" in operators
    assert not operators & {"DequantizeLinear", "MatMul"}
