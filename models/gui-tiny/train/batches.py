# SPDX-License-Identifier: Apache-2.0
"""Lessons → tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from fast_vision import patchify
from lessons import NEXT_WEIGHT, Asked, Lesson
from lists import list_rows
from packed import IGNORE, Layout, Packed, PackedForward, stack
from targets import cell_facts, cell_owners
from tokens import ANSWER_START, DONE
from torch import Tensor
from torch.utils.data import Dataset

PLACES, NAMED = 3, 2
"""Of a question: where its answer's rows should look, first and second, and what the question names."""


@dataclass(frozen=True)
class Asking:
    """The questions of a batch, and where one head should look."""

    packed: Packed
    looks: Tensor
    """``[B, T]``, see :func:`look_numbers`."""
    finds: Tensor
    """``[B, T]``: the same for the head that looks at what a question names."""
    evidence: Tensor
    """``[B, E, visual tokens]``, true where each place lies."""
    weights: Tensor
    """``[B, T]``, of each row's loss."""
    follows: Tensor
    """``[B, T, T]``: where items of lists should look, see :func:`list_rows`."""
    copies: Tensor
    """``[B, T, T]``: where rows that copy an item should look."""


@dataclass(frozen=True)
class Batch:
    """Screenshots of one layout, what they show, and questions about them."""

    layout: Layout
    patches: Tensor
    """uint8 ``[B * frames, patches, 588]``."""
    facts: Tensor
    """``[B, 8, visual tokens]``."""
    asking: Asking | None
    """None while the vision tower learns alone."""


class Batches(Dataset[Batch]):
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

    def __getitem__(self, index: int) -> Batch:
        return collate(self.lessons(index), self.forward, self.relative)


def collate(lessons: Sequence[Lesson], forward: Callable[[Layout], PackedForward], relative: bool) -> Batch:
    """One batch of lessons of one layout.

    Args:
        lessons: all of them with questions, or none.
        forward: layout → packs questions.
        relative: centres relative to their cells.
    """
    layout = lessons[0].layout
    facts, places = zip(*(_cells(lesson, relative) for lesson in lessons), strict=True)
    return Batch(
        layout,
        patchify(np.stack([frame for lesson in lessons for frame in lesson.frames])),
        torch.from_numpy(np.stack(facts)),
        _asking(lessons, forward(layout), places) if lessons[0].questions else None,
    )


def _asking(lessons: Sequence[Lesson], packer: PackedForward, places: Sequence[np.ndarray]) -> Asking:
    packed = stack(
        [packer.pack([q.text for q in one.questions], [q.answer for q in one.questions]) for one in lessons]
    )
    done = packer.tokenizer.convert_tokens_to_ids(DONE)
    most = max(len(one) for one in places)
    padded = [np.pad(one, ((0, most - len(one)), (0, 0))) for one in places]
    questions = [lesson.questions for lesson in lessons]
    looks = look_numbers(packed, done, questions)
    action = packer.tokenizer.convert_tokens_to_ids(ANSWER_START)
    return Asking(
        packed,
        looks,
        find_numbers(looks, packed, questions),
        torch.from_numpy(np.stack(padded)),
        row_weights(packed, action, questions, looks),
        *list_rows(packed, packer.tokenizer, done, action, questions),
    )


def row_weights(packed: Packed, action: int, questions: Sequence[Sequence[Asked]], looks: Tensor) -> Tensor:
    """Weight of each row's losses ``[B, T]``: of its question, more where an answer says what comes next, 0
    for padding.

    Args:
        packed: the questions.
        action: token with which the click begins.
        questions: the same.
        looks: see :func:`look_numbers`.
    """
    weights = torch.zeros(packed.ids.shape)
    for row, asked in enumerate(questions):
        for number, question in enumerate(asked):
            inside = packed.segments[row] == number
            weights[row, inside] = question.weight
            clicking = ((packed.ids[row] == action) & inside).cumsum(0).bool()
            weights[row, inside & ~clicking & (looks[row] == PLACES * number + 1)] *= NEXT_WEIGHT
    return weights


def _cells(lesson: Lesson, relative: bool) -> tuple[np.ndarray, np.ndarray]:
    """Facts ``[8, visual tokens]``; each question's places ``[3 * questions, visual tokens]``."""
    _, height, width = lesson.layout
    owners = [cell_owners([element.box for element in frame], height, width) for frame in lesson.shown]
    facts = [
        cell_facts(shown, owner, relative, compared=number > 0)
        for number, (shown, owner) in enumerate(zip(lesson.shown, owners, strict=True))
    ]
    numbers = [{element.box: number for number, element in enumerate(frame)} for frame in lesson.shown]
    places = np.zeros((PLACES * len(lesson.questions), len(owners), *owners[0].shape), bool)
    for index, question in enumerate(lesson.questions):
        parts = {**dict(enumerate(question.looks)), NAMED: question.named}
        for part, look in parts.items():
            for frame, box in look:
                if box in numbers[frame]:
                    places[PLACES * index + part, frame] |= owners[frame] == numbers[frame][box]
    return (
        np.concatenate([part.reshape(8, -1) for part in facts], 1),
        places.reshape(len(places), lesson.layout.visual_tokens),
    )


def look_numbers(packed: Packed, done: int, questions: Sequence[Sequence[Asked]]) -> Tensor:
    """Number of the place that each row should look at ``[B, T]``: of a question's first one, or of its
    second one once the answer has said what is done; −1 for rows that write no answer."""
    looks = torch.where(packed.targets == IGNORE, -1, PLACES * packed.segments)
    for row, asked in enumerate(questions):
        for number, question in enumerate(asked):
            if len(question.looks) == 2:
                inside = packed.segments[row] == number
                after = (packed.ids[row] == done) & inside
                later = after.cumsum(0).bool() & inside & (looks[row] >= 0)
                looks[row, later] += 1
    return looks


def find_numbers(looks: Tensor, packed: Packed, questions: Sequence[Sequence[Asked]]) -> Tensor:
    """Number of the place of what each row's question names ``[B, T]``: that of :func:`look_numbers` where it
    names what the answer is about."""
    finds = looks.clone()
    for row, asked in enumerate(questions):
        for number, question in enumerate(asked):
            if question.named:
                own = (packed.segments[row] == number) & (looks[row] >= 0)
                finds[row, own] = PLACES * number + NAMED
    return finds
