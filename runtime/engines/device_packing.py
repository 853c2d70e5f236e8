# SPDX-License-Identifier: Apache-2.0
"""Quantizing kept rows on a device, and back, by the kernels' library."""

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError, UsageError
from starkv.kernels.c_abi import KernelAbi
from starkv.kernels.c_abi_quantized import CodeRowsBuffers, CodeRowsShape
from starkv.kv_packing.quantized import SCALES, TABLES
from starkv.runtime.engines.cuda_memory import CudaMemory
from starkv.runtime.engines.device_codes import DeviceCodes
from starkv.runtime.engines.device_kv import DeviceKv
from starkv.runtime.engines.device_tensor import DeviceTensor, on_device
from starkv.runtime.engines.kernel_compress import KERNEL_DTYPES
from starkv.runtime.kv.buffers import OTHER_ROWS
from starkv.runtime.kv.parked import ParkedRows
from starkv.runtime.kv.quantized import QuantizedCodec


class DevicePacking:
    """An engine's scales and rotary tables on its device, and what is done with them."""

    def __init__(
        self, memory: CudaMemory, codec: QuantizedCodec, kernels: KernelAbi, position_rows: int
    ) -> None:
        """Send scales and tables to the device.

        Args:
            memory: of the device where the caches lie.
            codec: the engine's.
            kernels: the library for that device.
            position_rows: positions that tables are made for, from 0 on.
        """
        self.codec, self._memory, self._kernels = codec, memory, kernels
        self.position_rows = position_rows
        layers = codec.packing.layers
        vectors: dict[str, list[NDArray[np.floating]]] = {
            "k_scale": [layer.key_scales for layer in layers],
            "v_scale": [layer.value_scales for layer in layers],
            "k_bias": [layer.key_bias for layer in layers],
            "v_bias": [layer.value_bias for layer in layers],
        }
        angles = np.arange(position_rows)[:, None] * codec.rotary.inverse_frequencies
        arrays = {
            **{name: np.stack(rows).reshape(len(layers), -1) for name, rows in vectors.items()},
            **dict(zip(TABLES, (np.cos(angles), np.sin(angles)), strict=True)),
        }
        self.tensors: dict[str, DeviceTensor] = {
            name: on_device(memory, array.astype(np.float32)) for name, array in arrays.items()
        }
        """``SCALES`` ``[L, Hkv * D]`` and ``TABLES`` ``[P, D / 2]``, float32."""

    def new_codes(self, slots: int, rows: int) -> DeviceCodes:
        """A cache without rows of ``slots`` sequences of up to ``rows`` rows."""
        return DeviceCodes.new(self._memory, self, slots, rows)

    def quantize(self, source: DeviceKv, target: DeviceCodes, slot: int) -> None:
        """Write the codes of ``source``'s slot 0 into a slot, whose rows have their positions.

        Raises:
            EngineError: a key or value is not a number.
            UsageError: a position is beyond the tables.
        """
        wrong = self._launch("quantize_rows", source, target, slot, source.lengths[:, 0])
        if wrong.any():
            self._check_positions(int(source.positions[:, 0].max()))
            layer = int(np.flatnonzero(wrong)[0])
            raise EngineError(
                f"keys or values of layer {layer} are not numbers: the model's activations overflowed; try "
                "another quantization, or --compute-dtype bfloat16"
            )

    def unpack(self, target: DeviceKv, parked: ParkedRows) -> None:
        """Fill slot 0 of a float cache with rows that were parked packed.

        Raises:
            UsageError: they are another packing's, or don't fit.
        """
        if not self.codec.is_of_this_packing(parked):
            raise UsageError(OTHER_ROWS)
        rows = int(parked.lengths.max())
        if rows > target.capacity:
            raise UsageError(f"{rows} parked KV rows do not fit {target.capacity} rows")
        codes = self.new_codes(1, rows)
        codes.load(0, parked)
        self._launch("dequantize_rows", target, codes, 0, codes.lengths[:, 0])
        for layer, (meta, positions) in enumerate(zip(parked.row_meta, parked.positions, strict=True)):
            target.row_meta[layer, 0, : len(meta)] = meta
            target.positions[layer, 0, : len(meta)] = positions
        target.lengths[:, 0] = codes.lengths[:, 0]

    def check_positions(self, positions: NDArray[np.int32]) -> None:
        """Refuse rows behind the last position that the engine can tell apart.

        Raises:
            UsageError: a position is beyond the tables.
        """
        self._check_positions(int(positions.max()))

    def _check_positions(self, last: int) -> None:
        if last >= self.position_rows:
            raise UsageError(
                f"position {last} is beyond the {self.position_rows} that this engine's packed cache was "
                "built for; start the session anew, or go on with --kv-quant none"
            )

    def _launch(
        self, function: str, floats: DeviceKv, codes: DeviceCodes, slot: int, lengths: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """Run a kernel over all layers; rows of each layer that it could not take ``[L]``."""
        layers, slots, heads, slot_capacity, _ = codes.shape
        text, own = self.codec.text, self.tensors
        sizes = on_device(self._memory, np.ascontiguousarray(lengths))
        wrong = on_device(self._memory, np.zeros(layers, np.int32))
        shape = CodeRowsShape(
            layers=layers,
            kv_heads=heads,
            head_dim=text.head_dim,
            capacity=floats.capacity,
            slots=slots,
            slot_capacity=slot_capacity,
            slot=slot,
            table_rows=self.position_rows,
            bits=self.codec.packing.bits,
            dtype=KERNEL_DTYPES[floats.keys.dtype.name],
            mrope_section=text.rotary_sections,
        )
        buffers = CodeRowsBuffers(
            k=floats.keys.address,
            v=floats.values.address,
            lengths=sizes.address,
            positions=codes.row_positions.tensor.address,
            k_codes=codes.keys.address,
            v_codes=codes.values.address,
            wrong_rows=wrong.address,
            **{name: own[name].address for name in (*SCALES, *TABLES)},
        )
        getattr(self._kernels, function)(shape, buffers, self._memory.stream)
        found: NDArray[np.int32] = wrong.read()
        return found
