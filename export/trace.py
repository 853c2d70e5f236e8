# SPDX-License-Identifier: Apache-2.0
"""The decoder as ``torch.onnx.export`` sees the PyTorch model: the oracle of the builder, and its fallback.

The model's own code is traced with our KVAttention registered as its attention, so the graph has the
builder's inputs and outputs but not a line in common with it. Only the text decoder is traced: tracing the
vision tower fixes the windows of the traced image, which is silently wrong for images of another shape, so
the tower always comes from the builder. The whole model is loaded in float32.

The only module of this package that needs torch and transformers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import AttentionInterface, AutoModelForImageTextToText

from starkv.errors import UsageError
from starkv.export.graph import IR_VERSION
from starkv.export.models.config import ModelConfig
from starkv.onnx_ops import DOMAIN, DOMAIN_VERSION, KV_ATTENTION, OPSET, standard_functions

_ATTENTION = "starkv_kv_attention"
# Sizes of the traced example. Tracing takes 0 and 1 for constants, so dimensions that vary are others.
_BATCH, _NEW, _PAST, _CAPACITY = 2, 3, 5, 16


class _CacheState:
    """The cache of one traced step: each layer's attention takes inputs from here and leaves results."""

    def __init__(
        self, past: Sequence[torch.Tensor], kv_len: torch.Tensor, past_extent: torch.Tensor, window: int
    ) -> None:
        layers = len(past) // 2
        self.past_k, self.past_v = past[:layers], past[layers:]
        self.kv_len = kv_len
        self.past_extent = past_extent
        self.window = window
        self.present: list[torch.Tensor] = []
        self.windows: list[torch.Tensor] = []


def _kv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    starkv_cache: _CacheState,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention as transformers calls it: q [B,Hq,S,D], k and v [B,Hkv,S,D] → [B,S,Hq,D]."""
    state, layer = starkv_cache, int(module.layer_idx)
    batch, heads, new, width = query.shape
    q, k, v = (rows.transpose(1, 2).reshape(batch, new, -1) for rows in (query, key, value))
    past_k, past_v = state.past_k[layer], state.past_v[layer]
    out, present_k, present_v = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{KV_ATTENTION}",
        (q, k, v, past_k, past_v, state.kv_len[layer], state.past_extent),
        {"num_heads": heads, "kv_num_heads": key.shape[1]},
        dtypes=(q.dtype, past_k.dtype, past_v.dtype),
        shapes=(q.shape, past_k.shape, past_v.shape),
        version=DOMAIN_VERSION,
    )
    state.present += [present_k, present_v]
    state.windows.append(_last_rows(query, state.window))
    return out.reshape(batch, new, heads, width), None


def _last_rows(query: torch.Tensor, count: int) -> torch.Tensor:
    """[B,Hq,S,D] → [B,Hq,min(count,S),D], for any S: a slice in Python would fix whether S < count."""
    batch, heads, new, width = query.shape
    bounds = [torch.tensor([bound]) for bound in (-count, 2**63 - 1, 2)]
    shape = (batch, heads, torch.sym_min(new, count), width)
    return torch.onnx.ops.symbolic("Slice", (query, *bounds), dtype=query.dtype, shape=shape, version=OPSET)


class _GivenRope(torch.nn.Module):
    """Stands in for the model's rotary embedding and returns the graph's inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, *_: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self.tables


class _Decoder(torch.nn.Module):
    """The text decoder with the inputs and outputs of the builder's graph."""

    def __init__(self, model: Any, window: int) -> None:
        super().__init__()
        self.text = model.model.language_model
        self.head = model.lm_head
        self.window = window
        self.rope = _GivenRope()
        self.text.rotary_emb = self.rope

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        rope_cos: torch.Tensor,
        rope_sin: torch.Tensor,
        kv_len: torch.Tensor,
        past_extent: torch.Tensor,
        last_index: torch.Tensor,
        past: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        # transformers wants both halves of a head's channels.
        self.rope.tables = (torch.cat([rope_cos] * 2, dim=-1), torch.cat([rope_sin] * 2, dim=-1))
        norms: list[torch.Tensor] = []
        hooks = [
            layer.input_layernorm.register_forward_hook(_norm_recorder(norms)) for layer in self.text.layers
        ]
        state = _CacheState(past, kv_len, past_extent, self.window)
        try:
            hidden = self.text(
                inputs_embeds=inputs_embeds,
                # KVAttention is causal by itself; a dictionary keeps transformers from making masks.
                attention_mask=dict.fromkeys(("full_attention", "sliding_attention")),
                use_cache=False,
                starkv_cache=state,
            ).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        logits = self.head(hidden[rows, last_index.long()])
        return logits, *state.present, torch.stack(state.windows), torch.stack(norms)


def _norm_recorder(norms: list[torch.Tensor]) -> Callable[..., None]:
    def record(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        norms.append(output.float().norm(dim=-1))

    return record


def trace_decoder(folder: Path, config: ModelConfig, observation_window: int) -> ir.Model:
    """Trace the decoder of the checkpoint in ``folder``: same inputs and outputs as the builder's.

    Weights are float32 and in memory.

    Raises:
        UsageError: transformers has no class for the model; code that comes with a checkpoint is never run.
    """
    AttentionInterface.register(_ATTENTION, _kv_attention)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation={"text_config": _ATTENTION},
            local_files_only=True,
            trust_remote_code=False,
        ).eval()
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"transformers can't load {folder} to trace it ({reason}); use --route build"
        ) from None
    shape = config.text
    half = shape.head_dim // 2
    caches = 2 * shape.layers
    arguments = {
        "inputs_embeds": torch.zeros(_BATCH, _NEW, shape.hidden),
        "rope_cos": torch.ones(_BATCH, _NEW, half),
        "rope_sin": torch.zeros(_BATCH, _NEW, half),
        "kv_len": torch.full((shape.layers, _BATCH), _PAST, dtype=torch.int32),
        "past_extent": torch.zeros(_PAST, dtype=torch.int8),
        "last_index": torch.full((_BATCH,), _NEW - 1, dtype=torch.int32),
        "past": [torch.zeros(_BATCH, shape.kv_heads, _CAPACITY, shape.head_dim) for _ in range(caches)],
    }
    batch, new, past, capacity = (torch.export.Dim(name) for name in "BSPC")
    rows = {0: batch, 1: new}
    dynamic_shapes = {
        "inputs_embeds": rows,
        "rope_cos": rows,
        "rope_sin": rows,
        "kv_len": {1: batch},
        "past_extent": {0: past},
        "last_index": {0: batch},
        "past": [{0: batch, 2: capacity}] * caches,
    }
    layers = range(shape.layers)
    names = [name for name in arguments if name != "past"]
    with torch.no_grad():
        program = torch.onnx.export(
            _Decoder(model, observation_window).eval(),
            kwargs=arguments,
            input_names=[*names, *(f"past_{kind}.{i}" for kind in "kv" for i in layers)],
            output_names=[
                "logits",
                *(f"present_{kind}.{i}" for i in layers for kind in "kv"),
                "q_window",
                "hidden_norm",
            ],
            dynamic_shapes=dynamic_shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    traced: ir.Model = program.model
    function = ir.from_proto(standard_functions()[KV_ATTENTION])
    traced.functions[function.identifier()] = function
    traced.opset_imports[DOMAIN] = DOMAIN_VERSION
    traced.ir_version = IR_VERSION
    return traced
