# SPDX-License-Identifier: Apache-2.0
"""TensorRT plugins from Python, without an engine around them: one call of ``enqueue`` on PyTorch's tensors.

``libstarkv_plugin_driver.so`` (``make plugin`` builds it) does what TensorRT does with a plugin library: it
asks for a creator, makes a plugin of attributes, tells it the shapes and enqueues. So a plugin is compared
with the PyTorch reference where there is no TensorRT; ``libstarkv_trt_cpu.so`` even where there is no GPU.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, c_char_p, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.attention_call import AttentionCall
from starkv.kernels.c_abi import KernelError
from starkv.kernels.c_abi_quantized import QUANTIZED_INPUTS
from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.full_attention_call import FullAttentionCall
from starkv.kernels.packable_attention_call import PackableAttentionCall
from starkv.kernels.plugin_driver_abi import DriverCall, DriverField, DriverTensor, FieldValue
from starkv.kernels.quantized_attention_call import QuantizedAttentionCall

COMPRESS_INPUTS = (
    "k",
    "v",
    "q_window",
    "hidden_norm",
    "kv_len",
    "row_meta",
    "frame",
    "parameters",
    "limits",
    "mi_ema",
    "pattern_ema",
    "temperature",
    "dst_k",
    "dst_v",
    "dst_meta",
    "slot",
)
"""Fields of :class:`CompressCall` in the order of the operator's definition."""

_DEVICE_BYTES = 8
_MESSAGE_BYTES = 4096


