# SPDX-License-Identifier: Apache-2.0
"""What a decode step's attention costs per layer on a CPU: low-rank and quantized caches against a dense one.

    python benchmarks/low_rank_attention_cpu.py --rows 1632 --threads 1 --out low-rank-attention.json

28 query heads, 4 KV heads of 128 channels, as in UI-TARS-1.5-7B; one sequence, random numbers. Dense is ONNX
Runtime's GroupQueryAttention in float32 over as many rows as the low-rank cache has packed and raw ones
together; quantized, it is given scores as the share of the key bias, which are not worked out here. Every
implementation walks over several layers with caches of their own, all of them once per round, so that none
finds its cache in the processor's. Times are medians of rounds, ratios medians of each round's ratio.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from common import report
from numpy.typing import NDArray

from starkv.onnx_low_rank import OUTPUTS, low_rank_function
from starkv.onnx_low_rank_shape import LowRankShape
from starkv.onnx_ops import DOMAIN, DOMAIN_VERSION, OPSET

HEADS, KV_HEADS, DIM = 28, 4, 128
SECTIONS = (16, 24, 24)
TAIL = 64
POSITIONS = 4096
CONSTANTS = ("up_k", "k_bias", "up_v", "v_bias", "cos_table", "sin_table")
DENSE = "dense, float32"

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """One implementation: a model of one call, its inputs, and what it writes in place."""

    name: str
    model: bytes
    inputs: Callable[[np.random.Generator], Arrays]
    in_place: dict[str, str]
    """Output → input whose memory it shares."""
    row_bytes: float
    """Cached bytes per row and layer, in the types that the model takes."""


def one_call(node: onnx.NodeProto, inputs: Arrays, constants: Arrays, functions: list[Any]) -> bytes:
    """A model that is ``node``, with outputs as wide as ONNX Runtime finds them."""

    def declare(name: str) -> onnx.ValueInfoProto:
        array = inputs[name]
        element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        return onnx.helper.make_tensor_value_info(name, element, array.shape)

    caches = {"present_k": "past_k", "present_v": "past_v"}
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1, 1, HEADS * DIM])
    outputs = [out]
    for name in node.output[1:]:
        like = inputs[caches.get(name, name.removeprefix("present_"))]
        element = onnx.helper.np_dtype_to_tensor_dtype(like.dtype)
        outputs.append(onnx.helper.make_tensor_value_info(name, element, like.shape))
    graph = onnx.helper.make_graph(
        [node],
        "one_call",
        [declare(name) for name in node.input if name and name not in constants],
        outputs,
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    versions = {"": OPSET, DOMAIN: DOMAIN_VERSION, "com.microsoft": 1}
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    return bytes(model.SerializeToString())


def normal(random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return random.standard_normal(shape, np.float32)


def new_row(random: np.random.Generator) -> Arrays:
    channels = {"q": HEADS * DIM, "k": KV_HEADS * DIM, "v": KV_HEADS * DIM}
    return {name: normal(random, 1, 1, width) for name, width in channels.items()}


def dense_case(rows: int, bits: int) -> Case:
    """GroupQueryAttention over rows of 32, 8 or 4 bits a number."""
    width = DIM // 2 if bits == 4 else DIM
    scales = {name: np.full(KV_HEADS * DIM, 0.02, np.float32) for name in ("k_scale", "v_scale")}
    quantized = bits < 32

    def inputs(random: np.random.Generator) -> Arrays:
        def cache() -> NDArray[Any]:
            shape = (1, KV_HEADS, rows, width)
            if not quantized:
                return normal(random, *shape)
            return random.integers(0, 256, shape, np.uint8).view(np.int8 if bits == 8 else np.uint8)

        lengths = {"last_row": np.array([rows - 1], np.int32), "longest": np.array([rows], np.int32)}
        caches = {"past_k": cache(), "past_v": cache()}
        biases = {"scores": normal(random, 1, HEADS, 1, rows)} if quantized else {}
        return new_row(random) | caches | lengths | biases

    names = ["q", "k", "v", "past_k", "past_v", "last_row", "longest"]
    attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "do_rotary": 0}
    if quantized:
        names += ["", "", "", "scores", "", "k_scale", "v_scale"]
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        attributes |= {"kv_cache_bit_width": bits}
    outputs = ["out", "present_k", "present_v"]
    node = onnx.helper.make_node("GroupQueryAttention", names, outputs, domain="com.microsoft", **attributes)
    model = one_call(node, inputs(np.random.default_rng(0)), scales if quantized else {}, [])
    name = f"dense, int{bits} per channel" if quantized else DENSE
    in_place = {"present_k": "past_k", "present_v": "past_v"}
    return Case(name, model, inputs, in_place, 2 * KV_HEADS * DIM * bits / 8)


def low_rank_case(rows: int, shape: LowRankShape, name: str) -> Case:
    """LowRankKVAttention with all rows packed but those of the tail."""
    packed, width, groups = rows - TAIL, shape.key_lanes.lanes, len(shape.key_ranks)
    angles = np.arange(POSITIONS)[:, None] * 1e6 ** (-np.arange(DIM // 2) / (DIM // 2))
    random = np.random.default_rng(1)
    constants: Arrays = {
        "up_k": normal(random, width, shape.group_heads * DIM) / 8,
        "k_bias": normal(random, KV_HEADS * DIM),
        "up_v": normal(random, KV_HEADS * DIM, shape.value_rank) / 16,
        "v_bias": normal(random, KV_HEADS * DIM),
        "cos_table": np.cos(angles).astype(np.float32),
        "sin_table": np.sin(angles).astype(np.float32),
    }

    def codes(random: np.random.Generator) -> Arrays:
        if shape.storage == "float":
            return {"k_latent": normal(random, 1, packed, width)} | {
                "v_latent": normal(random, 1, packed, shape.value_rank)
            }
        half = shape.storage == "int4"
        stored = (width // 2, shape.value_row) if half else (width, shape.value_rank)
        k_codes, v_codes = (random.integers(0, 256, (1, packed, count), np.uint8) for count in stored)
        return {
            "k_codes": k_codes if half else k_codes.view(np.int8),
            "v_codes": v_codes if half else v_codes.view(np.int8),
            "k_scales": np.full((1, packed, groups, 2), 0.02, np.float32),
            "v_scales": np.full((1, packed, 2), 0.02, np.float32),
        }

    def inputs(random: np.random.Generator) -> Arrays:
        rest = {
            "packed_len": np.array([packed], np.int32),
            "positions": random.integers(0, POSITIONS, (1, packed, 3), np.int32),
            "tail_k": normal(random, 1, KV_HEADS, TAIL, DIM),
            "tail_v": normal(random, 1, KV_HEADS, TAIL, DIM),
            "tail_len": np.array([TAIL - 1], np.int32),
        }
        return new_row(random) | codes(random) | rest

    example = inputs(random)
    function = low_rank_function(shape)
    node = onnx.helper.make_node(function.name, function.input, OUTPUTS, domain=DOMAIN)
    stored = [array for key, array in example.items() if key.startswith(("k_", "v_"))]
    row_bytes = sum(array.nbytes for array in stored) / packed
    in_place = {"present_tail_k": "tail_k", "present_tail_v": "tail_v"}
    return Case(name, one_call(node, example, constants, [function]), inputs, in_place, row_bytes)


class Layers:
    """One implementation's session and the bound caches of several layers."""

    def __init__(self, case: Case, layers: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = ort.InferenceSession(case.model, options, providers=["CPUExecutionProvider"])
        self._bindings = [self._bound(case, np.random.default_rng(layer)) for layer in range(layers)]

    def _bound(self, case: Case, random: np.random.Generator) -> ort.IOBinding:
        binding = self._session.io_binding()
        arrays = case.inputs(random).items()
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("out")
        for output, name in case.in_place.items():
            binding.bind_ortvalue_output(output, values[name])
        return binding

    def step(self) -> float:
        """Milliseconds per layer."""
        start = time.perf_counter()
        for binding in self._bindings:
            self._session.run_with_iobinding(binding)
        return (time.perf_counter() - start) * 1e3 / len(self._bindings)


def cases(rows: int) -> list[Case]:
    """Dense caches, and low rank at half and a quarter of the ranks."""
    found = [dense_case(rows, bits) for bits in (32, 8, 4)]
    for share, key_rank, value_rank in (("50 %", 64, 256), ("25 %", 32, 160)):
        for storage in ("float", "int8", "int4"):
            ranks = (key_rank,) * KV_HEADS
            shape = LowRankShape(HEADS, KV_HEADS, DIM, ranks, value_rank, SECTIONS, storage)
            found.append(low_rank_case(rows, shape, f"rank {share}, {storage}"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1632, help=f"of the cache, {TAIL} of them in the tail")
    parser.add_argument("--layers", type=int, default=14, help="with caches of their own")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    chosen = cases(arguments.rows)
    systems = {case.name: Layers(case, arguments.layers, arguments.threads) for case in chosen}
    for layers in systems.values():
        layers.step()
    rounds = [{name: layers.step() for name, layers in systems.items()} for _ in range(arguments.rounds)]
    table: list[tuple[str, ...]] = [("cache", "bytes a row and layer", "ms a layer", "times dense")]
    figures: dict[str, Any] = {}
    for case in chosen:
        milliseconds = float(np.median([times[case.name] for times in rounds]))
        ratio = float(np.median([times[case.name] / times[DENSE] for times in rounds]))
        table.append((case.name, f"{case.row_bytes:.0f}", f"{milliseconds:.2f}", f"{ratio:.2f}"))
        figures[case.name] = {
            "bytes_per_row": case.row_bytes,
            "milliseconds": milliseconds,
            "times_dense": ratio,
        }
    settings = {name: getattr(arguments, name) for name in ("rows", "layers", "rounds", "threads")}
    report(table, settings | {"caches": figures}, arguments.out)


if __name__ == "__main__":
    main()
