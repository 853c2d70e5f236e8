# SPDX-License-Identifier: Apache-2.0
"""The caches of ``low_rank_attention_cpu.py``: a model of one layer's attention each, and random inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from starkv.lowrank.rotary import Rotary
from starkv.onnx_low_rank import OUTPUTS, low_rank_function
from starkv.onnx_low_rank_shape import LaneStorage, LowRankShape
from starkv.onnx_ops import DOMAIN, DOMAIN_VERSION, OPSET
from starkv.validation.low_rank_cases import DecodeShape, screen_positions

DENSE = "dense, float32"
ROPE_BASE = 1e6
STORAGES: tuple[LaneStorage, ...] = ("float", "int8", "int4")

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Heads:
    """A layer's attention, and the ranks that it is reduced to."""

    heads: int
    kv_heads: int
    ranks: Mapping[str, tuple[int, int]]
    """Share of the channels → rank of each key head, rank of all values."""
    dim: int = 128
    sections: tuple[int, ...] = (16, 24, 24)
    tail: int = 64
    """Raw rows of a low-rank cache."""

    @property
    def kv_channels(self) -> int:
        """Of a key or a value."""
        return self.kv_heads * self.dim

    @property
    def rotary(self) -> Rotary:
        """How positions turn into angles."""
        pairs = np.arange(self.dim // 2) / (self.dim // 2)
        return Rotary(ROPE_BASE**-pairs, self.sections)

    def angles(self, positions: int) -> NDArray[np.float64]:
        """``[positions, D / 2]`` of the first positions."""
        return np.arange(positions)[:, None] * self.rotary.inverse_frequencies

    def new_row(self, random: np.random.Generator) -> Arrays:
        """A new token's query, key and value."""
        channels = {"q": self.heads * self.dim, "k": self.kv_channels, "v": self.kv_channels}
        return {name: normal(random, 1, 1, width) for name, width in channels.items()}


SHAPES = {
    "gqa": Heads(28, 4, {"50 %": (64, 256), "25 %": (32, 160)}),
    "mha": Heads(32, 32, {"50 %": (64, 2048), "25 %": (32, 1232)}),
}


@dataclass(frozen=True)
class Case:
    """One implementation: a model of one call, its inputs, and what it writes in place."""

    name: str
    model: bytes
    inputs: Callable[[np.random.Generator, int], Arrays]
    """Random ones with so many rows, the new one among them."""
    row_bytes: float
    """Cached bytes per row and layer, in the types that the model takes."""
    in_place: Mapping[str, str]
    """Output → input whose memory it shares."""


def normal(random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return random.standard_normal(shape, np.float32)


def cells(rows: int) -> NDArray[np.int32]:
    """``[1, rows, 3]``: positions of the cells of consecutive 1080p screenshots."""
    found: NDArray[np.int32] = screen_positions(rows, DecodeShape.frame).numpy()[None]
    return found


def random_codes(random: np.random.Generator, bits: int, *shape: int) -> NDArray[Any]:
    """Codes ``[..., D]`` as GroupQueryAttention takes them: int8, or uint8 with two in a byte."""
    stored = random.integers(0, 256, (*shape[:-1], shape[-1] * bits // 8), np.uint8)
    return stored.view(np.int8) if bits == 8 else stored


def one_call(node: onnx.NodeProto, inputs: Arrays, constants: Arrays, functions: list[Any]) -> bytes:
    """A model that is ``node``, for inputs of those ranks and types, however wide."""

    def declare(name: str, like: NDArray[Any]) -> onnx.ValueInfoProto:
        element = onnx.helper.np_dtype_to_tensor_dtype(like.dtype)
        return onnx.helper.make_tensor_value_info(name, element, [None] * like.ndim)

    out, *caches = node.output
    sources = {name: name.replace("present_", "past_" if "past_k" in inputs else "") for name in caches}
    graph = onnx.helper.make_graph(
        [node],
        "one_call",
        [declare(name, inputs[name]) for name in node.input if name and name not in constants],
        [declare(out, inputs["q"]), *(declare(name, inputs[source]) for name, source in sources.items())],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    versions = {"": OPSET, DOMAIN: DOMAIN_VERSION, "com.microsoft": 1}
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    return bytes(model.SerializeToString())


def dense_case(heads: Heads, bits: int) -> Case:
    """GroupQueryAttention over rows of 32, 8 or 4 bits a number, given the key bias's part of the logits."""
    quantized = bits < 32

    def inputs(random: np.random.Generator, rows: int) -> Arrays:
        size = (1, heads.kv_heads, rows, heads.dim)
        caches: Arrays = {
            name: random_codes(random, bits, *size) if quantized else normal(random, *size)
            for name in ("past_k", "past_v")
        }
        lengths = {"last_row": np.array([rows - 1], np.int32), "longest": np.array([rows], np.int32)}
        logits = {"bias_logits": normal(random, 1, heads.heads, 1, rows)} if quantized else {}
        return heads.new_row(random) | caches | lengths | logits

    names = ["q", "k", "v", "past_k", "past_v", "last_row", "longest"]
    attributes: dict[str, Any] = {"num_heads": heads.heads, "kv_num_heads": heads.kv_heads, "do_rotary": 0}
    constants: Arrays = {}
    if quantized:
        names += ["", "", "", "bias_logits", "", "k_scale", "v_scale"]
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        attributes |= {"kv_cache_bit_width": bits}
        constants = dict.fromkeys(("k_scale", "v_scale"), np.full(heads.kv_channels, 0.02, np.float32))
    in_place = {"present_k": "past_k", "present_v": "past_v"}
    node = onnx.helper.make_node(
        "GroupQueryAttention", names, ["out", *in_place], domain="com.microsoft", **attributes
    )
    model = one_call(node, inputs(np.random.default_rng(0), 1), constants, [])
    name = f"int{bits}, the operator alone" if quantized else DENSE
    return Case(name, model, inputs, 2 * heads.kv_channels * bits / 8, in_place)


def low_rank_case(heads: Heads, share: str, storage: LaneStorage) -> Case:
    """LowRankKVAttention with all rows packed but those of the tail."""
    key_rank, value_rank = heads.ranks[share]
    shape = LowRankShape(
        heads.heads,
        heads.kv_heads,
        heads.dim,
        (key_rank,) * heads.kv_heads,
        value_rank,
        heads.sections,
        storage,
    )
    width, groups, random = shape.key_lanes.lanes, heads.kv_heads, np.random.default_rng(1)
    constants: Arrays = {
        "up_k": normal(random, width, shape.group_heads * heads.dim) / 8,
        "k_bias": normal(random, heads.kv_channels),
        "up_v": normal(random, heads.kv_channels, value_rank) / 16,
        "v_bias": normal(random, heads.kv_channels),
    }

    def latents(random: np.random.Generator, packed: int) -> Arrays:
        if storage == "float":
            return {
                "k_latent": normal(random, 1, packed, width),
                "v_latent": normal(random, 1, packed, value_rank),
            }
        half = storage == "int4"
        stored = (width // 2, shape.value_row) if half else (width, value_rank)
        k_codes, v_codes = (random.integers(0, 256, (1, packed, count), np.uint8) for count in stored)
        return {
            "k_codes": k_codes if half else k_codes.view(np.int8),
            "v_codes": v_codes if half else v_codes.view(np.int8),
            "k_scales": np.full((1, packed, groups, 2), 0.02, np.float32),
            "v_scales": np.full((1, packed, 2), 0.02, np.float32),
        }

    def inputs(random: np.random.Generator, rows: int) -> Arrays:
        packed = rows - heads.tail
        positions = cells(packed)
        angles = heads.angles(int(positions.max()) + 1)
        rest = {
            "packed_len": np.array([packed], np.int32),
            "positions": positions,
            "cos_table": np.cos(angles).astype(np.float32),
            "sin_table": np.sin(angles).astype(np.float32),
            "tail_k": normal(random, 1, heads.kv_heads, heads.tail, heads.dim),
            "tail_v": normal(random, 1, heads.kv_heads, heads.tail, heads.dim),
            "tail_len": np.array([heads.tail - 1], np.int32),
        }
        return heads.new_row(random) | latents(random, packed) | rest

    function = low_rank_function(shape)
    node = onnx.helper.make_node(function.name, function.input, OUTPUTS, domain=DOMAIN)
    model = one_call(node, inputs(random, heads.tail + 1), constants, [function])
    row_bytes = sum(array.nbytes for array in latents(random, 1).values())
    in_place = {"present_tail_k": "tail_k", "present_tail_v": "tail_v"}
    return Case(f"rank {share}, {storage}", model, inputs, row_bytes, in_place)
