# SPDX-License-Identifier: Apache-2.0
"""Every rule about graphs for TensorRT, broken on purpose."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import TinyModel
from graph_changes import (
    add,
    attention,
    constant,
    drop_attribute,
    drop_length,
    node_of,
    other_type,
    rename,
    replace_codes,
    replace_scales,
    set_attribute,
    set_external,
    set_opset,
    top_k,
    unnamed,
)
from lowered_graphs import TARGETS
from onnx import TensorProto, helper
from small_engines import packing

from starkv.export.lower.trt import lower_to_trt
from starkv.export.lower.trt_rules import RULES, LoweringError, check_trt_graph, require_valid
from starkv.trt_compat.version import NEWEST, OLDEST, TensorRTVersion

Break = Callable[[onnx.ModelProto], object]


@pytest.fixture(scope="module")
def graphs(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lowered graphs, and copies with something wrong, which share their data files."""
    folder = tmp_path_factory.mktemp("rules")
    lower_to_trt(tiny.exports["int4"], folder, OLDEST, "bfloat16")
    return folder


BROKEN: dict[str, tuple[str, Break]] = {
    "an opset of later": ("versions", lambda model: set_opset(model, 23)),
    "an IR version of later": ("versions", lambda model: setattr(model, "ir_version", 11)),
    "a function": (
        "no-functions",
        lambda model: model.functions.append(
            helper.make_function("ai.starkv", "KVAttention", [], [], [], [helper.make_opsetid("", 21)])
        ),
    ),
    "two nodes of one name": ("names", lambda model: rename(model, model.graph.node[4].name)),
    "a node without a name": ("names", lambda model: rename(model, "")),
    "a long name": ("names", lambda model: rename(model, "n" * 4096)),
    "an input in double": ("interface", lambda model: other_type(model, "rope_cos", TensorProto.DOUBLE)),
    "an output that is computed in another type": (
        "interface",
        lambda model: other_type(model, "present_k.0", TensorProto.FLOAT16),
    ),
    "nine dimensions": (
        "interface",
        lambda model: model.graph.input.append(
            helper.make_tensor_value_info("deep", TensorProto.FLOAT, [1] * 9)
        ),
    ),
    "a dimension without a name": ("named-dimensions", unnamed),
    "a constant in double": ("constants", lambda model: constant(model, "pi", np.array([3.14]))),
    "weights in another folder": (
        "constants",
        lambda model: set_external(model, "location", "../decoder.data"),
    ),
    "weights in a file that is missing": (
        "constants",
        lambda model: set_external(model, "location", "other.data"),
    ),
    "weights behind the end of the file": (
        "constants",
        lambda model: set_external(model, "offset", "1" * 12),
    ),
    "an unknown entry about weights": ("constants", lambda model: set_external(model, "basepath", "x")),
    "weights without a length": ("constants", drop_length),
    "an operator of no parser": ("known-operators", lambda model: add(model, "Det", ["inputs_embeds"])),
    "an operator of another domain": (
        "known-operators",
        lambda model: add(model, "BiasGelu", ["inputs_embeds"], domain="com.microsoft"),
    ),
    "an unknown plugin": (
        "known-operators",
        lambda model: add(model, "ScoreStarKV", ["inputs_embeds"], domain="ai.starkv"),
    ),
    "a plugin named like an ONNX operator": (
        "no-collisions",
        lambda model: add(model, "Compress", ["inputs_embeds"], domain="ai.starkv"),
    ),
    "a plugin without its namespace": (
        "plugin-attributes",
        lambda model: drop_attribute(model, "KVAttention", "plugin_namespace"),
    ),
    "a plugin of another version": (
        "plugin-attributes",
        lambda model: set_attribute(model, "KVAttention", "plugin_version", "2"),
    ),
    "a plugin with a missing input": (
        "plugin-attributes",
        lambda model: node_of(model, "KVAttention").input.__setitem__(6, ""),
    ),
    "a plugin with too few inputs": (
        "plugin-signature",
        lambda model: node_of(model, "KVAttention").input.pop(),
    ),
    "a plugin without its heads": (
        "plugin-signature",
        lambda model: drop_attribute(model, "KVAttention", "kv_num_heads"),
    ),
    "a plugin with a cache of another type": (
        "plugin-types",
        lambda model: other_type(model, "past_k.0", TensorProto.FLOAT16),
    ),
    "a plugin with a float32 query": (
        "plugin-types",
        lambda model: node_of(model, "KVAttention").input.__setitem__(0, "inputs_embeds"),
    ),
    "a sum of two types": (
        "one-type",
        lambda model: add(model, "Add", ["inputs_embeds", node_of(model, "MatMul").output[0]]),
    ),
    "a norm whose weight has another type": (
        "one-type",
        lambda model: add(
            model, "LayerNormalization", ["inputs_embeds", constant(model, "w", np.ones(256, np.float16))]
        ),
    ),
    "a choice of two types": (
        "one-type",
        lambda model: add(
            model,
            "Where",
            [
                constant(model, "c", np.array([True])),
                "inputs_embeds",
                constant(model, "x", np.ones(1, np.float16)),
            ],
        ),
    ),
    "a softmax of integers": ("float-operators", lambda model: add(model, "Softmax", ["last_index"])),
    "axes that are computed": (
        "constant-operands",
        lambda model: add(model, "Unsqueeze", ["inputs_embeds", "last_index"]),
    ),
    "a cast to 8 bits": ("casts", lambda model: add(model, "Cast", ["inputs_embeds"], to=TensorProto.INT8)),
    "too many of the largest": ("top-k", lambda model: top_k(model, 3840)),
    "the largest in any order": ("top-k", lambda model: top_k(model, 5, sorted=0)),
    "the largest, a number that is computed": (
        "top-k",
        lambda model: add(model, "TopK", ["inputs_embeds", "last_index"], outputs=2),
    ),
    "attention with a history": (
        "attention",
        lambda model: attention(model, more=["", "past_k.0", "past_v.0"]),
    ),
    "attention with padding": (
        "attention",
        lambda model: attention(model, more=["", "", "", "last_index"]),
    ),
    "causal attention": ("attention", lambda model: attention(model, is_causal=1)),
    "attention with a soft cap": ("attention", lambda model: attention(model, softcap=30.0)),
    "attention that must be fused": ("attention", lambda model: attention(model, TRT_decomposable=0)),
    "attention with its scores": ("attention", lambda model: attention(model, outputs=4)),
    "TensorRT's own cache": (
        "no-cache-update",
        lambda model: add(model, "TensorScatter", ["past_k.0", "past_v.0", "last_index"]),
    ),
    "quantized activations": (
        "weights-only",
        lambda model: add(model, "QuantizeLinear", ["inputs_embeds", constant(model, "s", np.ones(1))]),
    ),
    "codes that are computed": (
        "weights-only",
        lambda model: node_of(model, "DequantizeLinear").input.__setitem__(0, "last_index"),
    ),
    "8 bits in blocks": (
        "weights-only",
        lambda model: node_of(model, "DequantizeLinear").input.__setitem__(
            0, constant(model, "bytes", np.zeros((256, 512), np.int8))
        ),
    ),
    "codes that are read as numbers": (
        "weights-only",
        lambda model: add(model, "MatMul", ["inputs_embeds", node_of(model, "DequantizeLinear").input[0]]),
    ),
    "a zero point": (
        "symmetric",
        lambda model: node_of(model, "DequantizeLinear").input.append(
            constant(model, "zero", np.zeros((2, 512), np.int8))
        ),
    ),
    "blocks of 32": ("blocks", lambda model: replace_scales(model, lambda scales: np.repeat(scales, 4, 0))),
    "scales of another width": ("blocks", lambda model: replace_scales(model, lambda scales: scales[:, :-2])),
    "an axis that does not fit": (
        "blocks",
        lambda model: set_attribute(model, "DequantizeLinear", "axis", 1),
    ),
    "an odd number of columns": ("blocks", lambda model: replace_codes(model, 5)),
    "a scale of 0": ("positive-scales", lambda model: replace_scales(model, lambda scales: scales * 0)),
}
"""What is wrong → the rule, and how to do it wrong."""


