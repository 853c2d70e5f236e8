# SPDX-License-Identifier: Apache-2.0
"""How good the model is while it is trained: clicks, each token predicted behind the right ones.

That costs one forward pass. A click counts only if everything before it would have been written as it
should; so the figures differ from those of answers that the model writes alone (``starkv eval --suite
synthetic``) only where a wrong digit changes the next ones.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from batches import collate
from fast_decoder import Hidden
from lessons import Lesson
from packed import END, IGNORE, Layout, PackedForward

CLICK = re.compile(r"\((\d+),(\d+)\)'\)$")


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
        if batch.asking is None:
            continue
        packed = batch.asking.packed.to(packer.prefix.device)
        visual = packer.vision(batch.patches)
        visual = visual.reshape(len(some), -1, visual.shape[-1])
        hidden: Hidden = packer.hidden(visual, packed)
        best = packer.logits(hidden.packed).argmax(-1)
        for row, lesson in enumerate(some):
            for number, question in enumerate(lesson.questions):
                wanted = (packed.segments[row] == number) & (packed.targets[row] != IGNORE)
                text = packer.tokenizer.decode(best[row, wanted]).split(END)[0]
                match = CLICK.search(text)
                x0, y0, x1, y1 = question.box
                same = text.rpartition("(")[0] == question.answer.rpartition("(")[0]
                right = same and match and x0 <= int(match[1]) < x1 and y0 <= int(match[2]) < y1
                outcomes[question.task].append(bool(right))
    return {task: (round(sum(hits) / len(hits), 4), len(hits)) for task, hits in sorted(outcomes.items())}
