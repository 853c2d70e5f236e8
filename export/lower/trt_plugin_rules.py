# SPDX-License-Identifier: Apache-2.0
"""Rules about starkv's plugins: what each wants of its node. What breaks them would show in a build only."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from starkv.export.lower.trt_rule import Rule, RuleContext, attributes_of
from starkv.trt_compat.plugins import NAMESPACE

Found = Iterator[tuple[str, str]]

_CACHE = "cache"
"""Stands for one type, the same for all such tensors of a node."""
_NARROW = frozenset(("FLOAT16", "BFLOAT16"))


@dataclass(frozen=True)
class _Signature:
    """What a plugin takes."""

    inputs: tuple[str, ...]
    """Element type of each."""
    outputs: int
    attributes: frozenset[str]
    """That have no default."""
    cache_types: frozenset[str] = field(default=_NARROW)


_SIGNATURES = {
    "KVAttention": _Signature((*[_CACHE] * 5, "INT32", "INT32"), 3, frozenset(("num_heads", "kv_num_heads"))),
    "FullAttention": _Signature((_CACHE,) * 3, 1, frozenset(("num_heads",))),
    "PackableKVAttention": _Signature(
        # Codes lie in words of four bytes.
        (*[_CACHE] * 5, *["INT32"] * 5, *["FLOAT"] * 6),
        5,
        frozenset(("num_heads", "kv_num_heads", "bits", "mrope_section")),
    ),
    "KVCompress": _Signature(
        (
            *[_CACHE] * 3,
            *("FLOAT", "INT32", "INT32", "INT32", "FLOAT", "INT64"),
            *["FLOAT"] * 3,
            *(_CACHE, _CACHE, "INT32", "INT32"),
        ),
        10,
        frozenset(),
        _NARROW | {"FLOAT"},
    ),
}


def _signature(context: RuleContext) -> Found:
    for node in context.nodes:
        wanted = _SIGNATURES.get(node.op_type) if node.domain == NAMESPACE else None
        if wanted is None:
            continue
        counts = len(node.input), len(node.output)
        if counts != (len(wanted.inputs), wanted.outputs):
            expected = f"{len(wanted.inputs)} and {wanted.outputs}"
            yield node.name, f"{counts[0]} inputs and {counts[1]} outputs, not {expected}"
        if missing := wanted.attributes - attributes_of(node).keys():
            yield node.name, f"without the attribute {', '.join(sorted(missing))}"


def _types(context: RuleContext) -> Found:
    for node in context.nodes:
        wanted = _SIGNATURES.get(node.op_type) if node.domain == NAMESPACE else None
        if wanted is None:
            continue
        cache = context.type_name(node.input[0])
        if cache not in wanted.cache_types:
            yield node.name, f"{node.input[0]} is {cache}, not {' or '.join(sorted(wanted.cache_types))}"
        for name, kind in zip(node.input, wanted.inputs, strict=False):
            expected, given = cache if kind == _CACHE else kind, context.type_name(name)
            if given != expected:
                yield node.name, f"{name} is {given}, not {expected}"


PLUGIN_RULES = (
    Rule("plugin-signature", "docs/tensorrt-plugin.md: inputs, outputs, attributes", _signature),
    Rule("plugin-types", "docs/tensorrt-plugin.md: types of inputs", _types),
)
