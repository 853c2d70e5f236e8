# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels from Python: ``libstarkv_kernels`` through its C ABI, with PyTorch's device pointers.

The same class serves the library built for the CPU (``libstarkv_kernels_cpu``), which runs the very same
kernels on host memory, for tests.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from starkv.errors import StarkvError, UsageError
from starkv.kernels import cuda_structures as structures
from starkv.kernels.attention_call import AttentionCall
from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.library_paths import kernel_libraries

ABI_VERSION = 1


class KernelError(StarkvError):
    """A kernel library is missing, doesn't fit, or refused a call."""


@dataclass(frozen=True)
class KernelStatus:
    """A status of the library."""

    code: int
    name: str
    message: str


class KernelLibrary:
    """A loaded kernel library.

    Args:
        path: ``libstarkv_kernels.so`` or ``libstarkv_kernels_cpu.so``.

    Raises:
        KernelError: no such file, it can't be loaded, or it has another ABI.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise KernelError(f"{self.path}: no such library; `make plugin` builds it")
        try:
            self._library = ctypes.CDLL(str(self.path.resolve()))
            structures.declare(self._library)
        except (OSError, AttributeError) as error:
            raise KernelError(f"{self.path}: not a starkv kernel library ({error})") from error
        version = self._library.starkv_abi_version()
        if version != ABI_VERSION:
            raise KernelError(
                f"{self.path}: ABI {version}, but this starkv needs {ABI_VERSION}; build it anew"
            )

    @property
    def device(self) -> str:
        """Where tensors must lie: ``cuda``, or ``cpu`` for the build that tests use."""
        return str(self._library.starkv_device_kind().decode())

    def status(self, code: int) -> KernelStatus:
        """Name and meaning of a status code."""
        name, message = self._library.starkv_status_name(code), self._library.starkv_status_message(code)
        return KernelStatus(code, name.decode(), message.decode())

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
        self._check_device(call.k)
        result = result or CompressResult.empty_for(call)
        shape = structures.CompressShape.of(call)
        workspace = self._workspace("starkv_compress_workspace", shape, call.k.device)
        buffers = structures.CompressBuffers.of(call, result)
        self._run("starkv_compress", shape, buffers, workspace, call.k.device)
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
        self._check_device(call.q)
        out = torch.empty_like(call.q) if out is None else out
        present = [cache if in_place else torch.empty_like(cache) for cache in (call.past_k, call.past_v)]
        shape = structures.AttentionShape.of(call)
        workspace = self._workspace("starkv_attention_workspace", shape, call.q.device)
        buffers = structures.AttentionBuffers.of(call, present[0], present[1], out)
        self._run("starkv_attention", shape, buffers, workspace, call.q.device)
        return out, present[0], present[1]

    def embedding_gather(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows of an embedding ``[vocabulary, width]``: ``ids [N]`` i32 → ``[N, width]``.

        Raises:
            UsageError: tensors lie elsewhere, or are of other types.
            KernelError: the library refused the call.
        """
        self._check_device(table, ids)
        _check_type("ids", ids, torch.int32)
        out = torch.empty(len(ids), table.shape[1], dtype=table.dtype, device=table.device)
        code = self._library.starkv_embedding_gather(
            table.data_ptr(),
            ids.data_ptr(),
            out.data_ptr(),
            len(ids),
            table.shape[0],
            table.shape[1],
            structures.dtype_code(table.dtype),
            _stream(table.device),
        )
        self._check("starkv_embedding_gather", code)
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        """Index of the largest of ``logits [B, vocabulary]`` f32: ``[B]`` i32.

        Raises:
            UsageError: ``logits`` lies elsewhere or is of another type.
            KernelError: the library refused the call.
        """
        self._check_device(logits)
        _check_type("logits", logits, torch.float32)
        ids = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
        code = self._library.starkv_argmax(
            logits.data_ptr(), ids.data_ptr(), *logits.shape, _stream(logits.device)
        )
        self._check("starkv_argmax", code)
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
        self._check_device(*tensors.values())
        for name, tensor in tensors.items():
            _check_type(name, tensor, torch.float32)
        ids = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
        pointers = [tensor.data_ptr() for tensor in (*tensors.values(), ids)]
        code = self._library.starkv_sample_top_p(*pointers, *logits.shape, _stream(logits.device))
        self._check("starkv_sample_top_p", code)
        return ids

    def _workspace(self, function: str, shape: ctypes.Structure, device: torch.device) -> Tensor:
        size = ctypes.c_size_t()
        self._check(function, getattr(self._library, function)(ctypes.byref(shape), ctypes.byref(size)))
        # PyTorch's allocator keeps it alive until the stream is done with it. Never empty: null is an error.
        return torch.empty(max(size.value, 16), dtype=torch.uint8, device=device)

    def _run(
        self,
        function: str,
        shape: ctypes.Structure,
        buffers: ctypes.Structure,
        workspace: Tensor,
        device: torch.device,
    ) -> None:
        code = getattr(self._library, function)(
            ctypes.byref(shape),
            ctypes.byref(buffers),
            workspace.data_ptr(),
            workspace.numel(),
            _stream(device),
        )
        self._check(function, code)

    def _check_device(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            if tensor.device.type != self.device:
                raise UsageError(f"{self.path.name} works on {self.device} tensors, not on {tensor.device}")
            if not tensor.is_contiguous():
                raise UsageError(f"{self.path.name} needs contiguous tensors")

    def _check(self, function: str, code: int) -> None:
        if code:
            status = self.status(code)
            raise KernelError(f"{function}: {status.name}: {status.message}")


def _stream(device: torch.device) -> int | None:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else None


def _check_type(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise UsageError(f"{name} must be {dtype}, not {tensor.dtype}")


def find_library(device: str) -> KernelLibrary | None:
    """The first library of that kind, or None.

    Raises:
        KernelError: a library is there, but doesn't fit.
    """
    for path in kernel_libraries(device):
        library = KernelLibrary(path)
        if library.device == device:
            return library
    return None
