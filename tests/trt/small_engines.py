# SPDX-License-Identifier: Apache-2.0
"""Small networks on the fake TensorRT, through its own names, as a program without starkv would use it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from fake_cuda import FakeCuda
from onnx import TensorProto, helper

FLOAT, BF16, INT32 = TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.INT32
PLUGIN = {"plugin_namespace": "ai.starkv", "plugin_version": "1"}
SCALE = np.full(4, 3.0, np.float32)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 21,
) -> Path:
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, stored)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("ai.starkv", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def scaled(path: Path) -> Path:
    """``y = x * 3`` for x [N,4]."""
    node = helper.make_node("Mul", ["x", "scale"], ["y"], name="times")
    return save(path, [node], [value("x", FLOAT, "N", 4)], [value("y", FLOAT, "N", 4)], {"scale": SCALE})


def attending(path: Path, **attributes: Any) -> Path:
    """One KVAttention: 2 query heads, 1 KV head of 64."""
    names = ["q", "k", "v", "past_k", "past_v", "kv_len", "kv_len"]
    given = {**PLUGIN, "num_heads": 2, "kv_num_heads": 1, **attributes}
    node = helper.make_node(
        "KVAttention", names, ["out", "present_k", "present_v"], name="attend", domain="ai.starkv", **given
    )
    cache = ("B", 1, "C", 64)
    inputs = [
        value("q", BF16, "B", "S", 128),
        *(value(name, BF16, "B", "S", 64) for name in "kv"),
        *(value(f"past_{name}", BF16, *cache) for name in "kv"),
        value("kv_len", INT32, "B"),
    ]
    outputs = [value("out", BF16, "B", "S", 128), *(value(f"present_{n}", BF16, *cache) for n in "kv")]
    return save(path, [node], inputs, outputs)


def packing(path: Path) -> Path:
    """One PackableKVAttention over codes of 4 bits: 2 query heads, 1 KV head of 64."""
    names = ["q", "k", "v", "past_k", "past_v", "kv_len", "kv_len", "past_k_codes", "past_v_codes"]
    parameters = ["k_scale", "v_scale", "k_bias", "v_bias"]
    names += ["positions", *parameters, "cos_table", "sin_table"]
    heads = {"num_heads": 2, "kv_num_heads": 1, "bits": 4, "mrope_section": [8, 12, 12]}
    presents = ["present_k", "present_v", "present_k_codes", "present_v_codes"]
    node = helper.make_node(
        "PackableKVAttention", names, ["out", *presents], name="attend", domain="ai.starkv", **PLUGIN, **heads
    )
    cache, codes = ("B", 1, "C", 64), ("B", 1, "K", 8)
    inputs = [
        value("q", BF16, "B", "S", 128),
        *(value(name, BF16, "B", "S", 64) for name in "kv"),
        *(value(f"past_{name}", BF16, *cache) for name in "kv"),
        value("kv_len", INT32, "B"),
        *(value(f"past_{name}_codes", INT32, *codes) for name in "kv"),
        value("positions", INT32, "B", "K", 3),
    ]
    outputs = [
        value("out", BF16, "B", "S", 128),
        *(value(f"present_{name}", BF16, *cache) for name in "kv"),
        *(value(f"present_{name}_codes", INT32, *codes) for name in "kv"),
    ]
    tables = {"cos_table": np.ones((16, 32), np.float32), "sin_table": np.zeros((16, 32), np.float32)}
    ones = dict.fromkeys(parameters, np.ones(64, np.float32))
    return save(path, [node], inputs, outputs, ones | tables)


def chained(path: Path) -> Path:
    """``y = sqrt(x * 4) + 1`` for x [N], in steps ``a`` and ``b``."""
    nodes = [
        helper.make_node("Mul", ["x", "four"], ["a"], name="times"),
        helper.make_node("Sqrt", ["a"], ["b"], name="root"),
        helper.make_node("Add", ["b", "one"], ["y"], name="plus"),
    ]
    constants = {"four": np.full(1, 4, np.float32), "one": np.ones(1, np.float32)}
    return save(path, nodes, [value("x", FLOAT, "N")], [value("y", FLOAT, "N")], constants)


ATTENDING_SHAPES = {
    "q": ((1, 1, 128), (1, 4, 128), (1, 8, 128)),
    **dict.fromkeys("kv", ((1, 1, 64), (1, 4, 64), (1, 8, 64))),
    **{f"past_{name}": ((1, 1, 64, 64), (1, 1, 64, 64), (1, 1, 128, 64)) for name in "kv"},
    "kv_len": ((1,), (1,), (1,)),
}
PACKING_SHAPES = {
    **ATTENDING_SHAPES,
    **{f"past_{name}_codes": ((1, 1, 1, 8), (1, 1, 1, 8), (1, 1, 16, 8)) for name in "kv"},
    "positions": ((1, 1, 3), (1, 1, 3), (1, 16, 3)),
}
SCALED_SHAPES = {"x": ((1, 4), (2, 4), (8, 4))}
CHAINED_SHAPES = {"x": ((1,), (3,), (64,))}


def trt() -> Any:
    """The installed fake."""
    return sys.modules["tensorrt"]


@dataclass
class Small:
    """A network on its way through the fake; each step can be left out or done wrongly."""

    graph: Path
    shapes: dict[str, Any]
    stream: int
    cuda: FakeCuda
    preview: bool = True
    flags: tuple[str, ...] = ()
    profiles: int = 1
    change: Callable[[Any], None] = lambda config: None
    """What else is done to the configuration."""
    marked: tuple[str, ...] = ()
    """Tensors that can be looked at."""
    scratch: int | None = None
    """Bytes for activations; what the profile needs if None."""
    logger: Any = None
    held: dict[str, int] = field(default_factory=dict)

    def build(self) -> bytes | None:
        module = trt()
        self.logger = module.Logger()
        builder = module.Builder(self.logger)
        network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = module.OnnxParser(network, self.logger)
        if not parser.parse_from_file(str(self.graph)):
            raise ValueError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
        for layer in network:
            tensor = layer.get_output(0)
            assert tensor.name not in self.marked or network.mark_debug(tensor)
        config = builder.create_builder_config()
        config.set_preview_feature(module.PreviewFeature.ALIASED_PLUGIN_IO_10_03, self.preview)
        for name in self.flags:
            config.set_flag(getattr(module.BuilderFlag, name))
        for _ in range(self.profiles):
            profile = builder.create_optimization_profile()
            for name, shapes in self.shapes.items():
                profile.set_shape(name, *shapes)
            config.add_optimization_profile(profile)
        self.change(config)
        content = builder.build_serialized_network(network, config)
        return None if content is None else bytes(content)

    def engine(self, content: bytes | None = None) -> Any:
        module = trt()
        content = content or self.build()
        self.logger = module.Logger()
        return module.Runtime(self.logger).deserialize_cuda_engine(content)

    def context(self, engine: Any = None) -> Any:
        """Everything right: profile, scratch, shapes and addresses of the usual size."""
        module = trt()
        engine = engine or self.engine()
        context = engine.create_execution_context(module.ExecutionContextAllocationStrategy.USER_MANAGED)
        context.set_optimization_profile_async(0, self.stream)
        size = self.scratch or engine.get_device_memory_size_for_profile_v2(0)
        context.set_device_memory(self.place("scratch", size), size)
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if name in self.shapes:
                context.set_input_shape(name, self.shapes[name][1])
            source = name.replace("present", "past")
            context.set_tensor_address(name, self.place(source, 1 << 16))
        return context

    @property
    def said(self) -> str:
        """What the last builder or runtime logged."""
        return " ".join(self.logger._lines)

    def place(self, name: str, size: int) -> int:
        """Zeroed memory by a name; the same for the same name."""
        if name not in self.held:
            self.held[name] = self.cuda.allocate(size)
            self.cuda.clear(self.held[name], size, self.stream)
        return self.held[name]

    def put(self, name: str, array: np.ndarray) -> None:
        self.cuda.upload(self.held[name], array, self.stream)

    def get(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        array = np.empty(shape, dtype)
        self.cuda.download(array, self.held[name], self.stream)
        self.cuda.synchronize(self.stream)
        return array


BFLOAT16 = ml_dtypes.bfloat16


def check_packing(small: Small) -> None:
    """One PackableKVAttention reads a prompt into floats, then a token into codes."""
    context = small.context()
    small.put("v", np.full((1, 4, 64), 2, BFLOAT16))
    assert context.execute_async_v3(small.stream)
    floats = small.get("past_v", (1, 1, 64, 64), BFLOAT16)
    assert (floats[0, 0, :4] == 2).all()
    assert not small.get("past_v_codes", (1, 1, 1, 8), np.int32).any()
    assert (small.get("out", (1, 4, 128), BFLOAT16) == 2).all()

    for name, (_, _, most) in PACKING_SHAPES.items():
        one_token = {"q": (1, 1, 128), "k": (1, 1, 64), "v": (1, 1, 64)}
        context.set_input_shape(name, one_token.get(name, most))
    small.put("v", np.full((1, 1, 64), 4, BFLOAT16))
    assert context.execute_async_v3(small.stream)
    codes = small.get("past_v_codes", (1, 1, 16, 8), np.int32).view(np.uint8)
    # A code is v without its bias, plus 8: 4 - 1 + 8 for both halves of a byte.
    assert (codes[0, 0, 0] == 11 + 16 * 11).all()
    assert not codes[0, 0, 1:].any()
    assert (small.get("out", (1, 1, 128), BFLOAT16) == 4).all()
    np.testing.assert_array_equal(small.get("past_v", (1, 1, 64, 64), BFLOAT16), floats)
