# SPDX-License-Identifier: Apache-2.0
"""``libstarkv_kernels`` on raw device pointers: the C ABI of ``plugins_trt/include/starkv_kernels.h``.

Needs no PyTorch: pointers are integers, from cuda-python, CuPy (``array.data.ptr``) or anything else. The
caller owns all memory, the workspace included. ``cuda_library.py`` does the same with PyTorch's tensors.
"""

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int32, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path

from starkv.errors import StarkvError
from starkv.kernels.c_abi_quantized import (
    CodeRowsBuffers,
    CodeRowsShape,
    QuantizedAttentionBuffers,
    QuantizedAttentionShape,
)

ABI_VERSION = 4
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
"""``starkv_dtype``."""
FULL_ATTENTION_HEAD_DIMS = (32, 64, 80, 96, 128)
"""That ``FullAttention``'s kernel takes."""
POOLINGS = {"avgpool": 0, "maxpool": 1}
"""``starkv_pooling``."""

COMPRESS_STATE = ("mi_ema", "pattern_ema", "temperature")
COMPRESS_INPUTS = (
    *("k", "v", "q_window", "hidden_norm", "kv_len", "row_meta", "frame", "parameters", "limits"),
    *COMPRESS_STATE,
    *("slot", "dst_k", "dst_v", "dst_meta"),
)
COMPRESS_OUTPUTS = ("new_len", "rows", "scores", "stages")
_COMPRESS_SIZES = (
    "layers",
    "sequences",
    "kv_heads",
    "query_heads",
    "window",
    "head_dim",
    "capacity",
    "slots",
)
_ATTENTION_SIZES = ("sequences", "new_tokens", "query_heads", "kv_heads", "head_dim", "capacity", "dtype")


@dataclass(frozen=True)
class KernelStatus:
    """A status of the library."""

    code: int
    name: str
    message: str


class KernelError(StarkvError):
    """A kernel library is missing, doesn't fit, or refused a call."""

    status: KernelStatus | None = None
    """Why it refused a call."""


class CompressShape(Structure):
    """``starkv_compress_shape``: dimensions of ``Compress``, with the header's names."""

    _fields_ = [
        (name, c_int32)
        for name in (
            *_COMPRESS_SIZES,
            *("slot_capacity", "pattern_capacity", "dtype", "pooling", "pooling_kernel"),
        )
    ]


class CompressBuffers(Structure):
    """``starkv_compress_buffers``: its pointers, with the header's names."""

    _fields_ = [
        (name, c_void_p)
        for name in (*COMPRESS_INPUTS, *COMPRESS_OUTPUTS, *(f"new_{name}" for name in COMPRESS_STATE))
    ]


class AttentionShape(Structure):
    """``starkv_attention_shape``: dimensions of ``KVAttention``."""

    _fields_ = [(name, c_int32) for name in _ATTENTION_SIZES]


class AttentionBuffers(Structure):
    """``starkv_attention_buffers``: its pointers."""

    _fields_ = [
        (name, c_void_p)
        for name in ("q", "k", "v", "past_k", "past_v", "kv_len", "present_k", "present_v", "out")
    ]


class FullAttentionShape(Structure):
    """``starkv_full_attention_shape``: dimensions of ``FullAttention``."""

    _fields_ = [(name, c_int32) for name in ("sequences", "tokens", "heads", "head_dim", "dtype")]


Shape = CompressShape | AttentionShape | QuantizedAttentionShape
Buffers = CompressBuffers | AttentionBuffers | QuantizedAttentionBuffers


