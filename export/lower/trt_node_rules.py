# SPDX-License-Identifier: Apache-2.0
"""Rules about single nodes: known operators, attributes, constant operands, one type per operation."""

from collections.abc import Iterator

import onnx
import onnx.defs

from starkv.export.lower.trt_operators import missing_reason
from starkv.export.lower.trt_rule import Rule, RuleContext, attributes_of, text
from starkv.trt_compat.plugins import NAMESPACE, OPERATORS, VERSION

Found = Iterator[tuple[str, str]]

_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mod", "Sum", "Equal", "Less", "Greater")
_NORMS = ("LayerNormalization", "RMSNormalization")
_ONE_TYPE = frozenset((*_ELEMENTWISE, *_NORMS, "MatMul", "Gemm", "Concat"))
"""Operators whose operands must have one type in a strongly typed network."""
_ACTIVATIONS = ("Softmax", "Sigmoid", "Sqrt", "Erf", "Gelu", "Tanh", "Exp")
_FLOAT_ONLY = frozenset((*_ACTIVATIONS, "MatMul", "ReduceMean", "ReduceL2", "LayerNormalization"))
_FLOATS = frozenset(("FLOAT", "FLOAT16", "BFLOAT16"))
_CONSTANT_OPERANDS = {
    "ReduceMean": (1,),
    "ReduceL2": (1,),
    "ReduceSum": (1,),
    "Slice": (3, 4),
    "Squeeze": (1,),
    "Split": (1,),
    "Unsqueeze": (1,),
}
"""Operands that must be constants."""
_CASTS = frozenset(("FLOAT", "FLOAT16", "BFLOAT16", "INT32", "INT64", "BOOL"))
_MOST_K = 3840


def _known(context: RuleContext) -> Found:
    for node in context.nodes:
        if node.domain == NAMESPACE:
            if node.op_type not in OPERATORS:
                yield node.name, f"starkv has no plugin {node.op_type}"
        elif node.domain not in ("", "ai.onnx"):
            yield node.name, f"{node.op_type} of the domain {node.domain}"
        elif reason := missing_reason(node.op_type, context.target):
            yield node.name, f"{node.op_type}: {reason}"


def _collisions(context: RuleContext) -> Found:
    standard = {schema.name for schema in onnx.defs.get_all_schemas()}
    for node in context.nodes:
        if node.domain == NAMESPACE and node.op_type in standard:
            yield node.name, f"{node.op_type} is a standard operator too, and parsers ignore domains"


def _plugin_attributes(context: RuleContext) -> Found:
    wanted = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION}
    for node in context.nodes:
        if node.domain != NAMESPACE:
            continue
        given = {name: text(value) for name, value in attributes_of(node).items() if name in wanted}
        if given != wanted:
            yield node.name, f"plugin attributes {given}, not {wanted}"
        if any(not name for name in node.input) and node.op_type in OPERATORS:
            yield node.name, "an input of the plugin is missing"


def _one_type(context: RuleContext) -> Found:
    for node in context.nodes:
        operands = node.input[1:] if node.op_type == "Where" else node.input
        if node.op_type in _ONE_TYPE or node.op_type == "Where":
            kinds = {context.type_name(name) for name in operands if name}
            if len(kinds) > 1:
                yield node.name, f"{node.op_type} of {' and '.join(sorted(kinds))}; Casts are missing"


def _float_only(context: RuleContext) -> Found:
    for node in context.nodes:
        kind = context.type_name(node.input[0]) if node.input else "?"
        if node.op_type in _FLOAT_ONLY and kind not in _FLOATS:
            yield node.name, f"{node.op_type} of {kind}"


def _constant_operands(context: RuleContext) -> Found:
    for node in context.nodes:
        for index in _CONSTANT_OPERANDS.get(node.op_type, ()):
            if len(node.input) > index and node.input[index] and node.input[index] not in context.constants:
                yield node.name, f"operand {index} of {node.op_type} is no constant"


def _casts(context: RuleContext) -> Found:
    for node in context.nodes:
        if node.op_type == "Cast":
            kind = onnx.TensorProto.DataType.Name(attributes_of(node)["to"])
            if kind not in _CASTS:
                yield node.name, f"a cast to {kind}"


def _top_k(context: RuleContext) -> Found:
    for node in context.nodes:
        if node.op_type != "TopK":
            continue
        if attributes_of(node).get("sorted", 1) != 1:
            yield node.name, "TopK that is not sorted"
        count = context.constant(node.input[1])
        if count is None or int(count.reshape(-1)[0]) >= _MOST_K:
            yield node.name, f"K must be a constant below {_MOST_K}"


def _attention(context: RuleContext) -> Found:
    for node in context.nodes:
        if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
            continue
        attributes = attributes_of(node)
        if len([name for name in node.output if name]) != 1:
            yield node.name, "Attention with more than one output"
        if any(len(node.input) > index and node.input[index] for index in (4, 5)):
            yield node.name, "Attention with past_key or past_value"
        if len(node.input) > 6 and node.input[6]:
            yield node.name, "nonpad_kv_seqlen is not read: padding would be attended to"
        if attributes.get("is_causal"):
            yield node.name, "is_causal aligns at the upper left: wrong behind a history"
        if unread := {"softcap", "softmax_precision"} & attributes.keys():
            yield node.name, f"{', '.join(sorted(unread))} is not read"
        if attributes.get("TRT_decomposable") != 1:
            yield node.name, "without TRT_decomposable=1 a build fails where no kernel is fused"


def _cache_update(context: RuleContext) -> Found:
    for node in context.nodes:
        if node.op_type in ("TensorScatter", "TRT_KVCacheUpdate"):
            yield (
                node.name,
                f"{node.op_type} wants a fixed capacity, and no other alias of its cache",
            )


NODE_RULES = (
    Rule("known-operators", "onnxOpImporters.cpp; docs/Changelog.md for later versions", _known),
    Rule("no-collisions", "onnxOpCheckers.cpp: checks look at op_type alone", _collisions),
    Rule("plugin-attributes", "onnxOpImporters.cpp FallbackPluginImporter", _plugin_attributes),
    Rule("one-type", "NvInfer.h NetworkDefinitionCreationFlag::kSTRONGLY_TYPED", _one_type),
    Rule("float-operators", "docs/operators.md: supported types", _float_only),
    Rule("constant-operands", "docs/operators.md: restrictions", _constant_operands),
    Rule("casts", "NvInfer.h INetworkDefinition::addCast", _casts),
    Rule("top-k", "NvInfer.h (10.16) ITopKLayer: K below 3840; docs/operators.md", _top_k),
    Rule("attention", "onnx-tensorrt 11.1 AttentionHelpers.cpp", _attention),
    Rule("no-cache-update", "NvInfer.h (10.16) addKVCacheUpdate", _cache_update),
)
