# SPDX-License-Identifier: Apache-2.0
"""The embedded model: its checkpoint, screens and training, and that its engine clicks what is asked."""

import json
from pathlib import Path

import batches
import lessons
import model
import numpy as np
import packed
import pytest
import screens
import splits
import stage
import targets
import tokens
import torch
import train
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from starkv.export.build.ort import build_ort_engine
from starkv.export.cards import resolve_model
from starkv.export.export_model import export_model
from starkv.export.quantize.presets import load_preset
from starkv.runtime.actions.types import Click
from starkv.runtime.agent import Agent
from starkv.synthetic.suite import click_samples

MODEL = Path(__file__).parent.parent / "models" / "gui-tiny"


@pytest.fixture(scope="module")
def reference() -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def agent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Agent:
    directory = tmp_path_factory.mktemp(f"gui-tiny-{request.param}")
    resolved = resolve_model("gui-tiny")
    export_model(resolved.folder, resolved.card, directory / "export", load_preset(request.param))
    build_ort_engine(directory / "export", directory / "engine")
    return Agent.load(directory / "engine")


def test_checkpoint_suits_every_backend(reference: Qwen2_5_VLForConditionalGeneration) -> None:
    config = reference.config.text_config
    assert (MODEL / "model.safetensors").stat().st_size <= 16 * 2**20
    assert config.hidden_size // config.num_attention_heads == 64
    assert config.num_key_value_heads >= 2
    assert config.num_attention_heads // config.num_key_value_heads >= 2
    assert config.hidden_size % 128 == config.intermediate_size % 128 == 0
    assert config.rope_parameters["mrope_section"] == [4, 10, 18]
    with (MODEL / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"BF16"}


def test_shipped_tokenizer_is_the_one_that_the_code_trains() -> None:
    rebuilt = tokens.build_tokenizer()
    shipped = json.loads((MODEL / "tokenizer.json").read_text())
    assert json.loads(rebuilt.backend_tokenizer.to_str())["model"] == shipped["model"]
    assert (MODEL / "chat_template.jinja").read_text() == rebuilt.chat_template


def forward_of(model: Qwen2_5_VLForConditionalGeneration, layout: packed.Layout) -> packed.PackedForward:
    return packed.PackedForward(model, tokens.build_tokenizer(), layout)


@pytest.mark.parametrize("layout", [packed.Layout(1, 224, 224), packed.Layout(3, 224, 336)])
def test_packed_forward_equals_transformers(
    reference: Qwen2_5_VLForConditionalGeneration, layout: packed.Layout
) -> None:
    forward = forward_of(reference, layout)
    make = lessons.scene_lesson if layout.frames == 1 else lessons.view_lesson
    some = [make(np.random.default_rng(seed), layout) for seed in (1, 2)]
    batch = batches.collate(some, lambda _: forward, relative=False)
    assert batch.asking is not None
    together = batch.asking.packed
    with torch.no_grad():
        visual = forward.vision(batch.patches).reshape(2, layout.visual_tokens, -1)
        logits = forward.logits(forward.hidden(visual, together).packed)
    processor = Qwen2VLImageProcessorPil.from_pretrained(MODEL, min_pixels=1, max_pixels=10**7)
    for row, lesson in enumerate(some):
        images = [Image.fromarray(frame) for frame in lesson.frames]
        pixels = processor(images=images, return_tensors="pt")
        for number in (0, len(lesson.questions) - 1):
            inside = together.segments[row] == number
            alone = torch.cat([forward.prefix, together.ids[row, inside]])[None]
            with torch.no_grad():
                expected = reference(
                    input_ids=alone,
                    pixel_values=pixels["pixel_values"].float(),
                    image_grid_thw=pixels["image_grid_thw"],
                    mm_token_type_ids=(alone == reference.config.image_token_id).int(),
                ).logits[0, len(forward.prefix) :]
            torch.testing.assert_close(
                logits[row, inside], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
            )


def test_a_grown_model_computes_the_same(reference: Qwen2_5_VLForConditionalGeneration) -> None:
    tokenizer = tokens.build_tokenizer()
    small = model.build_model(tokenizer, 0, model.FIRST_LAYERS)
    grown = model.grow(small, tokenizer, 1)
    assert grown.config.text_config.num_hidden_layers == model.LAYERS > model.FIRST_LAYERS
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(grown(input_ids=ids).logits, small(input_ids=ids).logits)


def test_targets_of_packed_questions_are_the_answers(reference: Qwen2_5_VLForConditionalGeneration) -> None:
    layout = packed.Layout(1, 224, 224)
    forward = forward_of(reference, layout)
    lesson = lessons.scene_lesson(np.random.default_rng(0), layout)
    one = forward.pack([q.text for q in lesson.questions], [q.answer for q in lesson.questions])
    for number, question in enumerate(lesson.questions):
        wanted = one.targets[one.segments == number].tolist()
        text = forward.tokenizer.decode([token for token in wanted if token != packed.IGNORE])
        assert text == question.answer + "<|im_end|>"


def test_the_guided_head_looks_where_the_answer_is_found(
    reference: Qwen2_5_VLForConditionalGeneration,
) -> None:
    layout = packed.Layout(2, 224, 224)
    forward = forward_of(reference, layout)
    seen = set()
    for seed in range(6):
        lesson = lessons.view_lesson(np.random.default_rng(seed), layout)
        batch = batches.collate([lesson], lambda _: forward, relative=False)
        assert batch.asking is not None
        one = batch.asking.packed
        looks, evidence = batch.asking.looks[0], batch.asking.evidence[0]
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


