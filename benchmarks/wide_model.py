# SPDX-License-Identifier: Apache-2.0
"""Two layers of UI-TARS-1.5-7B's text decoder with random int4 weights: enough to time a prefill of all
28."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from peers_shapes import SIZES, checkpoint_config

from starkv.export.build.ort import build_ort_engine
from starkv.export.cards import card_of_folder
from starkv.export.export_model import export_model
from starkv.export.models.qwen2_5_vl_config import parse_config
from starkv.export.quantize.presets import load_preset
from starkv.export.random_checkpoint import write_random_checkpoint
from starkv.runtime.engines.base import Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.preprocess.positions import rope_tables, text_positions

TEXT = parse_config(checkpoint_config(SIZES["7b"]), Path("config.json")).text
LAYERS = 2


def prefill_seconds(rows: int, scratch: Path) -> float:
    """Seconds that 28 layers take to prefill ``rows`` rows: those of two layers, times 14.

    The head is counted 14 times as well, but it multiplies one row, in milliseconds.
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
    engine, folder = scratch / "wide-engine", scratch / "wide-checkpoint"
    if not engine.is_dir():
        write_random_checkpoint(checkpoint_config(replace(SIZES["7b"], layers=LAYERS)), folder)
        export_model(folder, card_of_folder(folder), scratch / "wide-export", load_preset("int4"))
        build_ort_engine(scratch / "wide-export", engine)
    return engine
