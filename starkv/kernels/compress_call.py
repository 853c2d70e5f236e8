# SPDX-License-Identifier: Apache-2.0
"""One call of the operator ``Compress`` as tensors: what every implementation takes and gives.

The meaning is that of the ONNX definition (``starkv/onnx_compress.py``). Symbols: L layers, B sequences, G KV
heads, H query heads, W window, C rows of capacity, D head dim, S slots, E rows of a slot, V length of a
pattern.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.tensor_checks import Wanted, check_tensors
from starkv.methods.prefill import Prefill
from starkv.methods.star_kv_config import Pooling
from starkv.methods.star_kv_plan import LayerLimits, StarKVPlan
from starkv.methods.star_kv_state import StarKVState

CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class CompressCall:
    """Inputs of ``Compress``, all contiguous and on one device."""

    k: Tensor
    """``[L, B, G, C, D]`` float32, float16 or bfloat16."""
    v: Tensor
    """``[L, B, G, C, D]``."""
    q_window: Tensor
    """``[L, B, H, W, D]``, the dtype of ``k``."""
    hidden_norm: Tensor
    """``[L, B, C]`` f32."""
    kv_len: Tensor
    """``[L, B]`` i32."""
    row_meta: Tensor
    """``[L, B, C, 4]`` i32."""
    frame: Tensor
    """``[5]`` i32, see :meth:`starkv.methods.rows.Frame.as_array`."""
    parameters: Tensor
    """``[23]`` f32, see :class:`StarKVPlan`."""
    limits: Tensor
    """``[3]`` i64, see :class:`LayerLimits`."""
    mi_ema: Tensor
    """``[L, B, G]`` f32."""
    pattern_ema: Tensor
    """``[L, B, G, V]`` f32, V at least the screenshot's cells."""
    temperature: Tensor
    """``[L, B]`` f32."""
    dst_k: Tensor
    """``[L, S, G, E, D]``, written; may be ``k`` itself."""
    dst_v: Tensor
    """``[L, S, G, E, D]``, written."""
    dst_meta: Tensor
    """``[L, S, E, 4]`` i32, written."""
    slot: Tensor
    """``[B]`` i32: where each sequence goes."""
    pooling: Pooling = "avgpool"
    pooling_kernel: int = 5

    @classmethod
    def of(
        cls,
        prefill: Prefill,
        state: StarKVState,
        plan: StarKVPlan,
        limits: LayerLimits,
        destination: tuple[Tensor, Tensor, Tensor],
        slot: Tensor,
        pooling: Pooling = "avgpool",
        pooling_kernel: int = 5,
    ) -> "CompressCall":
        """The call that does to a prefilled cache what :func:`starkv.methods.star_kv.compress` does.

        Args:
            prefill: the cache.
            state: the trajectory's state.
            plan: of this prompt; its boost must be 0 where the prefill has no hidden norms.
            limits: of a layer's rows.
            destination: ``dst_k``, ``dst_v``, ``dst_meta``.
            slot: ``[B]``.
            pooling: of the window's scores.
            pooling_kernel: its width.
        """
        device = prefill.keys.device
        layers, batch, groups, capacity, _ = prefill.keys.shape
        norm = prefill.hidden_norm
        if norm is None:
            norm = torch.zeros(layers, batch, capacity, device=device)
        # A kernel reads the pattern of the new screenshot's size, whatever the last one's was.
        length = max(1, prefill.frame.cells, state.pattern_ema.shape[-1])
        pattern = torch.zeros(layers, batch, groups, length, device=device)
        pattern[..., : state.pattern_ema.shape[-1]] = state.pattern_ema
        return cls(
            k=prefill.keys.contiguous(),
            v=prefill.values.contiguous(),
            q_window=prefill.window_queries.to(prefill.keys.dtype).contiguous(),
            hidden_norm=norm.float().contiguous(),
            kv_len=prefill.kv_len.to(torch.int32).contiguous(),
            row_meta=prefill.row_meta.contiguous(),
            frame=torch.from_numpy(prefill.frame.as_array()).to(device),
            parameters=torch.from_numpy(plan.as_array()).to(device),
            limits=torch.from_numpy(limits.as_array()).to(device),
            mi_ema=state.mi_ema.float().contiguous(),
            pattern_ema=pattern,
            temperature=state.temperature.float().expand(layers, batch).contiguous(),
            dst_k=destination[0],
            dst_v=destination[1],
            dst_meta=destination[2],
            slot=slot.to(device=device, dtype=torch.int32),
            pooling=pooling,
            pooling_kernel=pooling_kernel,
        )

    @property
    def window(self) -> int:
        return int(self.q_window.shape[3])

    def check(self) -> None:
        """Refuse tensors that don't fit each other.

        Raises:
            UsageError: names the tensor and what it should be.
        """
        if self.k.dim() != 5 or self.q_window.dim() != 5 or self.dst_k.dim() != 5:
            raise UsageError("k must be [L, B, G, C, D], q_window [L, B, H, W, D] and dst_k [L, S, G, E, D]")
        layers, batch, groups, capacity, dim = self.k.shape
        heads, window = self.q_window.shape[2:4]
        slots, rows = self.dst_k.shape[1], self.dst_k.shape[3]
        if self.k.dtype not in CACHE_DTYPES:
            raise UsageError(f"k must be float32, float16 or bfloat16, not {self.k.dtype}")
        if heads % groups:
            raise UsageError(f"{heads} query heads can't share {groups} KV heads evenly")
        cache, f32, i32, i64 = self.k.dtype, torch.float32, torch.int32, torch.int64
        wanted: dict[str, Wanted] = {
            "k": (cache, (layers, batch, groups, capacity, dim)),
            "v": (cache, (layers, batch, groups, capacity, dim)),
            "q_window": (cache, (layers, batch, heads, window, dim)),
            "hidden_norm": (f32, (layers, batch, capacity)),
            "kv_len": (i32, (layers, batch)),
            "row_meta": (i32, (layers, batch, capacity, 4)),
            "frame": (i32, (5,)),
            "parameters": (f32, (23,)),
            "limits": (i64, (3,)),
            "mi_ema": (f32, (layers, batch, groups)),
            "pattern_ema": (f32, (layers, batch, groups, self.pattern_ema.shape[-1])),
            "temperature": (f32, (layers, batch)),
            "dst_k": (cache, (layers, slots, groups, rows, dim)),
            "dst_v": (cache, (layers, slots, groups, rows, dim)),
            "dst_meta": (i32, (layers, slots, rows, 4)),
            "slot": (i32, (batch,)),
        }
        check_tensors(self, wanted)


