# SPDX-License-Identifier: Apache-2.0
"""The embedded model: its checkpoint, screens and training, and that its engine clicks what is asked."""

import json
from pathlib import Path

import numpy as np
import packed
import pytest
import screens
import splits
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

MODEL = Path(__file__).parent.parent / "models" / "gui-tiny"


@pytest.fixture(scope="module")
def reference() -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def forward(reference: Qwen2_5_VLForConditionalGeneration) -> packed.PackedForward:
    return packed.PackedForward(reference, tokens.build_tokenizer(), size=224, questions=4)


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
    assert config.rope_parameters["mrope_section"] == [8, 12, 12]
    with (MODEL / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"BF16"}


def test_shipped_tokenizer_is_the_one_that_the_code_trains() -> None:
    rebuilt = tokens.build_tokenizer()
    shipped = json.loads((MODEL / "tokenizer.json").read_text())
    assert json.loads(rebuilt.backend_tokenizer.to_str())["model"] == shipped["model"]
    assert (MODEL / "chat_template.jinja").read_text() == rebuilt.chat_template


def test_packed_forward_equals_transformers(
    reference: Qwen2_5_VLForConditionalGeneration, forward: packed.PackedForward
) -> None:
    screen, questions = splits.held_out("validation", 0, 224, forward.questions)
    ids, _, _ = forward.pack(questions)
    processor = Qwen2VLImageProcessorPil.from_pretrained(MODEL)
    pixels = processor(images=[Image.fromarray(screen.image)], return_tensors="pt")
    with torch.no_grad():
        visual = forward.vision(forward.normalise(packed.patchify(screen.image[None])))
        hidden, _, _ = forward.hidden(visual, torch.tensor([ids]))
        logits = forward.logits(hidden)[0].view(forward.questions, forward.segment, -1)
        for index in range(forward.questions):
            segment = torch.tensor(ids[index * forward.segment : (index + 1) * forward.segment])
            alone = torch.cat([forward.prefix, segment])[None]
            expected = reference(
                input_ids=alone,
                pixel_values=pixels["pixel_values"].float(),
                image_grid_thw=pixels["image_grid_thw"],
                mm_token_type_ids=(alone == reference.config.image_token_id).int(),
            ).logits[0, len(forward.prefix) :]
            torch.testing.assert_close(
                logits[index], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
            )


def test_targets_of_packed_questions_are_the_answers(forward: packed.PackedForward) -> None:
    _, questions = splits.held_out("validation", 1, 224, forward.questions)
    _, wanted, _ = forward.pack(questions)
    for index, question in enumerate(questions):
        segment = wanted[index * forward.segment : (index + 1) * forward.segment]
        text = forward.tokenizer.decode([token for token in segment if token != -100])
        assert text == question.answer + "<|im_end|>"


def test_screens_are_repeatable_and_questions_unambiguous() -> None:
    for index in range(50):
        screen, questions = splits.held_out("test", index, 224, 12)
        again, _ = splits.held_out("test", index, 224, 12)
        other, _ = splits.held_out("validation", index, 224, 12)
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


def test_cell_targets_name_the_owner_of_each_cell() -> None:
    screen = screens.empty_screen(np.random.default_rng(0), 224, 224)
    icon = screens.Element("icon", color=2, shape=3, icon_size=20)
    placed = screens._draw(screen, icon, 60, 90)
    facts = targets.cell_targets(screen).reshape(6, 8, 8)
    column, row = placed.center[0] // 28, placed.center[1] // 28
    assert facts[:, row, column].tolist() == [1, 2, 3, targets.IGNORE, *placed.center]
    assert facts[:, 0, 7].tolist() == [0] + [targets.IGNORE] * 5


def test_interrupted_training_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [
        "--vision-steps",
        "1",
        "--language-steps",
        "4",
        "--batch",
        "2",
        "--accumulate",
        "1",
        "--questions",
        "2",
    ]
    small += ["--save-every", "2", "--workers", "0", "--no-compile", "--device", "cpu"]
    monkeypatch.setattr(train, "evaluate", lambda *_: {})

    def weights(out: str, work: str, *more: str) -> dict[str, torch.Tensor]:
        train.main([*small, "--out", str(tmp_path / out), "--work", str(tmp_path / work), *more])
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / out).state_dict()

    expected = weights("straight", "a")
    save = train.Stage.save

    def save_and_break(stage: train.Stage, step: int) -> None:
        save(stage, step)
        if stage.name == "language":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Stage, "save", save_and_break)
        with pytest.raises(KeyboardInterrupt):
            weights("broken", "b")
    resumed = weights("resumed", "b", "--resume")
    assert not (tmp_path / "broken").exists()
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def test_engine_clicks_what_is_asked_for(agent: Agent) -> None:
    hits = []
    for index in range(12):
        screen, questions = splits.held_out("test", 1000 + index, 224, 12)
        icons = [q for q in questions[: len(screen.elements)] if q.element.kind == "icon"]
        for question in icons:
            (action,) = agent.act(Image.fromarray(screen.image), question.text).actions
            hits.append(
                isinstance(action, Click) and question.element.contains(action.point.x, action.point.y)
            )
    assert len(hits) >= 30
    assert np.mean(hits) >= 0.75