class PluginDriver:
    """A plugin library, driven as TensorRT does it.

    Args:
        plugin_library: ``libstarkv_trt.so``, or ``libstarkv_trt_cpu.so`` for tensors in host memory.
        driver_library: ``libstarkv_plugin_driver.so``.

    Raises:
        KernelError: one of them is missing or can't be loaded.
    """

    device: str
    """Where tensors must lie: ``cuda``, or ``cpu`` for the build that tests use."""

    def __init__(self, plugin_library: Path | str, driver_library: Path | str) -> None:
        self._plugin_library = str(Path(plugin_library).resolve()).encode()
        try:
            library = ctypes.CDLL(str(Path(driver_library).resolve()))
        except OSError as error:
            raise KernelError(f"{driver_library}: not a plugin driver ({error})") from error
        report = (c_char_p, c_size_t)
        library.starkv_driver_device.argtypes = [c_char_p, c_char_p, *report]
        device = ctypes.create_string_buffer(_DEVICE_BYTES)
        self._check(library.starkv_driver_device, self._plugin_library, device)
        self.device = device.value.decode()
        self._workspace = library.starkv_driver_workspace
        self._workspace.argtypes = [POINTER(DriverCall), POINTER(c_size_t), *report]
        self._enqueue = library.starkv_driver_enqueue
        self._enqueue.argtypes = [POINTER(DriverCall), c_void_p, c_void_p, *report]

    def compress(self, call: CompressCall, aliased: bool = True) -> CompressResult:
        """Score, select and compact; ``dst_*`` of the call are written.

        Args:
            call: tensors on the plugins' device.
            aliased: the destination is input and output at once. Otherwise outputs of their own are copied
                into it afterwards, which is how TensorRT may do it.

        Raises:
            UsageError: a tensor lies elsewhere.
            KernelError: the plugin refused the call.
        """
        result = CompressResult.empty_for(call)
        destination = [call.dst_k, call.dst_v, call.dst_meta]
        written = destination if aliased else [torch.empty_like(tensor) for tensor in destination]
        outputs = (
            *written,
            result.new_len,
            result.rows,
            result.scores,
            result.stages,
            result.mi_ema,
            result.pattern_ema,
            result.temperature,
        )
        fields = {"pooling": call.pooling, "pooling_kernel": call.pooling_kernel}
        self.run("KVCompress", fields, [getattr(call, name) for name in COMPRESS_INPUTS], outputs)
        if not aliased:
            for tensor, source in zip(destination, written, strict=True):
                tensor.copy_(source)
        return result

    def attention(self, call: AttentionCall, aliased: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Append and attend: ``out``, ``present_k``, ``present_v``.

        Args:
            call: tensors on the plugins' device.
            aliased: write the new rows into ``past_k`` and ``past_v``; otherwise into copies of them.

        Raises:
            UsageError: a tensor lies elsewhere.
            KernelError: the plugin refused the call.
        """
        past = (call.past_k, call.past_v)
        present_k, present_v = past if aliased else (torch.empty_like(cache) for cache in past)
        out = torch.empty_like(call.q)
        past_extent = torch.empty(0, dtype=torch.int8, device=call.q.device)
        fields = {"num_heads": call.heads, "kv_num_heads": int(call.past_k.shape[1])}
        inputs = (call.q, call.k, call.v, call.past_k, call.past_v, call.kv_len, past_extent)
        self.run("KVAttention", fields, inputs, (out, present_k, present_v))
        return out, present_k, present_v

    def quantized_attention(
        self, call: QuantizedAttentionCall, aliased: bool = True, carrier: torch.dtype = torch.int8
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append codes and attend to all of them: ``out``, ``present_k``, ``present_v``.

        Args:
            call: tensors on the plugins' device.
            aliased: as in :meth:`attention`.
            carrier: of the caches' bytes in the network, int8 or int32.

        Raises:
            UsageError: a tensor lies elsewhere.
            KernelError: the plugin refused the call.
        """
        past = (call.past_k, call.past_v)
        present_k, present_v = past if aliased else (torch.empty_like(cache) for cache in past)
        out = torch.empty_like(call.q)
        inputs = {name: getattr(call, name) for name in QUANTIZED_INPUTS}
        inputs |= {"past_k": call.past_k.view(carrier), "past_v": call.past_v.view(carrier)}
        outputs = (out, present_k.view(carrier), present_v.view(carrier))
        self.run("QuantizedKVAttention", _attributes_of_codes(call), tuple(inputs.values()), outputs)
        return out, present_k, present_v

    def packable_attention(
        self, call: PackableAttentionCall, aliased: bool = True, carrier: torch.dtype = torch.int8
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Append to the floats or the codes, and attend to them: ``out``, ``present_k``, ``present_v``,
        ``present_k_codes``, ``present_v_codes``.

        Args:
            call: tensors on the plugins' device.
            aliased: as in :meth:`attention`, for all four caches.
            carrier: of the codes' bytes in the network, int8 or int32.

        Raises:
            UsageError: a tensor lies elsewhere.
            KernelError: the plugin refused the call.
        """
        past = (call.past_k, call.past_v, call.past_k_codes, call.past_v_codes)
        floats_k, floats_v, codes_k, codes_v = (
            cache if aliased else torch.empty_like(cache) for cache in past
        )
        out = torch.empty_like(call.q)
        # Lengths a second time instead of an extent, as engines have it.
        inputs = (call.q, call.k, call.v, call.past_k, call.past_v, call.kv_len, call.kv_len)
        codes = (call.past_k_codes.view(carrier), call.past_v_codes.view(carrier))
        names = QUANTIZED_INPUTS[QUANTIZED_INPUTS.index("positions") :]
        parameters = [getattr(call, name) for name in names]
        outputs = (out, floats_k, floats_v, codes_k.view(carrier), codes_v.view(carrier))
        fields = _attributes_of_codes(call.of_codes)
        self.run("PackableKVAttention", fields, (*inputs, *codes, *parameters), outputs)
        return out, floats_k, floats_v, codes_k, codes_v

    def full_attention(self, call: FullAttentionCall) -> Tensor:
        """Every token attends to every other: ``[B, N, H·D]``.

        Raises:
            UsageError: a tensor lies elsewhere.
            KernelError: the plugin refused the call.
        """
        out = torch.empty_like(call.q)
        self.run("FullAttention", {"num_heads": call.heads}, (call.q, call.k, call.v), (out,))
        return out

    def run(
        self,
        operator: str,
        fields: Mapping[str, FieldValue],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        """Any call of any operator of the library.

        Args:
            operator: its name.
            fields: its attributes.
            inputs: contiguous tensors in the order of its definition.
            outputs: likewise; written.

        Raises:
            UsageError: a tensor lies elsewhere or is not contiguous.
            KernelError: the plugin refused the attributes or the call.
        """
        for tensor in (*inputs, *outputs):
            if tensor.device.type != self.device or not tensor.is_contiguous():
                raise UsageError(f"plugins take contiguous tensors on {self.device}, not on {tensor.device}")
        call = DriverCall(
            self._plugin_library,
            operator.encode(),
            len(fields),
            (DriverField * len(fields))(*(DriverField.of(*field) for field in fields.items())),
            len(inputs),
            (DriverTensor * len(inputs))(*map(DriverTensor.of, inputs)),
            len(outputs),
            (DriverTensor * len(outputs))(*map(DriverTensor.of, outputs)),
        )
        size = c_size_t()
        self._check(self._workspace, ctypes.byref(call), ctypes.byref(size))
        device = inputs[0].device
        # Never empty: null is no workspace.
        workspace = torch.empty(max(size.value, 16), dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream if self.device == "cuda" else None
        self._check(self._enqueue, ctypes.byref(call), workspace.data_ptr(), stream)

    @staticmethod
    def _check(function: Callable[..., int], *arguments: object) -> None:
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        if function(*arguments, message, _MESSAGE_BYTES):
            raise KernelError(message.value.decode().strip())


def _attributes_of_codes(call: QuantizedAttentionCall) -> dict[str, FieldValue]:
    return {
        "num_heads": call.heads,
        "kv_num_heads": int(call.past_k.shape[1]),
        "bits": call.bits,
        "mrope_section": call.mrope_section,
    }
