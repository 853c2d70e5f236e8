# SPDX-License-Identifier: Apache-2.0
"""What lowered graphs compute in which type, which bfloat16 can't be run for here."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from conftest import PLAIN_PRESETS, TinyModel
from lowered_graphs import TARGETS
from tiny_families import make_tiny_qwen2_vl
from tiny_model import tiny_card

from starkv.export.cards import resolve_model
from starkv.export.export_model import export_model
from starkv.export.lower.trt import lower_to_trt
from starkv.export.lower.trt_types import value_types
from starkv.export.quantize.presets import PRESETS
from starkv.manifest import ComputeDtype
from starkv.trt_compat.version import OLDEST

DTYPES: tuple[ComputeDtype, ...] = ("float16", "bfloat16")
FLOATS = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
ALWAYS_WIDE = frozenset(("ReduceMean", "Sqrt", "Div", "ReduceL2", "LayerNormalization", "Softmax", "Where"))
ALWAYS_NARROW = frozenset(
    (
        *("Sigmoid", "Gelu", "DequantizeLinear", "Sub"),
        *("KVAttention", "FullAttention", "KVCompress"),
    )
)

Lowered = dict[tuple[str, ComputeDtype], Path]


@pytest.fixture(scope="module")
def lowered(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """(preset or family, compute dtype) → directory of lowered graphs."""
    root, directories = tmp_path_factory.mktemp("types"), {}
    make_tiny_qwen2_vl(root / "checkpoint")
    export_model(root / "checkpoint", tiny_card(family="qwen2_vl"), root / "qwen2_vl", PRESETS["int4"])
    exports = tiny.exports | {"qwen2_vl": root / "qwen2_vl"}
    for name, export in exports.items():
        for dtype in DTYPES:
            directories[name, dtype] = root / f"{name}-{dtype}"
            directories[name, dtype].mkdir()
            lower_to_trt(export, directories[name, dtype], OLDEST, dtype)
    return directories


def is_residual(value: ir.Value) -> bool:
    """A graph input, or the sum of two activations."""
    node = value.producer()
    if node is None:
        return value.is_graph_input()
    if node.op_type == "GatherND":
        assert node.inputs[0] is not None
        return is_residual(node.inputs[0])
    return node.op_type == "Add" and not any(x and x.is_initializer() for x in node.inputs)


def is_scores(product: ir.Node) -> bool:
    """Whether a product's rows go into a softmax."""
    readers = [use.node for use in product.outputs[0].uses()]
    if len(readers) == 1 and readers[0].op_type == "Add":
        readers = [use.node for use in readers[0].outputs[0].uses()]
    return any(node.op_type == "Softmax" for node in readers)


