# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on PyTorch's tensors.

The same class serves the library built for the processor, which runs the very same kernels on host memory,
for tests.
"""

from pathlib import Path

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.attention_call import AttentionCall
from starkv.kernels.c_abi import (
    AttentionBuffers,
    AttentionShape,
    Buffers,
    FullAttentionShape,
    KernelAbi,
    Shape,
)
from starkv.kernels.c_abi_quantized import QUANTIZED_INPUTS, QuantizedAttentionBuffers
from starkv.kernels.code_rows_call import CodeRowsCall
from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.cuda_structures import (
    DTYPES,
    code_rows_buffers,
    code_rows_shape,
    compress_buffers,
    compress_shape,
    pointers_of,
    quantized_attention_shape,
)
from starkv.kernels.full_attention_call import FullAttentionCall
from starkv.kernels.library_paths import kernel_libraries
from starkv.kernels.quantized_attention_call import QuantizedAttentionCall

_LEAST_WORKSPACE = 16
"""Bytes; a tensor of none has no pointer."""


class KernelLibrary:
    """A loaded kernel library.

    Args:
        path: ``libstarkv_kernels.so`` or ``libstarkv_kernels_cpu.so``.

    Raises:
        KernelError: no such file, it can't be loaded, or it has another ABI.
    """

    def __init__(self, path: Path | str) -> None:
        self.abi = KernelAbi(path)

    @property
    def path(self) -> Path:
        """The library's file."""
        return self.abi.path

    @property
    def device(self) -> str:
        """Where tensors must lie: ``cuda``, or ``cpu`` for the build that tests use."""
        return self.abi.device

    def compress(self, call: CompressCall, result: CompressResult | None = None) -> CompressResult:
        """Score, select and compact; ``dst_*`` of the call are written.

        Args:
            call: tensors on :attr:`device`.
            result: outputs to write into, for CUDA graphs; new ones if None.

        Raises:
            UsageError: tensors don't fit each other, or lie elsewhere.
            KernelError: the library refused the call.
        """
        call.check()
        self._check_tensors(call.k)
        result = result or CompressResult.empty_for(call)
        self._launch(compress_shape(call), compress_buffers(call, result), call.k.device)
        return result

    def attention(
        self, call: AttentionCall, in_place: bool = True, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append and attend: ``out``, ``present_k``, ``present_v``.

        Args:
            call: tensors on :attr:`device`.
            in_place: write the new rows into ``past_k`` and ``past_v``; otherwise into copies of them.
            out: ``[B, S, H·D]`` to write into; a new tensor if None.

        Raises:
            UsageError: tensors don't fit each other, or lie elsewhere.
            KernelError: the library refused the call.
        """
        call.check()
        self._check_tensors(call.q)
        out = torch.empty_like(call.q) if out is None else out
        caches = (call.past_k, call.past_v)
        keys, values = caches if in_place else (torch.empty_like(cache) for cache in caches)
        batch, groups, capacity, dim = call.past_k.shape
        shape = AttentionShape(
            sequences=batch,
            new_tokens=call.q.shape[1],
            query_heads=call.heads,
            kv_heads=groups,
            head_dim=dim,
            capacity=capacity,
            dtype=DTYPES[call.q.dtype],
        )
        inputs = {name: getattr(call, name) for name in ("q", "k", "v", "past_k", "past_v", "kv_len")}
        outputs = {"present_k": keys, "present_v": values, "out": out}
        self._launch(shape, AttentionBuffers(**pointers_of(inputs | outputs)), call.q.device)
        return out, keys, values

    def quantized_attention(
        self, call: QuantizedAttentionCall, in_place: bool = True, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append codes and attend to all of them: ``out``, ``present_k``, ``present_v``.

        Args, errors as those of :meth:`attention`.
        """
        call.check()
        self._check_tensors(call.q)
        out = torch.empty_like(call.q) if out is None else out
        caches = (call.past_k, call.past_v)
        keys, values = caches if in_place else (torch.empty_like(cache) for cache in caches)
        inputs = {name: getattr(call, name) for name in QUANTIZED_INPUTS}
        outputs = {"present_k": keys, "present_v": values, "out": out}
        buffers = QuantizedAttentionBuffers(**pointers_of(inputs | outputs))
        self._launch(quantized_attention_shape(call), buffers, call.q.device)
        return out, keys, values

    def quantize_rows(self, call: CodeRowsCall) -> Tensor:
        """Rows of a float cache become codes; ``k_codes`` and ``v_codes`` of the call are written.

        Args:
            call: tensors on :attr:`device`.

        Returns:
            ``wrong_rows [L]`` i32: how many rows of a layer can have no codes, -1 where its length makes no
            sense.

        Raises:
            UsageError: tensors don't fit each other, or lie elsewhere.
            KernelError: the library refused the call.
        """
        call.check()
        self._check_tensors(call.k)
        wrong_rows = torch.empty_like(call.lengths)
        buffers = code_rows_buffers(call, wrong_rows)
        self.abi.quantize_rows(code_rows_shape(call), buffers, _stream(call.k.device))
        return wrong_rows

    def dequantize_rows(self, call: CodeRowsCall) -> None:
        """Codes become rows of a float cache; ``k`` and ``v`` of the call are written.

        Args, errors as those of :meth:`quantize_rows`.
        """
        call.check()
        self._check_tensors(call.k)
        self.abi.dequantize_rows(code_rows_shape(call), code_rows_buffers(call), _stream(call.k.device))

    def full_attention(self, call: FullAttentionCall) -> Tensor:
        """Every token attends to every other: ``[B, N, H·D]``.

        Args:
            call: tensors on :attr:`device`.

        Raises:
            UsageError: tensors don't fit each other, or lie elsewhere.
            KernelError: the library refused the call.
        """
        call.check()
        self._check_tensors(call.q)
        out = torch.empty_like(call.q)
        sequences, tokens, _ = call.q.shape
        shape = FullAttentionShape(
            sequences=sequences,
            tokens=tokens,
            heads=call.heads,
            head_dim=call.head_dim,
            dtype=DTYPES[call.q.dtype],
        )
        q, k, v = (tensor.data_ptr() for tensor in (call.q, call.k, call.v))
        self.abi.full_attention(shape, q, k, v, out.data_ptr(), _stream(call.q.device))
        return out

    def embedding_gather(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows of an embedding ``[vocabulary, width]``: ``ids [N]`` i32 → ``[N, width]``.

        Raises:
            UsageError: tensors lie elsewhere, or are of other types.
            KernelError: the library refused the call.
        """
        self._check_tensors(table, ids)
        _check_type("ids", ids, torch.int32)
        if table.dtype not in DTYPES:
            raise UsageError(f"the kernels take float32, float16 and bfloat16, not {table.dtype}")
        out = torch.empty(len(ids), table.shape[1], dtype=table.dtype, device=table.device)
        pointers = [tensor.data_ptr() for tensor in (table, ids, out)]
        sizes = (len(ids), *table.shape, DTYPES[table.dtype])
        self.abi.call("starkv_embedding_gather", *pointers, *sizes, _stream(table.device))
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        """Index of the largest of ``logits [B, vocabulary]`` f32: ``[B]`` i32.

        Raises:
            UsageError: ``logits`` lies elsewhere or is of another type.
            KernelError: the library refused the call.
        """
        self._check_tensors(logits)
        _check_type("logits", logits, torch.float32)
        ids = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
        pointers = (logits.data_ptr(), ids.data_ptr())
        self.abi.call("starkv_argmax", *pointers, *logits.shape, _stream(logits.device))
        return ids

    def sample_top_p(self, logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
        """Nucleus sampling with the caller's uniform numbers.

        Args:
            logits: ``[B, vocabulary]`` f32.
            temperature: ``[B]`` f32; 0 takes the largest.
            top_p: ``[B]`` f32 in (0, 1].
            uniform: ``[B]`` f32 in [0, 1).

        Returns:
            ``[B]`` i32.

        Raises:
            UsageError: tensors lie elsewhere or are of other types.
            KernelError: the library refused the call.
        """
        tensors = {"logits": logits, "temperature": temperature, "top_p": top_p, "uniform": uniform}
        self._check_tensors(*tensors.values())
        for name, tensor in tensors.items():
            _check_type(name, tensor, torch.float32)
        ids = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
        pointers = [tensor.data_ptr() for tensor in (*tensors.values(), ids)]
        self.abi.call("starkv_sample_top_p", *pointers, *logits.shape, _stream(logits.device))
        return ids

    def _launch(self, shape: Shape, buffers: Buffers, device: torch.device) -> None:
        size = max(self.abi.workspace_bytes(shape), _LEAST_WORKSPACE)
        # PyTorch's allocator gives the memory to others only behind what this stream has queued.
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self.abi.launch(shape, buffers, workspace.data_ptr(), size, _stream(device))

    def _check_tensors(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            if tensor.device.type != self.device:
                raise UsageError(f"{self.path.name} works on {self.device} tensors, not on {tensor.device}")
            if not tensor.is_contiguous():
                raise UsageError(f"{self.path.name} needs contiguous tensors")


def find_library(device: str) -> KernelLibrary | None:
    """The first library for ``cuda`` or ``cpu``, or None.

    Raises:
        KernelError: a library is there, but doesn't fit.
    """
    for path in kernel_libraries(device):
        library = KernelLibrary(path)
        if library.device == device:
            return library
    return None


def _stream(device: torch.device) -> int | None:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else None


def _check_type(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise UsageError(f"{name} must be {dtype}, not {tensor.dtype}")
