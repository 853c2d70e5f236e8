# SPDX-License-Identifier: Apache-2.0
"""The fake's plan: a graph with all that was settled when it was built."""

import hashlib
import pickle
from dataclasses import dataclass, replace
from typing import Any

from fake_tensorrt.enums import DataType
from numpy.typing import NDArray

from starkv.gpu import Gpu

_MAGIC = b"FAKEPLAN"
_DIGEST = 32

Tensor = tuple[str, tuple[int, ...], DataType]


@dataclass(frozen=True)
class Plan:
    version: str
    gpu: Gpu | None
    compatibility: int
    graph: bytes
    opset: int
    constants: dict[str, NDArray[Any]]
    inputs: list[Tensor]
    outputs: list[Tensor]
    profiles: list[dict[str, tuple[tuple[int, ...], ...]]]
    aliases: dict[str, str]
    stripped: bool
    refittable: bool
    streaming: bool
    debug: list[str]

    @property
    def weight_bytes(self) -> int:
        return sum(array.nbytes for array in self.constants.values())


def write(plan: Plan) -> bytes:
    if plan.stripped:
        small = {name: array for name, array in plan.constants.items() if array.nbytes < 256}
        plan = replace(plan, constants=small)
    body = pickle.dumps(plan)
    return _MAGIC + hashlib.sha256(body).digest() + len(body).to_bytes(8, "little") + body


def read(content: bytes) -> Plan | None:
    """The plan; None where the bytes are none."""
    start = len(_MAGIC) + _DIGEST + 8
    if content[: len(_MAGIC)] != _MAGIC or len(content) < start:
        return None
    body = content[start:]
    if len(body) != int.from_bytes(content[start - 8 : start], "little"):
        return None
    if hashlib.sha256(body).digest() != content[len(_MAGIC) : len(_MAGIC) + _DIGEST]:
        return None
    found: Plan = pickle.loads(body)
    return found
