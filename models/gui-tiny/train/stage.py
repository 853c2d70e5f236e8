# SPDX-License-Identifier: Apache-2.0
"""One stage of training: its lessons, its loss, its optimizers, its checkpoint."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from batches import Batch, Batches
from evaluate import evaluate
from lessons import Lesson
from muon import Muon
from packed import IGNORE, PackedForward
from precision import has_fast_bfloat16
from safetensors.torch import load_file, save_file
from targets import COMPARED, RARE, CellHeads, guidance_loss, reading_loss, shown_heads
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

log = logging.getLogger("train")
VISION_WEIGHTS = (1.0, 1.0, 1.5, 1.5, 0.5, 0.5)
"""Of kind, colour, shape, word, centre x and y while the tower learns alone."""
AUXILIARY, GUIDANCE = 0.5, 0.2
"""Weights of the dense losses and of the guided heads while answers are learned."""
WARM_UP = 50
HEADS_FILE = "heads.safetensors"
LOG_EVERY = 50


@dataclass(frozen=True)
class StageSpec:
    """What a stage teaches, and how."""

    name: str
    lessons: Callable[[int, float], Sequence[Lesson]]
    """Batch number and progress (0 … 1) → lessons of one layout."""
    steps: int
    batches: int
    """Per step."""
    matrix_rate: float = 0.02
    """Muon's learning rate."""
    rest_rate: float = 3e-3
    """AdamW's."""
    decay: float = 0.45
    """Share of the steps, the last ones, over which the rates sink linearly to zero. Most of the accuracy
    comes from there: batches are small, and what they disagree about averages out."""
    vision_alone: bool = False
    validation: Callable[[], list[Sequence[Lesson]]] = field(default=list)

    def rate(self, step: int) -> float:
        """Share of the learning rates at a step."""
        decay = (self.steps - step) / (self.decay * self.steps) if self.decay else 1.0
        return min(1.0, (step + 1) / WARM_UP, max(0.0, decay))


class Heads(nn.Module):
    """Heads of the dense losses."""

    def __init__(self, hidden: int, relative: bool) -> None:
        super().__init__()
        self.shown = shown_heads(hidden, relative)
        self.compared = CellHeads(hidden, list(COMPARED.values()), (1.0, RARE))