def test_another_head_looks_at_what_a_relation_names(reference: Qwen2_5_VLForConditionalGeneration) -> None:
    layout = packed.Layout(1, 448, 448)
    lesson = lessons.scene_lesson(np.random.default_rng(0), layout)
    asking = batches.collate([lesson], lambda _: forward_of(reference, layout), relative=False).asking
    assert asking is not None
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


def test_seldom_tasks_weigh_more_and_padding_nothing(reference: Qwen2_5_VLForConditionalGeneration) -> None:
    layout = packed.Layout(2, 224, 224)
    some = [lessons.view_lesson(np.random.default_rng(seed), layout) for seed in range(6)]
    asking = batches.collate(some, lambda _: forward_of(reference, layout), relative=False).asking
    assert asking is not None
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


def test_the_next_step_of_an_instruction_weighs_more(reference: Qwen2_5_VLForConditionalGeneration) -> None:
    layout = packed.Layout(2, 224, 224)
    lesson = lessons.view_lesson(np.random.default_rng(0), layout)
    forward = forward_of(reference, layout)
    asking = batches.collate([lesson], lambda _: forward, relative=False).asking
    assert asking is not None
    asked = [number for number, q in enumerate(lesson.questions) if q.task == "instruction"]
    assert asked
    for number in asked:
        heavier = (asking.packed.segments[0] == number) & (asking.weights[0] == lessons.NEXT_WEIGHT)
        written = forward.tokenizer.decode(asking.packed.targets[0, heavier])
        thought = lesson.questions[number].answer
        assert thought[thought.index("next ") + len("next ") :].startswith(written)
        assert written.endswith("\n" + tokens.ANSWER_START)


def test_lists_are_read_item_after_item(reference: Qwen2_5_VLForConditionalGeneration) -> None:
    layout = packed.Layout(2, 224, 224)
    lesson = lessons.view_lesson(np.random.default_rng(1), layout)
    forward = forward_of(reference, layout)
    asking = batches.collate([lesson], lambda _: forward, relative=False).asking
    assert asking is not None
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


def test_visual_tokens_look_at_the_same_place_of_the_frame_before(
    reference: Qwen2_5_VLForConditionalGeneration,
) -> None:
    """As training asks of one head: the shipped weights do it, so the right places are asked about."""
    layout = packed.Layout(3, 448, 448)
    forward = forward_of(reference, layout)
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


def test_rates_rise_stay_and_sink_to_zero() -> None:
    spec = stage.StageSpec("some", lambda *_: [], steps=1000, batches=1, decay=0.7)
    assert spec.rate(0) == 1 / stage.WARM_UP
    assert spec.rate(100) == spec.rate(300) == 1.0
    assert spec.rate(650) == pytest.approx(0.5)
    assert spec.rate(999) == pytest.approx(1 / 700)
    assert stage.StageSpec("some", lambda *_: [], steps=1000, batches=1, decay=0.0).rate(999) == 1.0


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


def test_interrupted_training_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--stages", "vision", "language", "--vision-steps", "1", "--language-steps", "2"]
    small += ["--save-every", "1", "--workers", "0", "--device", "cpu"]
    monkeypatch.setattr(stage, "evaluate", lambda *_: {})

    def weights(out: str, work: str, *more: str) -> dict[str, torch.Tensor]:
        train.main([*small, "--out", str(tmp_path / out), "--work", str(tmp_path / work), *more])
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / out).state_dict()

    expected = weights("straight", "a")
    save = stage.Stage.save

    def save_and_break(one: stage.Stage, step: int) -> None:
        save(one, step)
        if one.spec.name == "language":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage.Stage, "save", save_and_break)
        with pytest.raises(KeyboardInterrupt):
            weights("broken", "b")
    resumed = weights("resumed", "b", "--resume")
    assert not (tmp_path / "broken").exists()
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def test_training_goes_on_with_the_heads_it_had(tmp_path: Path) -> None:
    args = train.parse_arguments(["--out", str(tmp_path)])
    tokenizer = tokens.build_tokenizer()
    spec = train.stages(args)[-1]
    first, second = (
        stage.Stage(spec, model.build_model(tokenizer, seed, 4), tokenizer, tmp_path, 0, 1) for seed in (0, 1)
    )
    weights = first.heads.shown.linear.weight
    assert not torch.equal(weights, second.heads.shown.linear.weight)
    second.take_heads(tmp_path)
    assert not torch.equal(weights, second.heads.shown.linear.weight)
    first.save_heads(tmp_path)
    second.take_heads(tmp_path)
    assert torch.equal(weights, second.heads.shown.linear.weight)


def test_engine_clicks_what_is_asked_for(agent: Agent) -> None:
    hits = []
    for sample in click_samples("test", 1, 90):
        if sample.task == "relation":
            continue
        actions = agent.act(Image.fromarray(sample.frames[0]), sample.question).actions
        first = actions[0] if actions else None
        hits.append(isinstance(first, Click) and sample.hit(first.point.x, first.point.y))
    assert len(hits) >= 55
    assert np.mean(hits) >= 0.75
