# SPDX-License-Identifier: Apache-2.0
"""Train gui-tiny from scratch, stage by stage, and save a Hugging Face folder.

    python models/gui-tiny/train/train.py --out models/gui-tiny

Stages: the vision tower alone learns to say what each 28-pixel cell shows; then everything learns to answer
on small screens; then the model grows and learns large ones; then relations and episodes. Batch number i of
a stage is always drawn from the same seed, so a run can be resumed (``--resume``) and repeated; training,
validation and test never share a seed.
"""

import argparse
import logging
import sys
from pathlib import Path

import elementwise
import torch
from lessons import FIRST_LAYOUTS, LAST_LAYOUTS, Lesson, mixed_lessons, screen_lesson
from model import FIRST_LAYERS, LAYERS, build_model, grow
from stage import Stage, StageSpec
from tokens import build_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

log = logging.getLogger("train")
SMALL, LARGE, LARGEST = 224, 448, 560
"""Sides of screens in pixels."""
VALIDATION_BATCHES = 40


def screens(split: str, index: int, progress: float, batch: int) -> list[Lesson]:
    """A batch of single windows.

    The vision tower sees full screens at once: each element is a lesson. Answers begin with screens of one or
    two elements; on full ones the model would learn to ignore the image before it can find anything there.
    """
    size, fewest, most = {
        "vision": (SMALL, 8, 16),
        "language": (SMALL, *_crowding(progress)),
        "large": (LARGE, 4, 28),
        "validation": (SMALL, 6, 12),
    }[split]
    questions = 0 if split == "vision" else 6
    return [screen_lesson(split, index * batch + row, size, fewest, most, questions) for row in range(batch)]


def _crowding(progress: float) -> tuple[int, int]:
    grown = min(1.0, max(0.0, (progress - 0.05) / 0.3))
    return 1 + round(3 * grown), 2 + round(10 * grown)


def stages(args: argparse.Namespace) -> list[StageSpec]:
    """All stages in order."""

    def small() -> list[list[Lesson]]:
        return [screens("validation", index, 1.0, 8) for index in range(8)]

    def mixed() -> list[list[Lesson]]:
        return [mixed_lessons("validation", 0, index) for index in range(VALIDATION_BATCHES)]

    return [
        StageSpec(
            "vision",
            lambda i, progress: screens("vision", i, progress, 8),
            args.vision_steps,
            batches=2,
            vision_alone=True,
        ),
        StageSpec(
            "language",
            lambda i, progress: screens("language", i, progress, 8),
            args.language_steps,
            batches=2,
            validation=small,
        ),
        StageSpec(
            "large",
            lambda i, progress: screens("large", i, progress, 4),
            args.large_steps,
            batches=4,
            matrix_rate=0.01,
            rest_rate=1.5e-3,
            decay=0.0,
        ),
        StageSpec(
            "mixed",
            lambda i, progress: mixed_lessons(
                "train", args.run, i, FIRST_LAYOUTS if progress < args.small_frames else LAST_LAYOUTS
            ),
            args.mixed_steps,
            batches=2,
            matrix_rate=0.006,
            rest_rate=9e-4,
            decay=0.7,
            validation=mixed,
        ),
    ]


def save_model(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path
) -> None:
    """Write weights (bf16), configuration, tokenizer and processor as one Hugging Face folder."""
    from transformers import GenerationConfig, Qwen2VLImageProcessorPil

    model = model.to(torch.bfloat16)
    end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end[1], do_sample=False)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    Qwen2VLImageProcessorPil(min_pixels=SMALL**2, max_pixels=LARGE * LARGEST).save_pretrained(out)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path("runs/gui-tiny"), help="folder of the checkpoints")
    parser.add_argument("--vision-steps", type=int, default=3600)
    parser.add_argument("--language-steps", type=int, default=5000)
    parser.add_argument("--large-steps", type=int, default=300)
    parser.add_argument("--mixed-steps", type=int, default=8000)
    parser.add_argument(
        "--small-frames",
        type=float,
        default=0.6,
        metavar="SHARE",
        help="of the last stage's steps, the first ones, in which small frames are among the large ones",
    )
    parser.add_argument("--run", type=int, default=0, help="seed of the lessons of the last stage")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw screens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="fuse small steps; needs a C++ compiler")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --work")
    parser.add_argument("--from", dest="start", type=Path, help="go on from this finished model instead")
    parser.add_argument(
        "--stages", nargs="+", default=["vision", "language", "large", "mixed"], help="stages to train"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if args.compile:
        elementwise.fuse()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed, FIRST_LAYERS)
    if args.start:
        started = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
        model = build_model(tokenizer, args.seed, started.config.text_config.num_hidden_layers)
        model.load_state_dict(started.state_dict())
    for spec in stages(args):
        if spec.name not in args.stages:
            continue
        if spec.name in ("large", "mixed") and model.config.text_config.num_hidden_layers < LAYERS:
            model = grow(model.cpu(), tokenizer, args.seed)
        model = model.to(args.device)
        log.info("%s: %.2f M parameters", spec.name, sum(p.numel() for p in model.parameters()) / 1e6)
        stage = Stage(spec, model, tokenizer, args.work, args.workers, args.save_every)
        if args.start and not spec.vision_alone:
            stage.take_heads(args.start)
        stage.run(args.resume)
        stage.save_heads(args.work)
    save_model(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
