# SPDX-License-Identifier: Apache-2.0
"""Which ONNX operators TensorRT's parser knows, by version."""

from starkv.trt_compat.version import NATIVE_ATTENTION, NATIVE_NORMS, TensorRTVersion

_SINCE_10_1 = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast
    CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
    DeformConv DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten
    Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
    Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax Identity If
    ImageScaler InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual
    Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min
    Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad ParametricSoftplus Pow
    QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round ScaledTanh Scan Scatter
    ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus
    Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu
    Unsqueeze Upsample Where Xor
"""
"""Importers of onnx-tensorrt 10.1 (``DEFINE_BUILTIN_OP_IMPORTER`` of onnxOpImporters.cpp). Later parsers
only added some."""

_LATER: dict[str, TensorRTVersion] = {
    "BlackmanWindow": TensorRTVersion(10, 4),
    "HammingWindow": TensorRTVersion(10, 4),
    "HannWindow": TensorRTVersion(10, 4),
    "STFT": TensorRTVersion(10, 5),
    "Attention": NATIVE_ATTENTION,
    "RMSNormalization": NATIVE_NORMS,
    "RotaryEmbedding": NATIVE_NORMS,
    "TensorScatter": NATIVE_NORMS,
}
"""Added later, with the first version (onnx-tensorrt, docs/Changelog.md and onnxOpImporters.cpp of 11.1)."""

_FIRST: dict[str, TensorRTVersion | None] = {**dict.fromkeys(_SINCE_10_1.split()), **_LATER}


def missing_reason(operator: str, target: TensorRTVersion) -> str | None:
    """Why the parser of a version can't import a standard operator; None if it can."""
    if operator not in _FIRST:
        return "no supported parser knows it"
    first = _FIRST[operator]
    return f"parsers know it from {first} on" if first is not None and target < first else None
