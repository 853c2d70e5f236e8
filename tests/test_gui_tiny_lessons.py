# SPDX-License-Identifier: Apache-2.0
"""What gui-tiny is taught: its screens, questions and targets, and where heads are told to look."""

import batches
import lessons
import numpy as np
import packed
import screens
import splits
import targets
import tokens
import torch
from gui_tiny_cases import asking_of, forward_of


def test_targets_of_packed_questions_are_the_answers() -> None:
    layout = packed.Layout(1, 224, 224)
    forward = forward_of(layout)
    lesson = lessons.scene_lesson(np.random.default_rng(0), layout)
    one = forward.pack([q.text for q in lesson.questions], [q.answer for q in lesson.questions])
    for number, question in enumerate(lesson.questions):
        wanted = one.targets[one.segments == number].tolist()
        text = forward.tokenizer.decode([token for token in wanted if token != packed.IGNORE])
        assert text == question.answer + "<|im_end|>"


def test_the_guided_head_looks_where_the_answer_is_found() -> None:
    layout = packed.Layout(2, 224, 224)
    forward = forward_of(layout)
    seen = set()
    for seed in range(6):
        lesson = lessons.view_lesson(np.random.default_rng(seed), layout)
        asking = asking_of([lesson], forward)
        one = asking.packed
        looks, evidence = asking.looks[0], asking.evidence[0]
        assert ((looks >= 0) == (one.targets[0] != packed.IGNORE)).all()
        for number, question in enumerate(lesson.questions):
            seen.add(question.task)
            inside = looks[(one.segments[0] == number) & (looks >= 0)]
            parts = [3 * number] if question.task != "instruction" else [3 * number, 3 * number + 1]
            assert inside.unique().tolist() == parts
            # The last digits are written while the head looks at the target.
            cells = evidence[inside[-1]].reshape(2, 8, 8).nonzero()
            x0, y0, x1, y1 = question.box
            assert all(y0 - 28 < 28 * y < y1 and x0 - 28 < 28 * x < x1 for _, y, x in cells.tolist())
            if question.task == "instruction":
                assert {frame for frame, _, _ in cells.tolist()} <= {1}
                before = evidence[3 * number].reshape(2, 8, 8).nonzero()
                assert {frame for frame, _, _ in before.tolist()} <= {0}
    assert seen == {"current", "earlier", "changed", "instruction"}


def test_another_head_looks_at_what_a_relation_names() -> None:
    layout = packed.Layout(1, 448, 448)
    lesson = lessons.scene_lesson(np.random.default_rng(0), layout)
    asking = asking_of([lesson], forward_of(layout))
    relations = 0
    for number, question in enumerate(lesson.questions):
        own = (asking.packed.segments[0] == number) & (asking.looks[0] >= 0)
        looked, found = (asking.evidence[0, numbers[0, own][0]] for numbers in (asking.looks, asking.finds))
        if question.task != "relation":
            assert (looked == found).all()
            continue
        relations += 1
        x0, y0, x1, y1 = question.named[0].box
        cells = found.reshape(16, 16).nonzero().tolist()
        assert cells
        assert all(y0 - 28 < 28 * y < y1 and x0 - 28 < 28 * x < x1 for y, x in cells)
        assert not (looked & found).any()
    assert relations > 3


def test_seldom_tasks_weigh_more_and_padding_nothing() -> None:
    layout = packed.Layout(2, 224, 224)
    some = [lessons.view_lesson(np.random.default_rng(seed), layout) for seed in range(6)]
    asking = asking_of(some, forward_of(layout))
    seen = set()
    for row, lesson in enumerate(some):
        for number, question in enumerate(lesson.questions):
            own = asking.packed.segments[row] == number
            seen.add(question.task)
            if question.task == "instruction":
                continue
            expected = {"changed": 6.0, "earlier": 3.0}.get(question.task, 1.0)
            assert asking.weights[row, own].unique().tolist() == [expected]
        assert not asking.weights[row, asking.packed.segments[row] < 0].any()
    assert seen == {"current", "earlier", "changed", "instruction"}


def test_the_next_step_of_an_instruction_weighs_more() -> None:
    layout = packed.Layout(2, 224, 224)
    lesson = lessons.view_lesson(np.random.default_rng(0), layout)
    forward = forward_of(layout)
    asking = asking_of([lesson], forward)
    asked = [number for number, q in enumerate(lesson.questions) if q.task == "instruction"]
    assert asked
    for number in asked:
        heavier = (asking.packed.segments[0] == number) & (asking.weights[0] == lessons.NEXT_WEIGHT)
        written = forward.tokenizer.decode(asking.packed.targets[0, heavier])
        thought = lesson.questions[number].answer
        assert thought[thought.index("next ") + len("next ") :].startswith(written)
        assert written.endswith("\n" + tokens.ANSWER_START)


