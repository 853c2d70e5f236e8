# SPDX-License-Identifier: Apache-2.0
"""The fake's plan: a graph with all that was settled when it was built."""

import hashlib
import pickle
from dataclasses import dataclass, field, replace
from typing import Any

import onnx
from numpy.typing import NDArray

from starkv.gpu import Gpu

_MAGIC = b"FAKEPLAN"
_DIGEST = 32
HEAD = len(_MAGIC) + _DIGEST + 8
"""Bytes before the body, which end with its length."""

_QUANTIZED = (onnx.TensorProto.INT4, onnx.TensorProto.INT8)
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Tensor:
    """An input or output; the type by its name in ``DataType``."""

    name: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Plan:
    version: str
    gpu: Gpu | None
    compatibility: str
    """Name of its ``HardwareCompatibilityLevel``."""
    graph: bytes
    opset: int
    constants: dict[str, NDArray[Any]]
    inputs: list[Tensor]
    outputs: list[Tensor]
    profiles: list[dict[str, tuple[tuple[int, ...], ...]]]
    aliases: dict[str, str]
    flags: frozenset[str]
    verbosity: str
    """Name of its ``ProfilingVerbosity``."""
    debug: list[str]
    digests: dict[str, str] = field(default_factory=dict)
    """Weight that can be put in again → hash of what it was."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Constant → bytes."""

    @property
    def stripped(self) -> bool:
        return "STRIP_PLAN" in self.flags

    @property
    def refittable(self) -> bool:
        # NvInfer.h BuilderFlag::kSTRIP_PLAN: only of use for engines that can be refitted.
        return bool(self.flags & {"REFIT", "REFIT_IDENTICAL", "STRIP_PLAN"})

    @property
    def streaming(self) -> bool:
        return "WEIGHT_STREAMING" in self.flags

    @property
    def weight_bytes(self) -> int:
        return sum(self.sizes.values())


def described(plan: Plan) -> Plan:
    """The plan with sizes and hashes of its constants."""
    graph = onnx.GraphProto.FromString(plan.graph)
    weights = {t.name for t in graph.initializer if t.data_type in (*_FLOATS, *_QUANTIZED)}
    sizes = {tensor.name: _bytes(tensor, plan.constants[tensor.name]) for tensor in graph.initializer}
    digests = {name: digest(plan.constants[name]) for name in sorted(weights)} if plan.refittable else {}
    return replace(plan, sizes=sizes, digests=digests)


def _bytes(tensor: onnx.TensorProto, content: NDArray[Any]) -> int:
    return (content.size + 1) // 2 if tensor.data_type == onnx.TensorProto.INT4 else content.nbytes


def digest(content: NDArray[Any]) -> str:
    return hashlib.sha256(content.tobytes()).hexdigest()


def write(plan: Plan) -> bytes:
    if plan.stripped:
        kept = {name: array for name, array in plan.constants.items() if name not in plan.digests}
        plan = replace(plan, constants=kept)
    body = pickle.dumps(plan)
    return _MAGIC + hashlib.sha256(body).digest() + len(body).to_bytes(8, "little") + body


def body_length(head: bytes) -> int:
    """Bytes that follow the head of a plan; 0 where it is none."""
    return int.from_bytes(head[-8:], "little") if len(head) == HEAD and head.startswith(_MAGIC) else 0


def read(content: bytes) -> Plan | None:
    """The plan; None where the bytes are none, or some are missing or wrong."""
    head, body = content[:HEAD], content[HEAD:]
    if not body or len(body) != body_length(head):
        return None
    if hashlib.sha256(body).digest() != head[len(_MAGIC) : len(_MAGIC) + _DIGEST]:
        return None
    found: Plan = pickle.loads(body)
    return found