class Stage:
    """Trains a model.

    Args:
        spec: of the stage.
        model: is changed.
        tokenizer: of the answers.
        work: folder of the checkpoints.
        workers: processes that draw screens.
        save_every: steps between checkpoints.
    """

    def __init__(
        self,
        spec: StageSpec,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        work: Path,
        workers: int,
        save_every: int,
    ) -> None:
        self.spec, self.model, self.workers, self.save_every = spec, model, workers, save_every
        self.device = next(model.parameters()).device
        self.heads = Heads(model.config.text_config.hidden_size, spec.vision_alone).to(self.device)
        self.optimizers = _optimizers(model.model.visual if spec.vision_alone else model, self.heads, spec)
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.checkpoint = work / f"{spec.name}.pt"
        self.forward = lru_cache(maxsize=None)(lambda layout: PackedForward(model, tokenizer, layout))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss and its parts, for the log: answer, guidance, looking back, reading, then the heads."""
        forward, facts = self.forward(batch.layout), batch.facts.to(self.device)
        visual = forward.vision(batch.patches)
        visual = visual.reshape(len(facts), -1, visual.shape[-1])
        if batch.asking is None:
            parts = self.heads.shown.losses(visual, facts[:, :6])
            return (parts * parts.new_tensor(VISION_WEIGHTS)).sum(), parts.detach()
        asking = batch.asking
        packed = asking.packed.to(self.device)
        hidden = forward.hidden(visual, packed)
        counted = packed.targets != IGNORE
        logits = forward.logits(hidden.packed[counted]).float()
        weights = asking.weights.to(self.device)
        losses = F.cross_entropy(logits, packed.targets[counted], reduction="none")
        answer = (losses * weights[counted]).mean()
        evidence = asking.evidence.to(self.device)
        looks, finds = asking.looks.to(self.device), asking.finds.to(self.device)
        guidance = guidance_loss(hidden.attended_log, looks, evidence, weights)
        guidance = guidance + guidance_loss(hidden.finding_log, finds, evidence, weights)
        reading = reading_loss(hidden.following_log, asking.follows.to(self.device))
        reading = reading + reading_loss(hidden.copying_log, asking.copies.to(self.device))
        looking_back = -hidden.looking_back_log.sum() / max(1, hidden.looking_back_log.numel())
        parts = torch.cat(
            [
                self.heads.shown.losses(hidden.tapped, facts[:, :6]),
                self.heads.compared.losses(hidden.compared, facts[:, 6:]),
            ]
        )
        loss = answer + GUIDANCE * (guidance + looking_back + reading) + AUXILIARY * parts.sum()
        return loss, torch.cat([torch.stack([answer, guidance, looking_back, reading]), parts]).detach()

    def save(self, step: int) -> None:
        """Write the checkpoint, beside the last one until it is whole."""
        beside = self.checkpoint.with_suffix(".part")
        torch.save(
            {
                "step": step,
                "model": self.model.state_dict(),
                "heads": self.heads.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            },
            beside,
        )
        beside.replace(self.checkpoint)

    def save_heads(self, directory: Path) -> None:
        """Write the heads, which no finished model holds, beside one that training is to go on from."""
        save_file(self.heads.state_dict(), directory / HEADS_FILE)

    def take_heads(self, directory: Path) -> None:
        """Go on with the heads of :meth:`save_heads`, if they are there or in the folder ``train`` there.

        New ones would first have to learn to read the tokens, and disturb them meanwhile.
        """
        # A shipped model keeps them apart: whatever reads checkpoints would take them for weights.
        for path in (directory / HEADS_FILE, directory / "train" / HEADS_FILE):
            if path.is_file():
                self.heads.load_state_dict(load_file(path, device=str(self.device)))
                return

    def restore(self) -> int:
        """Load the checkpoint if there is one; returns the step to go on from."""
        if not self.checkpoint.exists():
            return 0
        saved = torch.load(self.checkpoint, map_location=self.device)
        self.model.load_state_dict(saved["model"])
        self.heads.load_state_dict(saved["heads"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        return int(saved["step"])

    def run(self, resume: bool) -> None:
        """Train from the start, or from the checkpoint where ``resume`` asks for it, to the last step."""
        spec, first = self.spec, self.restore() if resume else 0
        count = spec.steps * spec.batches
        data = Batches(lambda i: spec.lessons(i, i / count), self.forward, count, spec.vision_alone)
        loader = DataLoader(
            Subset(data, range(first * spec.batches, count)),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=8 if self.workers else None,
        )
        stream, started = iter(loader), time.monotonic()
        history: list[np.ndarray] = []
        bfloat16 = has_fast_bfloat16(self.device.type)
        for step in range(first, spec.steps):
            for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * spec.rate(step)
            for _ in range(spec.batches):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
                    loss, parts = self.loss(next(stream))
                (loss / spec.batches).backward()
                history.append(parts.cpu().numpy())
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            done = step + 1
            if done % LOG_EVERY == 0 or done == spec.steps:
                losses = " ".join(f"{value:.3f}" for value in np.mean(history, 0))
                history.clear()
                minutes = (time.monotonic() - started) / 60
                log.info("%s step %d/%d, %.1f min: losses %s", spec.name, done, spec.steps, minutes, losses)
            if done % self.save_every == 0 or done == spec.steps:
                self.save(done)
                if lessons := spec.validation():
                    log.info("validation: %s", json.dumps(evaluate(lessons, self.forward)))


def _optimizers(model: nn.Module, heads: Heads, spec: StageSpec) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network; AdamW for embeddings, first layer, norms, biases, heads."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = list(heads.parameters())
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
        (matrices if inner else rest).append(parameter)
    return [
        Muon(matrices, lr=spec.matrix_rate),
        torch.optim.AdamW(rest, lr=spec.rest_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
