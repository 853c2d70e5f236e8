# SPDX-License-Identifier: Apache-2.0
"""Plugin nodes of lowered graphs run by the real plugins: each node's own attributes, inputs and outputs go
through ``createPlugin``, ``onShapeChange`` and ``enqueue``, as TensorRT would do it."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import onnx
import pytest
import torch
from fake_tensorrt.plugin_nodes import ALIASES, Array, array_of, tensor_of
from plugin_build import build, header_folders
from torch import Tensor

from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.library_paths import plugin_libraries
from starkv.kernels.plugin_driver import COMPRESS_INPUTS, PluginDriver
from starkv.kernels.plugin_driver_abi import FieldValue

DEVICE_VARIABLE = "STARKV_TRT_PLUGINS"
"""``cpu``: the plugins' sources built for the processor (the default). ``cuda``: ``libstarkv_trt.so``, on a
GPU."""
_FOR_TENSORRT = ("plugin_namespace", "plugin_version")
"""Attributes that say which plugin; the others are the plugin's own."""


def plugin_driver(folder: Path) -> PluginDriver:
    """The plugins that the environment asks for; the test is skipped where they can't be had.

    Args:
        folder: where to build.
    """
    device = os.environ.get(DEVICE_VARIABLE, "cpu")
    if device == "cpu":
        headers = header_folders()
        if not headers:
            pytest.skip("no TensorRT headers; name their folders in STARKV_TENSORRT_HEADERS")
        built = build(headers[0], folder)
        return PluginDriver(built.plugin, built.driver)
    libraries = plugin_libraries("cuda")
    if libraries is None or not torch.cuda.is_available():
        pytest.skip("no GPU, or no libstarkv_trt.so (`make plugin`)")
    return PluginDriver(*libraries)


class PluginExecutor:
    """Runs plugin nodes, for ``fake_tensorrt.install``."""

    def __init__(self, driver: PluginDriver) -> None:
        self._driver = driver
        self.calls: Counter[str] = Counter()
        """How often each operator ran."""

    def __call__(self, node: onnx.NodeProto, values: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of a node. Inputs that outputs alias are written in place."""
        own = [tensor_of(values[name]) for name in node.input]
        inputs = [tensor.to(self._driver.device) for tensor in own]
        aliases = ALIASES[node.op_type]
        outputs = [
            inputs[aliases[index]] if index in aliases else tensor
            for index, tensor in enumerate(_outputs(node.op_type, inputs))
        ]
        self._driver.run(node.op_type, dict(_attributes(node)), inputs, outputs)
        for index in aliases.values():
            if inputs[index] is not own[index]:
                own[index].copy_(inputs[index])
        self.calls[node.op_type] += 1
        results = [
            own[aliases[index]] if index in aliases else tensor for index, tensor in enumerate(outputs)
        ]
        return {name: _array(tensor.cpu()) for name, tensor in zip(node.output, results, strict=True)}


def _array(tensor: Tensor) -> Array:
    numpy_has_it = tensor.dtype != torch.bfloat16
    return array_of(tensor, tensor.numpy().dtype if numpy_has_it else ml_dtypes.bfloat16)


def _attributes(node: onnx.NodeProto) -> Iterator[tuple[str, FieldValue]]:
    for attribute in node.attribute:
        if attribute.name not in _FOR_TENSORRT:
            value = onnx.helper.get_attribute_value(attribute)
            if isinstance(value, bytes):
                value = value.decode()
            yield attribute.name, tuple(value) if isinstance(value, list) else value


def _outputs(operator: str, inputs: list[Tensor]) -> list[Tensor]:
    """Memory for each output, also for those that will be an input's."""
    if operator == "FullAttention":
        return [torch.empty_like(inputs[0])]
    if operator == "KVAttention":
        return [torch.empty_like(inputs[index]) for index in (0, 3, 4)]
    if operator == "PackableKVAttention":
        return [torch.empty_like(inputs[index]) for index in (0, 3, 4, 7, 8)]
    call = CompressCall(**dict(zip(COMPRESS_INPUTS, inputs, strict=True)))
    made = CompressResult.empty_for(call)
    scores = [made.new_len, made.rows, made.scores, made.stages]
    return [call.dst_k, call.dst_v, call.dst_meta, *scores, made.mi_ema, made.pattern_ema, made.temperature]