def broken(graphs: Path, change: Break) -> Path:
    model = onnx.load(graphs / "decoder.onnx", load_external_data=False)
    change(model)
    path = graphs / "broken.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(("rule", "change"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_rule_is_named(graphs: Path, rule: str, change: Break) -> None:
    found = check_trt_graph(broken(graphs, change), OLDEST)
    assert rule in {violation.rule for violation in found}, [str(violation) for violation in found]


def test_every_rule_is_broken_by_some_test() -> None:
    assert {rule.name for rule in RULES} == {rule for rule, _ in BROKEN.values()}
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.source for rule in RULES)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("name", ["vision", "decoder", "compress"])
def test_lowered_graphs_break_no_rule(graphs: Path, name: str, target: TensorRTVersion) -> None:
    assert check_trt_graph(graphs / f"{name}.onnx", target) == []


def test_rules_know_the_packable_cache(tmp_path: Path) -> None:
    path = packing(tmp_path / "p.onnx")

    def broken_plugin_rules() -> list[str]:
        return [str(found) for found in check_trt_graph(path, OLDEST) if found.rule.startswith("plugin-")]

    assert broken_plugin_rules() == []
    model = onnx.load(path)
    for name in ("past_v_codes", "present_v_codes"):
        other_type(model, name, TensorProto.INT8)
    drop_attribute(model, "PackableKVAttention", "bits")
    onnx.save(model, path)
    missing, kind = broken_plugin_rules()
    assert missing.startswith("attend: without the attribute bits")
    assert kind.startswith("attend: past_v_codes is INT8, not INT32")


def test_the_error_is_one_line_that_names_node_rule_source_and_version(graphs: Path) -> None:
    path = broken(graphs, lambda model: add(model, "RMSNormalization", ["inputs_embeds"]))
    with pytest.raises(LoweringError) as error:
        require_valid(path, OLDEST)
    assert str(error.value) == (
        "broken.onnx can't be parsed by TensorRT 10.3: added: RMSNormalization: parsers know it from 10.15 "
        "on (rule known-operators, onnxOpImporters.cpp; docs/Changelog.md for later versions)"
    )
    assert len(error.value.violations) == 1
    require_valid(path, NEWEST)


def test_many_violations_are_counted_not_listed(graphs: Path) -> None:
    def rename_all(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.domain = "elsewhere"

    with pytest.raises(LoweringError, match=r"; and \d+ more$"):
        require_valid(broken(graphs, rename_all), OLDEST)
