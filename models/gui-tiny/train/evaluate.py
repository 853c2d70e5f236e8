# SPDX-License-Identifier: Apache-2.0
"""How good the model is while it is trained: clicks, each token predicted behind the right ones.

That costs one forward pass and is a little kinder than an answer that the model writes alone; ``starkv eval
--suite synthetic`` measures those.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from batches import collate
from fast_decoder import Hidden
from lessons import Lesson
from packed import END, IGNORE, Layout, Packed, PackedForward

ANSWER = re.compile(r".*Action: click\(start_box='\((\d+),(\d+)\)'\)", re.DOTALL)


@torch.no_grad()
def evaluate(
    lessons: Iterable[Sequence[Lesson]], forward: Callable[[Layout], PackedForward]
) -> dict[str, tuple[float, int]]:
    """Share of clicks inside the target's box, by kind of question.

    Args:
        lessons: batches of one layout each.
        forward: of a layout.

    Returns:
        kind → share, and number of questions.
    """
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for some in lessons:
        packer = forward(some[0].layout)
        batch = collate(some, forward, relative=False)
        device = packer.prefix.device
        packed = batch["packed"]
        assert isinstance(packed, Packed)
        packed = packed.to(device)
        visual = packer.vision(batch["patches"])  # type: ignore[arg-type]
        visual = visual.reshape(len(some), -1, visual.shape[-1])
        hidden: Hidden = packer.hidden(visual, packed)
        best = packer.logits(hidden.packed).argmax(-1)
        for row, lesson in enumerate(some):
            for number, question in enumerate(lesson.questions):
                wanted = (packed.segments[row] == number) & (packed.targets[row] != IGNORE)
                text = packer.tokenizer.decode(best[row, wanted]).split(END)[0]
                match = ANSWER.fullmatch(text)
                x0, y0, x1, y1 = question.box
                hit = match is not None and x0 <= int(match[1]) < x1 and y0 <= int(match[2]) < y1
                outcomes[question.task].append(hit)
    return {task: (round(sum(hits) / len(hits), 4), len(hits)) for task, hits in sorted(outcomes.items())}
