# SPDX-License-Identifier: Apache-2.0
"""TensorRT's enumerations, as far as starkv may use them, with each version's members and numbers.

Names and numbers are those of NvInfer.h and NvInferRuntime.h of 10.3, 10.13, 10.16 and 11.1. TensorRT 11
took members away and moved the numbers of those behind.
"""

from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np


class Number(Enum):
    """Like the bindings': can be made an ``int``, but is none, and equals none."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


SEVERITIES = Number(  # type: ignore[call-overload]
    "Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4}, module=__name__
)
"""``ILogger.Severity``, the same in all versions."""


@dataclass(frozen=True)
class _Member:
    """Numbers of a member; None where the major version lacks it."""

    in_10: int | None
    in_11: int | None
    since: tuple[int, int] = (10, 0)


def _both(number: int, since: tuple[int, int] = (10, 0)) -> _Member:
    return _Member(number, number, since)


_MEMBERS: dict[str, dict[str, _Member]] = {
    "DataType": {
        "FLOAT": _both(0),
        "HALF": _both(1),
        "INT8": _both(2),
        "INT32": _both(3),
        "BOOL": _both(4),
        "UINT8": _both(5),
        "FP8": _both(6),
        "BF16": _both(7),
        "INT64": _both(8),
        "INT4": _both(9),
    },
    "TensorIOMode": {"NONE": _both(0), "INPUT": _both(1), "OUTPUT": _both(2)},
    "TensorLocation": {"DEVICE": _both(0), "HOST": _both(1)},
    "NetworkDefinitionCreationFlag": {
        "EXPLICIT_BATCH": _Member(0, None),
        "STRONGLY_TYPED": _Member(1, 0),
    },
    "OnnxParserFlag": {
        "NATIVE_INSTANCENORM": _both(0),
        "ENABLE_PLUGIN_OVERRIDE": _both(3, since=(10, 15)),
    },
    "BuilderFlag": {
        "FP16": _Member(0, None),
        "INT8": _Member(1, None),
        "BF16": _Member(17, None),
        "DEBUG": _both(2),
        "REFIT": _both(4),
        "DISABLE_TIMING_CACHE": _both(5),
        "TF32": _both(6),
        "VERSION_COMPATIBLE": _Member(13, 12),
        "EXCLUDE_LEAN_RUNTIME": _Member(14, 13),
        "STRIP_PLAN": _Member(19, 18),
        "REFIT_IDENTICAL": _Member(20, 19),
        "WEIGHT_STREAMING": _Member(21, 20),
        "REFIT_INDIVIDUAL": _Member(23, 22),
    },
    "PreviewFeature": {
        "PROFILE_SHARING_0806": _Member(0, None),
        "ALIASED_PLUGIN_IO_10_03": _Member(1, 0),
        "RUNTIME_ACTIVATION_RESIZE_10_10": _Member(2, 1, since=(10, 10)),
    },
    "MemoryPoolType": {"WORKSPACE": _both(0), "TACTIC_DRAM": _both(4), "TACTIC_SHARED_MEMORY": _both(5)},
    "HardwareCompatibilityLevel": {
        "NONE": _both(0),
        "AMPERE_PLUS": _both(1),
        "SAME_COMPUTE_CAPABILITY": _both(2, since=(10, 9)),
    },
    "ProfilingVerbosity": {"LAYER_NAMES_ONLY": _both(0), "NONE": _both(1), "DETAILED": _both(2)},
    "ExecutionContextAllocationStrategy": {
        "STATIC": _both(0),
        "ON_PROFILE_CHANGE": _both(1),
        "USER_MANAGED": _both(2),
    },
    "LayerInformationFormat": {"ONELINE": _both(0), "JSON": _both(1)},
    "SeekPosition": {
        "SET": _both(0, since=(10, 7)),
        "CUR": _both(1, since=(10, 7)),
        "END": _both(2, since=(10, 7)),
    },
    "TensorFormat": {"LINEAR": _both(0)},
}

KINDS: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
"""Types of inputs and outputs as numpy's."""


@cache
def enumerations(numbers: tuple[int, int]) -> dict[str, Any]:
    """All enumerations of a version; those that it lacks are missing."""
    found = {}
    for name, members in _MEMBERS.items():
        held: dict[str, int] = {}
        for member, known in members.items():
            number = known.in_11 if numbers[0] >= 11 else known.in_10
            if number is not None and numbers >= known.since:
                held[member] = number
        if held:
            found[name] = Number(name, held, module=__name__)  # type: ignore[call-overload]
    return found


def kind_name(dtype: Any) -> str:
    """Name of a numpy type in ``DataType``.

    Raises:
        KeyError: inputs and outputs can't have it.
    """
    return {kind: name for name, kind in KINDS.items()}[np.dtype(dtype)]
