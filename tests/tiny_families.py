# SPDX-License-Identifier: Apache-2.0
"""Small random models of the families beside Qwen2.5-VL, as checkpoints and as transformers computes them."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_chat import IMAGE_PAD, write_chat_files
from tiny_model import HEADS, HIDDEN, KV_HEADS, MROPE_SECTION, VOCAB, randomize
from transformers import (
    DynamicCache,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

_TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass
class Reference(ABC):
    """A family's model in PyTorch, stepped with its own cache."""

    cache: Any = field(default=None, init=False)

    @abstractmethod
    def image_embeds(self, pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Image tokens [T,hidden] of patches [N,1176] in a grid of (rows, columns)."""

    @abstractmethod
    def prefill(self, ids: Sequence[int], pixels: np.ndarray, grids: Sequence[tuple[int, int]]) -> np.ndarray:
        """Logits [V] behind a prompt with images, whose patches lie one behind the other in ``pixels``."""

    @abstractmethod
    def decode(self, token: int) -> np.ndarray:
        """Logits [V] behind one more token."""


def _grid_thw(grids: Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor([[1, *grid] for grid in grids])


@dataclass
class Qwen2VL(Reference):
    model: Qwen2VLForConditionalGeneration

    @torch.no_grad()
    def image_embeds(self, pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        embeds = self.model.model.visual(torch.from_numpy(pixels), _grid_thw([grid])).pooler_output
        return np.asarray(embeds.numpy())

    @torch.no_grad()
    def prefill(self, ids: Sequence[int], pixels: np.ndarray, grids: Sequence[tuple[int, int]]) -> np.ndarray:
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        tokens = torch.tensor([ids])
        found = self.model(
            input_ids=tokens,
            mm_token_type_ids=(tokens == IMAGE_PAD).int(),
            pixel_values=torch.from_numpy(pixels),
            image_grid_thw=_grid_thw(grids),
            past_key_values=self.cache,
            use_cache=True,
        )
        return np.asarray(found.logits[0, -1].numpy())

    @torch.no_grad()
    def decode(self, token: int) -> np.ndarray:
        found = self.model(input_ids=torch.tensor([[token]]), past_key_values=self.cache, use_cache=True)
        return np.asarray(found.logits[0, -1].numpy())


@dataclass
class OpenCua(Reference):
    """OpenCUA's authors put these two together; tokens count their positions one by one."""

    tower: Qwen2_5_VisionTransformerPretrainedModel
    text: Qwen2ForCausalLM

    @torch.no_grad()
    def image_embeds(self, pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        return np.asarray(self.tower(torch.from_numpy(pixels), _grid_thw([grid])).pooler_output.numpy())

    @torch.no_grad()
    def prefill(self, ids: Sequence[int], pixels: np.ndarray, grids: Sequence[tuple[int, int]]) -> np.ndarray:
        self.cache = DynamicCache(config=self.text.config)
        tokens = torch.tensor([ids])
        embeds = self.text.get_input_embeddings()(tokens)
        embeds[tokens == IMAGE_PAD] = self.tower(torch.from_numpy(pixels), _grid_thw(grids)).pooler_output
        found = self.text(inputs_embeds=embeds, past_key_values=self.cache, use_cache=True)
        return np.asarray(found.logits[0, -1].numpy())

    @torch.no_grad()
    def decode(self, token: int) -> np.ndarray:
        found = self.text(input_ids=torch.tensor([[token]]), past_key_values=self.cache, use_cache=True)
        return np.asarray(found.logits[0, -1].numpy())


def make_tiny_qwen2_vl(folder: Path) -> Qwen2VL:
    """Save a random Qwen2-VL with its side files into ``folder``."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": MROPE_SECTION}
    config = Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config={"depth": 3, "embed_dim": 64, "mlp_ratio": 3, "num_heads": 2, "hidden_size": HIDDEN},
        image_token_id=IMAGE_PAD,
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config).eval()
    randomize(model)
    model.save_pretrained(folder)
    write_chat_files(folder)
    return Qwen2VL(model)


def make_tiny_opencua(folder: Path) -> OpenCua:
    """Save a random OpenCUA under the names that its files on the Hub use."""
    torch.manual_seed(0)
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [1],
        "window_size": 112,
    }
    tower = Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLConfig(vision_config=vision).vision_config)
    text = Qwen2ForCausalLM(Qwen2Config(**_TEXT, rope_theta=10000.0))
    parts = torch.nn.ModuleDict({"vision_tower": tower, "language_model": text}).eval()
    randomize(parts)
    folder.mkdir()
    save_file(parts.state_dict(), folder / "model.safetensors")
    config = {
        "architectures": ["OpenCUAForConditionalGeneration"],
        "model_type": "opencua",
        "media_placeholder_token_id": IMAGE_PAD,
        "text_config": {**_TEXT, "rope_theta": 10000.0, "tie_word_embeddings": False},
        "vision_config": vision,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_chat_files(folder)
    return OpenCua(tower, text)
