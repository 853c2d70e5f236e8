# SPDX-License-Identifier: Apache-2.0
"""What transformers computes where the decoder graph has inputs and outputs."""

from typing import Any

import numpy as np
import torch
from decoder_runner import StepResult
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl


class DecoderReference:
    """The text decoder of a PyTorch model, stepped with its own cache, in float32."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        self.text = model.model.language_model
        self.head = model.lm_head
        self.cache = DynamicCache(config=self.text.config)

    def rope(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines [B,S,D/2] of positions [3,B,S]."""
        cos, sin = self.text.rotary_emb(torch.zeros(1), torch.from_numpy(positions))
        half = cos.shape[-1] // 2
        return cos[..., :half].numpy(), sin[..., :half].numpy()

    def step(self, embeds: np.ndarray, positions: np.ndarray, window: int) -> StepResult:
        """Run S new tokens: embeds [B,S,hidden], positions [3,B,S]. One token sees all rows of each layer."""
        queries: list[torch.Tensor] = []
        norms: list[torch.Tensor] = []
        original = modeling_qwen2_5_vl.apply_rotary_pos_emb

        def record_queries(*args: Any, **kwargs: Any) -> Any:
            rotated = original(*args, **kwargs)
            queries.append(rotated[0])
            return rotated

        def record_norm(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            norms.append(output.norm(dim=-1))

        hooks = [layer.input_layernorm.register_forward_hook(record_norm) for layer in self.text.layers]
        modeling_qwen2_5_vl.apply_rotary_pos_emb = record_queries
        try:
            with torch.no_grad():
                hidden = self.text(
                    inputs_embeds=torch.from_numpy(embeds.astype(np.float32)),
                    position_ids=torch.from_numpy(positions),
                    past_key_values=self.cache,
                    # Without a mask a layer may hold fewer rows than the one before it.
                    attention_mask={"full_attention": None} if embeds.shape[1] == 1 else None,
                    use_cache=True,
                ).last_hidden_state
                logits = self.head(hidden[:, -1])
        finally:
            modeling_qwen2_5_vl.apply_rotary_pos_emb = original
            for hook in hooks:
                hook.remove()
        windows = torch.stack([query[:, :, -window:] for query in queries])
        return StepResult(logits.numpy(), windows.numpy(), torch.stack(norms).numpy())
