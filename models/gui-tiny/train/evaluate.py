# SPDX-License-Identifier: Apache-2.0
"""Click accuracy on held-out screens, all questions of a batch decoded together."""

import re

import numpy as np
import torch
from packed import PackedForward, patchify
from splits import held_out

ANSWER = re.compile(r"Action: click\(start_box='\((\d+),(\d+)\)'\)")


def evaluate(forward: PackedForward, split: str, screens: int, batch: int) -> dict[str, tuple[float, int]]:
    """Greedy answers to the questions of ``screens`` screens.

    Returns:
        kind of question (``icon``, ``word``) → share of clicks inside the element's box, and their number.
    """
    outcomes: dict[str, list[bool]] = {"icon": [], "word": []}
    for start in range(0, screens, batch):
        drawn = [held_out(split, start + row, forward.size, forward.questions) for row in range(batch)]
        packed = [forward.pack(questions) for _, questions in drawn]
        device = forward.prefix.device
        ids = torch.tensor([row[0] for row in packed], device=device)
        starts = torch.tensor([row[2] for row in packed], device=device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            visual = forward.vision(
                forward.normalise(patchify(np.stack([screen.image for screen, _ in drawn])))
            )
            answers = forward.generate(visual, ids, starts)
        for (_, questions), answered in zip(drawn, answers, strict=True):
            for question, answer in zip(questions, answered, strict=True):
                match = ANSWER.fullmatch(answer.strip())
                hit = match is not None and question.element.contains(int(match[1]), int(match[2]))
                outcomes["icon" if question.element.kind == "icon" else "word"].append(hit)
    return {kind: (round(float(np.mean(hits)), 4), len(hits)) for kind, hits in outcomes.items() if hits}