def test_lists_are_read_item_after_item() -> None:
    layout = packed.Layout(2, 224, 224)
    lesson = lessons.view_lesson(np.random.default_rng(1), layout)
    forward = forward_of(layout)
    asking = asking_of([lesson], forward)
    one = asking.packed

    def written(rows: torch.Tensor) -> str:
        return forward.tokenizer.decode(one.ids[0, rows]).strip()

    checked = 0
    for number, question in enumerate(lesson.questions):
        own = one.segments[0] == number
        follows, copies = (table[0] & own[:, None] for table in (asking.follows, asking.copies))
        if question.task != "instruction":
            assert not follows.any()
            assert not copies.any()
            continue
        items = [item.strip() for item in question.text.removeprefix("Do:").rstrip(".").split(",")]
        looked = [
            (written(own & (follows == row).all(-1)), written(row))
            for row in follows.unique(dim=0)
            if row.any()
        ]
        assert sorted(looked) == sorted(zip(items[1:], items[:-1], strict=True))
        (copied,) = [row for row in copies.unique(dim=0) if row.any()]
        following = question.answer.partition("next ")[2].partition(".")[0]
        assert written(copied) == following
        writing = copies.any(-1)
        assert forward.tokenizer.decode(one.targets[0, writing]) == following
        checked += 1
    assert checked > 2


def test_visual_tokens_look_at_the_same_place_of_the_frame_before() -> None:
    """As training asks of one head: the shipped weights do it, so the right places are asked about."""
    layout = packed.Layout(3, 448, 448)
    forward = forward_of(layout)
    batch = batches.collate(
        [lessons.view_lesson(np.random.default_rng(0), layout)], lambda _: forward, relative=False
    )
    assert batch.asking is not None
    with torch.no_grad():
        visual = forward.vision(batch.patches).reshape(1, layout.visual_tokens, -1)
        logs = forward.hidden(visual, batch.asking.packed).looking_back_log
    assert logs.shape == (1, 2 * 256)
    assert logs.exp().median() > 0.5


def test_most_views_show_something_new() -> None:
    layout = packed.Layout(2, 224, 224)
    views = [lessons.view_lesson(np.random.default_rng(seed), layout) for seed in range(60)]
    asked = np.mean([any(q.task == "changed" for q in view.questions) for view in views])
    # Four in ten steps bring something new; most views are drawn up to three times for its sake.
    assert 0.55 < asked < 0.9


def test_lessons_of_splits_differ_and_repeat() -> None:
    for index in range(12):
        layouts = (lessons.FIRST_LAYOUTS, lessons.LAST_LAYOUTS)[index % 2]
        first, again = (lessons.mixed_lessons("train", 0, index, layouts) for _ in range(2))
        other = lessons.mixed_lessons("validation", 0, index, layouts)
        assert len(first) == len(again)
        for one, two in zip(first, again, strict=True):
            assert one.questions == two.questions
            np.testing.assert_array_equal(one.frames, two.frames)
        same_layout = first[0].layout == other[0].layout
        assert not same_layout or not np.array_equal(first[0].frames, other[0].frames)


def test_screens_are_repeatable_and_questions_unambiguous() -> None:
    for index in range(50):
        screen, random = splits.draw_screen("test", index, 224, 6, 12)
        again, _ = splits.draw_screen("test", index, 224, 6, 12)
        other, _ = splits.draw_screen("validation", index, 224, 6, 12)
        questions = screens.random_questions(random, screen, 12)
        np.testing.assert_array_equal(screen.image, again.image)
        assert not np.array_equal(screen.image, other.image)
        names = [element.phrase for element in screen.elements]
        assert len(set(names)) == len(names)
        for question in questions:
            x0, y0, x1, y1 = question.element.box
            assert 0 <= x0 < x1 <= 224
            assert 0 <= y0 < y1 <= 224
            assert question.element.contains(*question.element.center)
            assert question.answer.endswith("({},{})')".format(*question.element.center))


def test_colour_alone_does_not_decide_on_half_of_the_screens() -> None:
    shared = []
    for index in range(300):
        rng = np.random.default_rng(index)
        icons = [element for element in screens.random_elements(rng, 10) if element.kind == "icon"]
        if len(icons) >= 2:
            by_color = [element.color for element in icons]
            shared.append(len(set(by_color)) < len(by_color))
            assert len({(element.color, element.shape) for element in icons}) == len(icons)
    assert 0.4 < np.mean(shared) < 0.6


def test_cell_facts_name_the_owner_of_each_cell() -> None:
    shown = [targets.Shown((60, 90, 86, 116), 2, 3, -1, new=True), targets.Shown((0, 0, 28, 28), -1, -1, 7)]
    owners = targets.cell_owners([element.box for element in shown], 224, 336)
    assert owners.shape == (8, 12)
    facts = targets.cell_facts(shown, owners, relative=False, compared=True)
    assert facts[:, 103 // 28, 73 // 28].tolist() == [1, 2, 3, targets.IGNORE, 73 // 4, 103 // 4, 1, 0]
    assert facts[:, 0, 0].tolist() == [2, targets.IGNORE, targets.IGNORE, 7, 14 // 4, 14 // 4, 0, 0]
    assert facts[:, 0, 7].tolist() == [0] + [targets.IGNORE] * 5 + [0, 0]
    alone = targets.cell_facts(shown, owners, relative=True, compared=False)
    assert (alone[6] == targets.IGNORE).all()
    assert alone[4:6, 0, 0].tolist() == [10, 10]