class KernelAbi:
    """The functions of a kernel library. Each launches on a stream and returns at once.

    Args:
        path: ``libstarkv_kernels.so``, or the build for the processor.

    Raises:
        KernelError: no such file, it can't be loaded, or it has another ABI.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise KernelError(f"{self.path}: no such library; `make plugin` builds it")
        try:
            self._library = ctypes.CDLL(str(self.path.resolve()))
            version = self._library.starkv_abi_version()
            if version != ABI_VERSION:
                raise KernelError(
                    f"{self.path}: ABI {version}, but this starkv needs {ABI_VERSION}; build it anew"
                )
            _declare(self._library)
        except (OSError, AttributeError) as error:
            raise KernelError(f"{self.path}: not a starkv kernel library ({error})") from error

    @property
    def device(self) -> str:
        """Where pointers must lie: ``cuda``, or ``cpu`` for the build that tests use."""
        return str(self._library.starkv_device_kind().decode())

    def status(self, code: int) -> KernelStatus:
        """Name and meaning of a status code."""
        name, message = self._library.starkv_status_name(code), self._library.starkv_status_message(code)
        return KernelStatus(code, name.decode(), message.decode())

    def workspace_bytes(self, shape: Shape | FullAttentionShape) -> int:
        """Bytes of workspace that a call of that shape needs.

        Raises:
            KernelError: the kernels don't take that shape.
        """
        function = _FUNCTIONS[type(shape)]
        size = c_size_t()
        self._check(function, getattr(self._library, f"{function}_workspace")(byref(shape), byref(size)))
        return size.value

    def launch(
        self,
        shape: Shape,
        buffers: Buffers,
        workspace: int,
        workspace_bytes: int,
        stream: int | None = None,
    ) -> None:
        """Launch ``Compress``, ``KVAttention`` or ``QuantizedKVAttention``, by the type of the shape.

        Args:
            shape: dimensions.
            buffers: pointers, aligned to 16 bytes.
            workspace: pointer to at least :meth:`workspace_bytes`.
            workspace_bytes: what is there.
            stream: ``cudaStream_t``; None is the default stream.

        Raises:
            KernelError: the library refused the call.
        """
        function = _FUNCTIONS[type(shape)]
        launch = getattr(self._library, function)
        self._check(function, launch(byref(shape), byref(buffers), workspace, workspace_bytes, stream))

    def full_attention(
        self, shape: FullAttentionShape, q: int, k: int, v: int, out: int, stream: int | None = None
    ) -> None:
        """Launch ``FullAttention``; arguments as in the header.

        Raises:
            KernelError: the library refused the call.
        """
        function = "starkv_full_attention"
        self._check(function, getattr(self._library, function)(byref(shape), q, k, v, out, stream))

    def quantize_rows(
        self, shape: CodeRowsShape, buffers: CodeRowsBuffers, stream: int | None = None
    ) -> None:
        """Launch what makes codes of a float cache's rows, in a slot of a cache of codes.

        ``wrong_rows`` says afterwards which layers hold rows that have no codes; arguments as in the header.

        Raises:
            KernelError: the library refused the call.
        """
        self._check(_QUANTIZE, getattr(self._library, _QUANTIZE)(byref(shape), byref(buffers), stream))

    def dequantize_rows(
        self, shape: CodeRowsShape, buffers: CodeRowsBuffers, stream: int | None = None
    ) -> None:
        """Launch the reverse of :meth:`quantize_rows`.

        Raises:
            KernelError: the library refused the call.
        """
        self._check(_DEQUANTIZE, getattr(self._library, _DEQUANTIZE)(byref(shape), byref(buffers), stream))

    def call(self, function: str, *arguments: int | None) -> None:
        """One of the functions without structures, such as ``starkv_argmax``; arguments as in the header.

        Raises:
            KernelError: the library refused the call.
        """
        self._check(function, getattr(self._library, function)(*arguments))

    def _check(self, function: str, code: int) -> None:
        if code:
            status = self.status(code)
            error = KernelError(f"{function}: {status.name}: {status.message}")
            error.status = status
            raise error


_FUNCTIONS = {
    CompressShape: "starkv_compress",
    AttentionShape: "starkv_attention",
    QuantizedAttentionShape: "starkv_quantized_attention",
    FullAttentionShape: "starkv_full_attention",
}
_QUANTIZE, _DEQUANTIZE = "starkv_quantize_rows", "starkv_dequantize_rows"


def _declare(library: ctypes.CDLL) -> None:
    """Declare the functions' types.

    Raises:
        AttributeError: the library lacks one.
    """
    pointer, integer = c_void_p, c_int32
    for shape, buffers in (
        (CompressShape, CompressBuffers),
        (AttentionShape, AttentionBuffers),
        (QuantizedAttentionShape, QuantizedAttentionBuffers),
    ):
        name = _FUNCTIONS[shape]
        getattr(library, name).argtypes = [POINTER(shape), POINTER(buffers), pointer, c_size_t, pointer]
    for described, name in _FUNCTIONS.items():
        getattr(library, f"{name}_workspace").argtypes = [POINTER(described), POINTER(c_size_t)]
    library.starkv_full_attention.argtypes = [POINTER(FullAttentionShape), *[pointer] * 5]
    for name in (_QUANTIZE, _DEQUANTIZE):
        getattr(library, name).argtypes = [POINTER(CodeRowsShape), POINTER(CodeRowsBuffers), pointer]
    library.starkv_embedding_gather.argtypes = [pointer] * 3 + [integer] * 4 + [pointer]
    library.starkv_argmax.argtypes = [pointer] * 2 + [integer] * 2 + [pointer]
    library.starkv_sample_top_p.argtypes = [pointer] * 5 + [integer] * 2 + [pointer]
    for name in ("starkv_status_name", "starkv_status_message"):
        getattr(library, name).argtypes = [c_int]
        getattr(library, name).restype = c_char_p
    library.starkv_device_kind.restype = c_char_p