@dataclass
class CompressResult:
    """Outputs of ``Compress`` beside the destination, which is written in place."""

    new_len: Tensor
    """``[L, B]`` i32: rows kept; 0 where a sequence could not be compressed."""
    rows: Tensor
    """``[L, B, 1, E]`` i64: which ones, ascending, −1 behind the last."""
    scores: Tensor
    """``[L, B, C]`` f32, 0 outside the past."""
    stages: Tensor
    """``[L, B, 4, C]`` f32: attention, boosted, weighted, discounted."""
    mi_ema: Tensor
    """``[L, B, G]`` f32."""
    pattern_ema: Tensor
    """``[L, B, G, V]`` f32."""
    temperature: Tensor
    """``[L, B]`` f32."""

    @classmethod
    def empty_for(cls, call: CompressCall) -> "CompressResult":
        """Uninitialised outputs of the right shapes."""
        layers, batch, _, capacity, _ = call.k.shape

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=call.k.device)

        return cls(
            new_len=empty(layers, batch, dtype=torch.int32),
            rows=empty(layers, batch, 1, call.dst_k.shape[3], dtype=torch.int64),
            scores=empty(layers, batch, capacity),
            stages=empty(layers, batch, 4, capacity),
            mi_ema=torch.empty_like(call.mi_ema),
            pattern_ema=torch.empty_like(call.pattern_ema),
            temperature=torch.empty_like(call.temperature),
        )