@pytest.mark.parametrize("name", [*PLAIN_PRESETS, "qwen2_vl"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("graph", ["vision", "decoder"])
def test_norms_and_residuals_are_wide_and_products_are_narrow(
    lowered: Lowered, name: str, dtype: ComputeDtype, graph: str
) -> None:
    narrow, seen, normed = FLOATS[dtype], set(), []
    for node in ir.load(lowered[name, dtype] / f"{graph}.onnx").graph:
        values = [value for value in (*node.inputs, *node.outputs) if value is not None]
        floats = {value.dtype for value in values if value.dtype in (ir.DataType.FLOAT, narrow)}
        if node.op_type in ALWAYS_WIDE:
            assert floats == {ir.DataType.FLOAT}, node.name
        elif node.op_type in ALWAYS_NARROW:
            assert floats == {narrow}, node.name
        elif node.op_type == "MatMul":
            # Attention's scores are wide, so that no kernel of TensorRT's takes them over.
            assert floats == ({ir.DataType.FLOAT} if is_scores(node) else {narrow}), node.name
        elif node.op_type != "Cast":
            assert len(floats) <= 1, node.name
        seen.add(node.op_type)
        squared = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
        if (squared or node.op_type == "LayerNormalization") and node.inputs[0] is not None:
            normed.append(is_residual(node.inputs[0]))
    assert {"MatMul", "Sigmoid"} <= seen
    assert normed
    # Only the vision tower's first norm reads a product: that of the patches.
    assert normed.count(False) == (1 if graph == "vision" else 0)


@pytest.mark.parametrize("name", [*PLAIN_PRESETS, "qwen2_vl"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("graph", ["vision", "decoder", "compress"])
def test_types_are_what_onnx_says_they_are(
    lowered: Lowered, name: str, dtype: ComputeDtype, graph: str
) -> None:
    """ONNX's shape inference is an oracle for the declared types and for the rules' own inference."""
    path = lowered[name, dtype] / f"{graph}.onnx"
    onnx.checker.check_model(path)
    model = onnx.load(path, load_external_data=False)
    declared = {
        value.name: value.type.tensor_type.elem_type
        for value in (*model.graph.value_info, *model.graph.output)
        if value.type.tensor_type.elem_type
    }
    del model.graph.value_info[:]
    plugin_outputs = [out for node in model.graph.node if node.domain == "ai.starkv" for out in node.output]
    outputs = {value.name for value in model.graph.output}
    for value in plugin_outputs:
        if value not in outputs:
            model.graph.value_info.append(onnx.helper.make_tensor_value_info(value, declared[value], None))
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    found = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    ours = value_types(model.graph)
    values = {out for node in model.graph.node for out in node.output}
    assert values <= set(ours)
    assert {name: kind for name, kind in ours.items() if name in found} == found
    assert {name: kind for name, kind in declared.items() if name in values} == {
        name: kind for name, kind in ours.items() if name in values and name in declared
    }
    assert len(found) >= len(values) - len(outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*PLAIN_PRESETS, "qwen2_vl"])
def test_nothing_is_stored_wide_or_twice(lowered: Lowered, name: str, dtype: ComputeDtype) -> None:
    for graph in ("vision", "decoder"):
        tensors = [
            value.const_value
            for value in ir.load(lowered[name, dtype] / f"{graph}.onnx").graph.initializers.values()
        ]
        large = [tensor for tensor in tensors if tensor is not None and tensor.nbytes > 2048]
        assert {tensor.dtype for tensor in large} <= {FLOATS[dtype], ir.DataType.INT4}
        places = [(tensor.offset, tensor.length) for tensor in large if isinstance(tensor, ir.ExternalTensor)]
        assert len(set(places)) == len(places) == len(large)


def test_inputs_and_outputs_are_those_of_the_contract(lowered: Lowered) -> None:
    def interface(graph: str) -> dict[str, tuple[str, list[str]]]:
        model = ir.load(lowered["int4", "bfloat16"] / f"{graph}.onnx").graph
        return {
            str(value.name): (
                value.dtype.name if value.dtype else "?",
                [str(dim) for dim in value.shape or ()],
            )
            for value in (*model.inputs, *model.outputs)
        }

    cache = ("BFLOAT16", ["B", "2", "C", "64"])
    caches = {
        f"{when}_{kind}.{layer}": cache for when in ("past", "present") for kind in "kv" for layer in (0, 1)
    }
    assert interface("decoder") == caches | {
        "inputs_embeds": ("FLOAT", ["B", "S", "256"]),
        "rope_cos": ("FLOAT", ["B", "S", "32"]),
        "rope_sin": ("FLOAT", ["B", "S", "32"]),
        "kv_len": ("INT32", ["2", "B"]),
        "last_index": ("INT32", ["B"]),
        "logits": ("FLOAT", ["B", "300"]),
        "q_window": ("BFLOAT16", ["2", "B", "4", "window", "64"]),
        "hidden_norm": ("FLOAT", ["2", "B", "S"]),
    }
    assert interface("vision") == {
        "pixel_values": ("FLOAT", ["N", "1176"]),
        "rope_cos": ("FLOAT", ["M", "16"]),
        "rope_sin": ("FLOAT", ["M", "16"]),
        "gather_idx": ("INT64", ["M"]),
        "window_valid": ("BOOL", ["nW", "64"]),
        "real_slots": ("INT64", ["N"]),
        "back_slots": ("INT64", ["M"]),
        "unpad_idx": ("INT64", ["T"]),
        "image_embeds": ("FLOAT", ["T", "256"]),
    }
    assert interface("compress")["rows"] == ("INT64", ["2", "1", "1", "E"])


def test_plugins_get_their_attributes_and_lengths_twice(lowered: Lowered) -> None:
    nodes = [
        node
        for graph in ("vision", "decoder", "compress")
        for node in ir.load(lowered["int4", "float16"] / f"{graph}.onnx").graph
        if node.domain == "ai.starkv"
    ]
    attributes = {
        node.op_type: {name: value.value for name, value in node.attributes.items()} for node in nodes
    }
    names = {"plugin_namespace": "ai.starkv", "plugin_version": "1"}
    assert attributes == {
        "FullAttention": names | {"num_heads": 2},
        "KVAttention": names | {"num_heads": 4, "kv_num_heads": 2},
        "KVCompress": names | {"pooling": "avgpool", "pooling_kernel": 5},
    }
    for node in nodes:
        if node.op_type == "KVAttention":
            assert node.inputs[5] is node.inputs[6]


@pytest.mark.parametrize("preset", PLAIN_PRESETS)
def test_gui_tiny_is_lowered_for_every_version(tmp_path: Path, preset: str) -> None:
    resolved = resolve_model("gui-tiny")
    export_model(resolved.folder, resolved.card, tmp_path / "export", PRESETS[preset])
    for name, target in TARGETS.items():
        for dtype in DTYPES:
            out = tmp_path / f"{name}-{dtype}"
            out.mkdir()
            graphs = lower_to_trt(tmp_path / "export", out, target, dtype)
            assert [graph.name for graph in graphs] == ["vision", "decoder", "compress"]
