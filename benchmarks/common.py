# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the embedded model in both worlds, and how results are kept."""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from starkv.export.build.ort import build_ort_engine
from starkv.export.cards import resolve_model
from starkv.export.export_model import export_model
from starkv.export.quantize.presets import load_preset
from starkv.synthetic.samples import Sample
from starkv.synthetic.suite import click_samples
from starkv.validation.report import installed_versions

MODEL = Path(__file__).parent.parent / "models" / "gui-tiny"
sys.path[:0] = [str(MODEL / "train"), str(Path(__file__).parent / "gui")]


class Reference:
    """The Hugging Face model in fp32 with its processor."""

    def __init__(self, folder: Path = MODEL) -> None:
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def inputs(self, image: Image.Image, prompt: str) -> dict[str, torch.Tensor]:
        """Keyword arguments of ``forward`` and ``generate`` for one screenshot and one instruction."""
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pixels = self.processor(images=[image], return_tensors="pt")
        tokens = int(pixels["image_grid_thw"].prod()) // 4
        text = text.replace("<|image_pad|>", "<|image_pad|>" * tokens)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels["pixel_values"].float(),
            "image_grid_thw": pixels["image_grid_thw"],
            # Without the token types transformers falls back to one-dimensional positions, silently.
            "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
        }

    @torch.no_grad()
    def answer(self, image: Image.Image, prompt: str, max_new_tokens: int = 24) -> str:
        """Greedy reply."""
        inputs = self.inputs(image, prompt)
        ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return str(self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@contextmanager
def engines(*presets: str) -> Iterator[dict[str, Path]]:
    """Freshly built gui-tiny engines, one per quantization preset."""
    resolved = resolve_model("gui-tiny")
    with tempfile.TemporaryDirectory() as scratch:
        built = {}
        for preset in presets:
            exported = Path(scratch) / f"export-{preset}"
            export_model(resolved.folder, resolved.card, exported, load_preset(preset))
            built[preset] = Path(scratch) / preset
            build_ort_engine(exported, built[preset])
        yield built


def named_clicks(split: str, count: int) -> list[Sample]:
    """Questions of the synthetic suite about single screens that name their target."""
    named = (sample for sample in click_samples(split, 0, 4 * count) if sample.task in ("icon", "word"))
    return list(islice(named, count))


def report(table: list[tuple[str, ...]], figures: dict[str, Any], out: Path | None) -> None:
    """Print ``table`` (header first) as Markdown and write ``figures`` as JSON."""
    header, *rows = table
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    if out:
        out.write_text(
            json.dumps({**describe_machine(), "versions": installed_versions(), **figures}, indent=2) + "\n"
        )
        print(f"written to {out}", file=sys.stderr)
