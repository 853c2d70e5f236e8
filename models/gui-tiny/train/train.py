# SPDX-License-Identifier: Apache-2.0
"""Train gui-tiny from scratch, evaluate it on held-out screens, and save a Hugging Face folder.

    python models/gui-tiny/train/train.py --out models/gui-tiny

Two stages: the vision tower alone learns to say what each 28-pixel cell shows; then everything learns to
answer. Batch number i of a split is always drawn from the same seed, so a run can be resumed (``--resume``)
and repeated; training, validation and test screens never share a seed.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from evaluate import evaluate
from model import build_model
from muon import Muon
from packed import PackedForward, patchify
from screens import random_questions
from splits import draw_screen
from targets import CellHeads, cell_targets, guidance_loss
from tokens import build_tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

log = logging.getLogger("train")
VISION_WEIGHTS = (1.0, 1.0, 1.5, 1.5, 0.5, 0.5)  # kind, colour, shape, word, centre x, centre y


def crowding(split: str, progress: float) -> tuple[int, int]:
    """Fewest and most elements on a screen at a point of training (0 … 1).

    The vision tower sees full screens at once: each element is a lesson. Answers begin with screens of one or
    two elements; on full ones the model would learn to ignore the image before it can find anything there.
    """
    if split == "vision":
        return 8, 16
    grown = min(1.0, max(0.0, (progress - 0.05) / 0.3))
    return 1 + round(3 * grown), 2 + round(10 * grown)


class Batches(Dataset[dict[str, Tensor]]):
    """Item i is the whole batch number i."""

    def __init__(self, split: str, forward: PackedForward, args: argparse.Namespace, count: int) -> None:
        self.split, self.forward, self.args, self.count = split, forward, args, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        args, forward = self.args, self.forward
        fewest, most = crowding(self.split, index / self.count)
        drawn = [
            draw_screen(self.split, index * args.batch + row, args.size, fewest, most)
            for row in range(args.batch)
        ]
        batch = {
            "patches": patchify(np.stack([screen.image for screen, _ in drawn])),
            "cells": torch.from_numpy(np.stack([cell_targets(screen) for screen, _ in drawn])),
        }
        if self.split != "vision":
            asked = [random_questions(rng, screen, forward.questions) for screen, rng in drawn]
            packed = [forward.pack(questions) for questions in asked]
            batch["ids"] = torch.tensor([ids for ids, _, _ in packed])
            batch["targets"] = torch.tensor([targets for _, targets, _ in packed])
            batch["centers"] = torch.tensor([[q.element.center for q in questions] for questions in asked])
        return batch


def build_optimizers(
    model: torch.nn.Module, heads: CellHeads, args: argparse.Namespace
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network; AdamW for embeddings, first layer, norms, biases, heads."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = list(heads.parameters())
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
        (matrices if inner else rest).append(parameter)
    return [
        Muon(matrices, lr=args.matrix_lr),
        torch.optim.AdamW(rest, lr=args.rest_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, steps: int, warm_up: int = 50) -> float:
    """Warm-up, constant until 55 %, then linearly to zero: most of the accuracy comes in the decay."""
    return min(1.0, (step + 1) / warm_up, max(0.0, (steps - step) / (0.45 * steps)))


class Stage:
    """One stage of training: its loss, optimizers, data and checkpoint."""

    def __init__(self, name: str, forward: PackedForward, args: argparse.Namespace) -> None:
        self.name, self.forward, self.args = name, forward, args
        self.steps: int = getattr(args, f"{name}_steps")
        self.device = next(forward.model.parameters()).device
        hidden = forward.model.config.text_config.hidden_size
        self.heads = CellHeads(hidden, args.size, relative=name == "vision").to(self.device)
        trained = forward.model.model.visual if name == "vision" else forward.model
        self.optimizers = build_optimizers(trained, self.heads, args)
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.weights = torch.tensor(VISION_WEIGHTS, device=self.device)
        self.checkpoint: Path = args.work / f"{name}.pt"

    def loss(
        self,
        pixels: Tensor,
        cells: Tensor,
        ids: Tensor | None,
        targets: Tensor | None,
        centers: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The loss and its parts, for the log."""
        visual = self.forward.vision(pixels)
        if ids is None or targets is None or centers is None:
            parts = self.heads.losses(visual, cells)
            return (parts * self.weights).sum(), parts.detach()
        hidden, tapped, attended_log = self.forward.hidden(visual, ids)
        logits = self.forward.logits(hidden).flatten(0, 1).float()
        answer = F.cross_entropy(logits, targets.flatten(), ignore_index=-100)
        guidance = guidance_loss(attended_log, targets, cells, centers)
        parts = self.heads.losses(tapped, cells)
        loss = answer + self.args.guidance * guidance + self.args.auxiliary * parts.sum()
        return loss, torch.cat([answer[None], guidance[None], parts]).detach()

    def save(self, step: int) -> None:
        beside = self.checkpoint.with_suffix(".part")
        torch.save(
            {
                "step": step,
                "model": self.forward.model.state_dict(),
                "heads": self.heads.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            },
            beside,
        )
        beside.replace(self.checkpoint)

    def restore(self) -> int:
        """Load the checkpoint where ``--resume`` asks for it; returns the step to go on from."""
        if not (self.args.resume and self.checkpoint.exists()):
            return 0
        saved = torch.load(self.checkpoint, map_location=self.device)
        self.forward.model.load_state_dict(saved["model"])
        self.heads.load_state_dict(saved["heads"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        return int(saved["step"])

    def run(self) -> None:
        """Train from the checkpoint, or from the start, to the last step."""
        args, first = self.args, self.restore()
        loss_of = torch.compile(self.loss, dynamic=False) if args.compile else self.loss
        batches = Batches(self.name, self.forward, args, self.steps * args.accumulate)
        loader = DataLoader(
            Subset(batches, range(first * args.accumulate, self.steps * args.accumulate)),
            batch_size=None,
            num_workers=args.workers,
            prefetch_factor=8 if args.workers else None,
        )
        stream, history, started = iter(loader), [], time.monotonic()
        for step in range(first, self.steps):
            for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * schedule(step, self.steps)
            for _ in range(args.accumulate):
                batch = next(stream)
                pixels = self.forward.normalise(batch["patches"])
                rest = [
                    batch[name].to(self.device) if name in batch else None
                    for name in ("cells", "ids", "targets", "centers")
                ]
                with torch.autocast(self.device.type, torch.bfloat16):
                    loss, parts = loss_of(pixels, *rest)
                (loss / args.accumulate).backward()
                history.append(parts.cpu().numpy())
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            done = step + 1
            if done % 100 == 0 or done == self.steps:
                losses = " ".join(f"{value:.3f}" for value in np.mean(history[-100 * args.accumulate :], 0))
                minutes = (time.monotonic() - started) / 60
                log.info("%s step %d/%d, %.1f min: losses %s", self.name, done, self.steps, minutes, losses)
            if done % args.save_every == 0 or done == self.steps:
                self.save(done)
                if self.name == "language":
                    log.info(
                        "validation: %s", json.dumps(evaluate(self.forward, "validation", 64, args.batch))
                    )


def save_model(forward: PackedForward, args: argparse.Namespace) -> None:
    """Write weights (bf16), configuration, tokenizer and processor as one Hugging Face folder."""
    from transformers import GenerationConfig, Qwen2VLImageProcessorPil

    model = forward.model.to(torch.bfloat16)
    end = forward.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end[1], do_sample=False)
    model.save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    forward.tokenizer.save_pretrained(args.out)
    pixels = args.size**2
    Qwen2VLImageProcessorPil(min_pixels=pixels, max_pixels=pixels).save_pretrained(args.out)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path("runs/gui-tiny"), help="folder of the checkpoints")
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=8, help="screens per forward")
    parser.add_argument("--accumulate", type=int, default=2, help="forwards per optimizer step")
    parser.add_argument("--questions", type=int, default=6, help="questions per screen")
    parser.add_argument("--vision-steps", type=int, default=3600)
    parser.add_argument("--language-steps", type=int, default=5000)
    parser.add_argument("--matrix-lr", type=float, default=0.02, help="Muon's learning rate")
    parser.add_argument("--rest-lr", type=float, default=3e-3, help="AdamW's learning rate")
    parser.add_argument(
        "--auxiliary", type=float, default=0.5, help="weight of the dense losses in stage two"
    )
    parser.add_argument("--guidance", type=float, default=0.2, help="weight of the attention's guidance")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw screens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --work")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed).to(args.device)
    log.info("%.2f M parameters, on %s", sum(p.numel() for p in model.parameters()) / 1e6, args.device)
    forward = PackedForward(model, tokenizer, args.size, args.questions)
    for name in ("vision", "language"):
        Stage(name, forward, args).run()
    save_model(forward, args)
    log.info("test: %s", json.dumps(evaluate(forward, "test", 256, args.batch)))


if __name__ == "__main__":
    main()
