# SPDX-License-Identifier: Apache-2.0
"""TensorRT's enumerations, as far as starkv may use them."""

from enum import Enum, IntEnum

import ml_dtypes
import numpy as np


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class DataType(Enum):
    FLOAT = np.dtype(np.float32)
    HALF = np.dtype(np.float16)
    BF16 = np.dtype(ml_dtypes.bfloat16)
    INT32 = np.dtype(np.int32)
    INT64 = np.dtype(np.int64)
    BOOL = np.dtype(np.bool_)
    INT8 = np.dtype(np.int8)


class TensorIOMode(Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class NetworkDefinitionCreationFlag(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(IntEnum):
    FP16 = 0
    INT8 = 1
    REFIT = 4
    VERSION_COMPATIBLE = 13
    STRIP_PLAN = 19
    REFIT_IDENTICAL = 20
    WEIGHT_STREAMING = 21


class PreviewFeature(IntEnum):
    ALIASED_PLUGIN_IO_10_03 = 1


class MemoryPoolType(IntEnum):
    WORKSPACE = 0


class HardwareCompatibilityLevel(IntEnum):
    NONE = 0
    AMPERE_PLUS = 1
    SAME_COMPUTE_CAPABILITY = 2


class ProfilingVerbosity(IntEnum):
    LAYER_NAMES_ONLY = 0
    NONE = 1
    DETAILED = 2


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class LayerInformationFormat(IntEnum):
    ONELINE = 0
    JSON = 1


class SeekPosition(IntEnum):
    SET = 0
    CUR = 1
    END = 2
