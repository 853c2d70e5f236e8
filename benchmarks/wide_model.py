# SPDX-License-Identifier: Apache-2.0
"""Two layers of UI-TARS-1.5-7B's text decoder with random int4 weights: enough to time a prefill of all
28."""

import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from starkv.export.build.ort import build_ort_engine
from starkv.export.cards import ModelCard
from starkv.export.export_model import export_model
from starkv.export.quantize.presets import load_preset
from starkv.manifest import TextShape
from starkv.runtime.engines.base import Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.preprocess.positions import rope_tables, text_positions

TEXT = TextShape(
    layers=28,
    hidden=3584,
    intermediate=18944,
    heads=28,
    kv_heads=4,
    head_dim=128,
    vocab=152064,
    rope_theta=1e6,
    mrope_section=[16, 24, 24],
    max_positions=128000,
    tied_embedding=False,
)
LAYERS, VOCAB = 2, 512


def prefill_seconds(rows: int, scratch: Path) -> float:
    """Seconds that 28 layers take to prefill ``rows`` rows: those of two layers, times 14.

    The head is left out: one row of it is 1 ms and more.
    """
    engine = OrtEngine(_engine(scratch), verify=False)
    text = engine.manifest.text
    embeds = np.random.default_rng(0).standard_normal((rows, text.hidden), np.float32)
    rope = Rope(*rope_tables(text_positions(rows).values, text))
    engine.prefill(engine.new_arena(64), embeds[:64], Rope(rope.cos[:, :64], rope.sin[:, :64]))
    arena = engine.new_arena(rows)
    started = time.perf_counter()
    engine.prefill(arena, embeds, rope)
    return (time.perf_counter() - started) * TEXT.layers / LAYERS


def _engine(scratch: Path) -> Path:
    """Build the engine once per scratch directory."""
    engine = scratch / "wide-engine"
    if engine.is_dir():
        return engine
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": TEXT.hidden,
            "intermediate_size": TEXT.intermediate,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": TEXT.heads,
            "num_key_value_heads": TEXT.kv_heads,
            "vocab_size": VOCAB,
            "max_position_embeddings": TEXT.max_positions,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": TEXT.rope_theta,
                "mrope_section": TEXT.mrope_section,
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": TEXT.hidden,
            "fullatt_block_indexes": [0],
        },
        image_token_id=VOCAB - 4,
        video_token_id=VOCAB - 3,
        vision_start_token_id=VOCAB - 2,
        vision_end_token_id=VOCAB - 1,
        tie_word_embeddings=False,
    )
    folder = scratch / "wide-checkpoint"
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(previous)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    card = ModelCard(
        name="wide",
        family="qwen2_5_vl",
        licence="none: random weights",
        folder=str(folder),
        coordinates="absolute",
        prompt="plain",
        min_pixels=3136,
        max_pixels=50176,
        quantization="int4",
        observation_window=64,
        max_context=16384,
    )
    export_model(folder, card, scratch / "wide-export", load_preset("int4"))
    build_ort_engine(scratch / "wide-export", engine)
    return engine
