# SPDX-License-Identifier: Apache-2.0
"""Calls of ``LowRankKVAttention`` in a decoder, see ``starkv/onnx_low_rank.py``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from starkv.onnx_low_rank import OUTPUTS, low_rank_function, low_rank_inputs
from starkv.onnx_low_rank_shape import LowRankShape
from starkv.onnx_ops import DOMAIN, DOMAIN_VERSION


def low_rank_node(model: ir.Model, shape: LowRankShape, inputs: Mapping[str, ir.Value], name: str) -> ir.Node:
    """A call of the operator, whose definition is added to ``model`` if it is not there yet.

    Args:
        model: gets the definition; the node may be put into its graph or into a branch of it.
        shape: of the layer.
        inputs: one value per name of :func:`starkv.onnx_low_rank.low_rank_inputs`.
        name: of the node, and stem of its outputs' names.

    Returns:
        The node, in no graph yet, with the outputs out, present_tail_k and present_tail_v.

    Raises:
        ValueError: an input is missing or unknown.
    """
    names = low_rank_inputs(shape)
    if set(inputs) != set(names):
        raise ValueError(f"{name}: missing or unknown inputs {sorted(set(inputs) ^ set(names))}")
    key = (DOMAIN, shape.function_name, "")
    if key not in model.functions:
        model.functions[key] = ir.from_proto(low_rank_function(shape))
    model.opset_imports.setdefault(DOMAIN, DOMAIN_VERSION)
    values = [inputs[input_name] for input_name in names]
    node = ir.node(shape.function_name, values, domain=DOMAIN, num_outputs=len(OUTPUTS), name=name)
    shapes = (inputs["q"].shape, inputs["tail_k"].shape, inputs["tail_v"].shape)
    for output, output_name, output_shape in zip(node.outputs, OUTPUTS, shapes, strict=True):
        output.name, output.dtype, output.shape = f"{name}.{output_name}", ir.DataType.FLOAT, output_shape
    return node


def stacked_key_factors(shape: LowRankShape, factors: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """The operator's constant ``up_k`` from one factor per group of KV heads.

    Args:
        shape: of the layer.
        factors: [heads of the group * D, rank] each, latent → channels.

    Returns:
        [W, heads of a group * D] float32; zero in padding lanes.

    Raises:
        ValueError: a factor is missing or has another shape.
    """
    width = shape.group_heads * shape.head_dim
    expected = [(width, rank) for rank in shape.key_ranks]
    if [factor.shape for factor in factors] != expected:
        raise ValueError(f"key factors are {[factor.shape for factor in factors]} instead of {expected}")
    return np.ascontiguousarray(shape.key_lanes.join(factors).T, np.float32)
