# SPDX-License-Identifier: Apache-2.0
"""Lessons → tensors."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from fast_vision import patchify
from lessons import Asked, Lesson
from packed import IGNORE, Layout, Packed, PackedForward, stack
from targets import cell_facts, cell_owners
from tokens import PHRASES
from torch import Tensor
from torch.utils.data import Dataset

DONE = next(phrase for phrase in PHRASES if "done" in phrase)
Batch = Mapping[str, Tensor | Packed | Layout]


class Batches(Dataset[dict[str, Tensor | Packed | Layout]]):
    """Item i is the whole batch number i.

    Args:
        lessons: batch number → lessons of one layout.
        forward: layout → packs questions.
        count: number of batches.
        relative: centres relative to their cells.
    """

    def __init__(
        self,
        lessons: Callable[[int], Sequence[Lesson]],
        forward: Callable[[Layout], PackedForward],
        count: int,
        relative: bool,
    ) -> None:
        self.lessons, self.forward, self.count, self.relative = lessons, forward, count, relative

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor | Packed | Layout]:
        return collate(self.lessons(index), self.forward, self.relative)


def collate(
    lessons: Sequence[Lesson], forward: Callable[[Layout], PackedForward], relative: bool
) -> dict[str, Tensor | Packed | Layout]:
    """One batch: ``patches`` ``[B * frames, patches, 588]``, ``facts`` ``[B, 8, visual tokens]``, and where
    there are questions ``packed``, ``looks`` ``[B, T]`` and ``evidence`` ``[B, E, visual tokens]``."""
    layout = lessons[0].layout
    facts, evidence = zip(*(_cells(lesson, relative) for lesson in lessons), strict=True)
    batch: dict[str, Tensor | Packed | Layout] = {
        "layout": layout,
        "patches": patchify(np.stack([frame for lesson in lessons for frame in lesson.frames])),
        "facts": torch.from_numpy(np.stack(facts)),
    }
    if lessons[0].questions:
        packer = forward(layout)
        packed = stack(
            [
                packer.pack([q.text for q in one.questions], [q.answer for q in one.questions])
                for one in lessons
            ]
        )
        done = packer.tokenizer.convert_tokens_to_ids(DONE)
        most = max(len(places) for places in evidence)
        padded = [np.pad(places, ((0, most - len(places)), (0, 0))) for places in evidence]
        batch["packed"] = packed
        batch["looks"] = look_numbers(packed, done, [lesson.questions for lesson in lessons])
        batch["evidence"] = torch.from_numpy(np.stack(padded))
    return batch


def _cells(lesson: Lesson, relative: bool) -> tuple[np.ndarray, np.ndarray]:
    """Facts ``[8, visual tokens]``; each question's two places ``[2 * questions, visual tokens]``."""
    _, height, width = lesson.layout
    owners = [cell_owners([element.box for element in frame], height, width) for frame in lesson.shown]
    facts = [
        cell_facts(shown, owner, relative, compared=number > 0)
        for number, (shown, owner) in enumerate(zip(lesson.shown, owners, strict=True))
    ]
    numbers = [{element.box: number for number, element in enumerate(frame)} for frame in lesson.shown]
    places = np.zeros((2 * len(lesson.questions), len(owners), *owners[0].shape), bool)
    for index, question in enumerate(lesson.questions):
        for part, look in enumerate(question.looks):
            for frame, box in look:
                if box in numbers[frame]:
                    places[2 * index + part, frame] |= owners[frame] == numbers[frame][box]
    return (
        np.concatenate([part.reshape(8, -1) for part in facts], 1),
        places.reshape(len(places), lesson.layout.visual_tokens),
    )


def look_numbers(packed: Packed, done: int, questions: Sequence[Sequence[Asked]]) -> Tensor:
    """Number of the place that each row should look at ``[B, T]``: of a question's first one, or of its
    second one once the answer has said what is done; −1 for rows that write no answer."""
    looks = torch.where(packed.targets == IGNORE, -1, 2 * packed.segments)
    for row, asked in enumerate(questions):
        for number, question in enumerate(asked):
            if len(question.looks) == 2:
                inside = packed.segments[row] == number
                after = (packed.ids[row] == done) & inside
                later = after.cumsum(0).bool() & inside & (looks[row] >= 0)
                looks[row, later] += 1
    return looks
