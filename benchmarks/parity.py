# SPDX-License-Identifier: Apache-2.0
"""Exported graphs against Hugging Face transformers in fp32, on the embedded model.

    python benchmarks/parity.py

Errors are the largest absolute difference divided by the largest absolute value of the reference.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import Reference, engines, named_clicks, report
from PIL import Image
from transformers import DynamicCache

from starkv.methods.rows import prompt_rows
from starkv.runtime.engines.base import Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.image import ImageInputs
from starkv.runtime.preprocess.positions import multimodal_positions, rope_tables, text_positions

GRIDS = ((16, 16), (20, 36), (18, 30), (40, 72), (78, 138))
"""Patches; the second and third are no multiples of eight, the last is 1080p."""
STEPS = 16


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@torch.no_grad()
def vision_errors(reference: Reference, engine: OrtEngine) -> dict[str, float]:
    """Grid → error of the image tokens."""
    errors = {}
    for rows, columns in GRIDS:
        pixels = torch.randn(rows * columns, 1176, generator=torch.Generator().manual_seed(0))
        theirs = reference.model.model.get_image_features(pixels, torch.tensor([[1, rows, columns]]))
        theirs = torch.cat(list(getattr(theirs, "pooler_output", theirs))).numpy()
        image = ImageInputs(
            pixels.numpy(),
            rows,
            columns,
            (rows // 2, columns // 2),
            rows * 14,
            columns * 14,
            rows * 14,
            columns * 14,
        )
        errors[f"{columns * 14}x{rows * 14}"] = relative_error(engine.encode_image(image), theirs)
    return errors


@torch.no_grad()
def logits_errors(reference: Reference, engine: OrtEngine, screens: int) -> tuple[float, float]:
    """Worst error of the prefill's logits and of those of the decode steps, over held-out screens."""
    prefill, decode = [], []
    for sample in named_clicks("test", screens):
        inputs = reference.inputs(Image.fromarray(sample.frames[0]), sample.question)
        cache = DynamicCache(config=reference.model.config.get_text_config())
        theirs = reference.model(**inputs, past_key_values=cache, use_cache=True)

        ids = inputs["input_ids"][0].tolist()
        rows, columns = (int(side) for side in inputs["image_grid_thw"][0, 1:])
        pixels = inputs["pixel_values"].numpy()
        merged = (rows // 2, columns // 2)
        embeds = engine.embed(ids)
        pad = engine.manifest.tokens.image_pad
        sides = (rows * 14, columns * 14) * 2
        embeds[np.asarray(ids) == pad] = engine.encode_image(
            ImageInputs(pixels, rows, columns, merged, *sides)
        )
        positions = multimodal_positions(ids, pad, [merged])
        arena, pool = engine.new_arena(len(ids)), engine.new_pool(1, len(ids) + STEPS)
        ours = engine.prefill(arena, embeds, Rope(*rope_tables(positions.values, engine.manifest.text)))
        prefill.append(relative_error(ours, theirs.logits[0, -1].numpy()))
        engine.compress(arena, pool, pool.acquire(), prompt_rows(len(ids), [], []), KvPolicy())
        for step in range(STEPS):
            token = int(theirs.logits[0, -1].argmax())
            at = positions.next_position + step
            theirs = reference.model(
                input_ids=torch.tensor([[token]]),
                position_ids=torch.full((3, 1, 1), at),
                past_key_values=theirs.past_key_values,
                use_cache=True,
            )
            rope = Rope(*rope_tables(text_positions(1, at).values, engine.manifest.text))
            ours = engine.decode(pool, engine.embed([token]), rope)[0]
            decode.append(relative_error(ours, theirs.logits[0, -1].numpy()))
    return max(prefill), max(decode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screens", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    reference = Reference()
    with engines("fp32") as directories:
        engine = OrtEngine(directories["fp32"])
        prefill, decode = logits_errors(reference, engine, args.screens)
        vision = vision_errors(reference, engine)
    figures = {"prefill logits": prefill, f"logits of {STEPS} decode steps": decode}
    figures |= {f"vision {size}": error for size, error in vision.items()}
    table = [("compared with transformers, fp32", "largest relative error")]
    table += [(name, f"{error:.1e}") for name, error in figures.items()]
    report(table, {"benchmark": "parity", "screens": args.screens, "figures": figures}, args.out)


if __name__ == "__main__":
    main()
