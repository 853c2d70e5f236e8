# SPDX-License-Identifier: Apache-2.0
"""The embedded model: its checkpoint and training, and that its engine clicks what is asked."""

import json
from pathlib import Path

import batches
import lessons
import model
import numpy as np
import packed
import pytest
import stage
import tokens
import torch
import train
from gui_tiny_cases import MODEL, forward_of, reference_model
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from starkv.export.build.ort import build_ort_engine
from starkv.export.cards import resolve_model
from starkv.export.export_model import export_model
from starkv.export.quantize.presets import load_preset
from starkv.runtime.actions.types import Click
from starkv.runtime.agent import Agent
from starkv.synthetic.suite import click_samples


@pytest.fixture(scope="module")
def reference() -> Qwen2_5_VLForConditionalGeneration:
    return reference_model()


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


@pytest.mark.parametrize("layout", [packed.Layout(1, 224, 224), packed.Layout(3, 224, 336)])
def test_packed_forward_equals_transformers(
    reference: Qwen2_5_VLForConditionalGeneration, layout: packed.Layout
) -> None:
    forward = forward_of(layout)
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


def test_rates_rise_stay_and_sink_to_zero() -> None:
    spec = stage.StageSpec("some", lambda *_: [], steps=1000, batches=1, decay=0.7)
    assert spec.rate(0) == 1 / stage.WARM_UP
    assert spec.rate(100) == spec.rate(300) == 1.0
    assert spec.rate(650) == pytest.approx(0.5)
    assert spec.rate(999) == pytest.approx(1 / 700)
    assert stage.StageSpec("some", lambda *_: [], steps=1000, batches=1, decay=0.0).rate(999) == 1.0


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
