# SPDX-License-Identifier: Apache-2.0
"""One call of the operator ``PackableKVAttention`` as tensors, and its reference in PyTorch.

It is ``KVAttention`` over a cache of floats, or ``QuantizedKVAttention`` over one of codes; the capacity of
the latter decides. Symbols: B sequences, S new tokens, H query heads, G KV heads, D head dim, C rows of
capacity of the floats, K of the codes, R bytes of a row of codes, P rows of the tables of cosines and sines.
"""

from dataclasses import dataclass

from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.attention_call import AttentionCall, reference_attention
from starkv.kernels.quantized_attention_call import CODE_BITS, QuantizedAttentionCall
from starkv.kernels.quantized_attention_reference import reference_quantized_attention
from starkv.kernels.tensor_checks import check_tensors


@dataclass
class PackableAttentionCall:
    """Inputs of ``PackableKVAttention``, all contiguous and on one device."""

    q: Tensor
    """``[B, S, H·D]`` float16 or bfloat16, after rotation."""
    k: Tensor
    """``[B, S, G·D]``, after rotation, with the projection's bias."""
    v: Tensor
    """``[B, S, G·D]``, with the projection's bias."""
    past_k: Tensor
    """``[B, G, C, D]`` in the element type of ``q``."""
    past_v: Tensor
    """``[B, G, C, D]``."""
    kv_len: Tensor
    """``[B]`` i32: rows that each sequence holds, of the cache that is attended to."""
    past_k_codes: Tensor
    """``[B, G, K, R]``: int8 with R = D or uint8 with R = D/2. One row of capacity means that there is no
    such cache."""
    past_v_codes: Tensor
    """Likewise."""
    positions: Tensor
    """``[B, K, 3]`` i32: (t, h, w) of every row of codes; row ``kv_len[b]`` is the new one's."""
    k_scale: Tensor
    """``[G·D]`` f32; both columns of a rotary pair have the same."""
    v_scale: Tensor
    """``[G·D]`` f32."""
    k_bias: Tensor
    """``[G·D]`` f32, before rotation."""
    v_bias: Tensor
    """``[G·D]`` f32."""
    cos_table: Tensor
    """``[P, D/2]`` f32: cosines of position times frequency."""
    sin_table: Tensor
    """``[P, D/2]`` f32."""
    mrope_section: tuple[int, int, int]
    """Pairs of columns that rotate by t, h and w, in this order; D/2 together."""

    @property
    def attends_to_codes(self) -> bool:
        """Whether the cache of codes is worked on, rather than that of floats."""
        return int(self.past_k_codes.shape[2]) > 1

    @property
    def of_floats(self) -> AttentionCall:
        """The call over the floats."""
        return AttentionCall(self.q, self.k, self.v, self.past_k, self.past_v, self.kv_len)

    @property
    def of_codes(self) -> QuantizedAttentionCall:
        """The call over the codes."""
        return self._of_codes(self.q, self.k, self.v)

    def check(self) -> None:
        """Refuse tensors that don't fit each other.

        Raises:
            UsageError: names the tensor and what it should be, or says that several new tokens can't go to a
                cache of codes.
        """
        self.of_floats.check()
        if self.past_k_codes.dim() != 4:
            raise UsageError("past_k_codes must be [B, G, K, R]")
        if self.past_k_codes.dtype not in CODE_BITS:
            raise UsageError(
                "past_k_codes must be int8 (codes of 8 bits) or uint8 (two of 4), "
                f"not {self.past_k_codes.dtype}"
            )
        batch, groups, _, dim = self.past_k.shape
        capacity, tokens = self.past_k_codes.shape[2], self.q.shape[1]
        row_bytes = dim * CODE_BITS[self.past_k_codes.dtype] // 8
        codes = (self.past_k_codes.dtype, (batch, groups, capacity, row_bytes))
        same_device = (self.q.dtype, tuple(self.q.shape))
        check_tensors(self, {"q": same_device, "past_k_codes": codes, "past_v_codes": codes})
        if self.attends_to_codes and tokens > 1:
            raise UsageError(
                f"a cache of codes takes one new token, not {tokens}; a prompt goes to the cache of floats, "
                f"with a cache of codes of one row, not {capacity}"
            )
        # The call over the codes has one token, however many this one has.
        self._of_codes(*(tensor[:, :1].contiguous() for tensor in (self.q, self.k, self.v))).check()

    def _of_codes(self, q: Tensor, k: Tensor, v: Tensor) -> QuantizedAttentionCall:
        return QuantizedAttentionCall(
            q,
            k,
            v,
            self.past_k_codes,
            self.past_v_codes,
            self.kv_len,
            self.positions,
            self.k_scale,
            self.v_scale,
            self.k_bias,
            self.v_bias,
            self.cos_table,
            self.sin_table,
            self.mrope_section,
        )


def reference_packable_attention(
    call: PackableAttentionCall,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``PackableKVAttention``: ``out [B, S, H·D]`` f32 over the floats, f64 over the codes; ``present_k``,
    ``present_v``, ``present_k_codes`` and ``present_v_codes``. Those that are not worked on are the pasts
    themselves.

    Raises:
        UsageError: several new tokens for a cache of codes, or tensors that don't fit each other.
    """
    call.check()
    if call.attends_to_codes:
        out, *codes = reference_quantized_attention(call.of_codes)
        return out, call.past_k, call.past_v, codes[0], codes[1]
    return *reference_attention(call.of_floats), call.past_k_codes, call.past_v_codes
