# SPDX-License-Identifier: Apache-2.0
"""Scales of a whole decoder: the function stays, interrupted searches go on, and the graph is right."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyModel
from decoder_reference import DecoderReference
from decoder_runner import DecoderRunner
from tiny_model import tiny_card

from starkv.export.checkpoint import Checkpoint
from starkv.export.export_model import export_model
from starkv.export.models.config import ModelConfig
from starkv.export.progress import Progress
from starkv.export.quantize.awq import ScaledSource, search_scales, value_channels
from starkv.export.quantize.awq_plan import CLIP_RATIOS, LayerScales, ScalePlan
from starkv.export.quantize.calibration import CalibrationSequence
from starkv.export.quantize.presets import PRESETS
from starkv.export.quantize.torch_layer import (
    ATTENTION_WEIGHTS,
    MLP_WEIGHTS,
    Place,
    Rope,
    attention_block,
    mlp_block,
    read_weights,
)
from starkv.export.record import read_record
from starkv.manifest import TextShape

AWQ = PRESETS["int4-awq"]
FLOAT32 = Place(torch.device("cpu"), torch.float32)
LENGTHS = (13, 9)


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on every machine."""
    monkeypatch.setattr(Place, "best", classmethod(lambda cls: FLOAT32))


def config_of(tiny: TinyModel, checkpoint: Checkpoint) -> ModelConfig:
    return checkpoint.family.parse_config(checkpoint.config, tiny.checkpoint / "config.json")


def positions(length: int) -> np.ndarray:
    return np.stack([np.arange(length), np.arange(length) // 3, np.arange(length) % 5])[:, None]


def sequences(tiny: TinyModel, seed: int = 0) -> list[CalibrationSequence]:
    random, reference = np.random.default_rng(seed), DecoderReference(tiny.model)
    found = []
    for length in LENGTHS:
        cos, sin = reference.rope(positions(length))
        embeds = random.standard_normal((length, 256)).astype(np.float32)
        embeds[:, :3] *= 20
        found.append(CalibrationSequence(embeds, cos[0], sin[0]))
    return found


def random_plan(text: TextShape, clips: bool = False) -> ScalePlan:
    """Scales far from 1."""
    random, plan = np.random.default_rng(5), ScalePlan()

    def factors(count: int) -> np.ndarray:
        return np.exp(random.standard_normal(count)).astype(np.float32)

    for _ in range(text.layers):
        values = factors(text.kv_heads * text.head_dim)
        inputs = {
            "attention": factors(text.hidden),
            "output": values[value_channels(text)],
            "mlp": factors(text.hidden),
            "down": factors(text.intermediate),
        }
        chosen = np.full((text.intermediate, text.hidden // 128), 3, np.uint8)
        plan.layers.append(LayerScales(inputs, values, {"mlp.up_proj.weight": chosen} if clips else {}, {}))
    return plan


def test_a_layer_is_that_of_transformers(tiny: TinyModel) -> None:
    prompt = sequences(tiny)[0]
    with torch.no_grad(), Checkpoint(tiny.checkpoint) as checkpoint:
        config, rope = config_of(tiny, checkpoint), Rope.of(prompt.rope_cos, prompt.rope_sin, FLOAT32.device)
        expected = tiny.model.model.language_model(
            inputs_embeds=torch.from_numpy(prompt.embeds)[None],
            position_ids=torch.from_numpy(positions(LENGTHS[0])),
            output_hidden_states=True,
        ).hidden_states
        x, seen = torch.from_numpy(prompt.embeds), (lambda rows: None, lambda rows: None)
        layer = "model.language_model.layers.0"
        weights = read_weights(checkpoint, layer, ATTENTION_WEIGHTS, FLOAT32)
        x = attention_block(x, weights, config.text.head_dim, config.norm_epsilon, rope, seen)
        weights = read_weights(checkpoint, layer, MLP_WEIGHTS, FLOAT32)
        x = mlp_block(x, weights, config.norm_epsilon, seen)
    np.testing.assert_allclose(x.numpy(), expected[1][0].numpy(), atol=1e-4, rtol=1e-4)


def test_scaling_leaves_the_models_function(tiny: TinyModel) -> None:
    model = copy.deepcopy(tiny.model)
    with Checkpoint(tiny.checkpoint) as checkpoint:
        source = ScaledSource(checkpoint, random_plan(config_of(tiny, checkpoint).text))
        changed = 0
        for name, weight in model.named_parameters():
            if name.startswith("model.language_model.layers."):
                scaled = torch.from_numpy(source.rows(name, 0, len(weight)).copy())
                changed += not torch.equal(scaled, weight)
                weight.data = scaled
    # Per layer: q, k, v, o, gate, up, down, two norms, and the bias of v.
    assert changed == 10 * len(model.model.language_model.layers)
    embeds = sequences(tiny)[0].embeds[None]
    expected, actual = (
        DecoderReference(one).step(embeds, positions(LENGTHS[0]), 8) for one in (tiny.model, model)
    )
    np.testing.assert_allclose(actual.logits, expected.logits, atol=1e-5 * np.abs(expected.logits).max())
    assert np.abs(actual.hidden_norm - expected.hidden_norm).max() > 1


def test_rows_are_scaled_as_the_whole_is(tiny: TinyModel) -> None:
    """Also where blocks are clipped; the exporter reads a few rows at a time."""
    with Checkpoint(tiny.checkpoint) as checkpoint:
        source = ScaledSource(checkpoint, random_plan(config_of(tiny, checkpoint).text, clips=True))
        for name in ("self_attn.v_proj.weight", "self_attn.v_proj.bias", "mlp.up_proj.weight"):
            full = f"model.language_model.layers.1.{name}"
            whole = source.rows(full, 0, source.shape(full)[0])
            np.testing.assert_array_equal(source.rows(full, 17, 40), whole[17:40])
        up = "model.language_model.layers.1.mlp.up_proj.weight"
        unclipped = ScaledSource(checkpoint, random_plan(config_of(tiny, checkpoint).text))
        largest, clipped = (np.abs(one.rows(up, 0, 8)).max() for one in (unclipped, source))
        assert clipped == pytest.approx(largest * CLIP_RATIOS[3], rel=1e-6)


def test_the_graph_puts_out_what_an_unscaled_one_does(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, queries and the length of the norms' outputs, which STaR-KV scores by."""

    class NoPrompts:
        digest = "none"

        def sequences(self, directory: Path, progress: Progress) -> list[CalibrationSequence]:
            assert {"vision.onnx", "embedding.safetensors", "tokenizer.json"} <= {
                path.name for path in directory.iterdir()
            }
            return []

    monkeypatch.setattr(
        "starkv.export.quantize.awq.search_scales",
        lambda source, config, *rest: random_plan(config.text),
    )
    preset = replace(PRESETS["fp32"], calibrated=True)
    export_model(tiny.checkpoint, tiny_card(), tmp_path / "out", preset, calibration=NoPrompts())
    results = []
    for export in (tiny.exports["fp32"], tmp_path / "out"):
        runner = DecoderRunner(export / "decoder.onnx", read_record(export).text)
        reference = DecoderReference(tiny.model)
        embeds = sequences(tiny)[0].embeds[None]
        results.append(runner.step(embeds, *reference.rope(positions(LENGTHS[0]))))
    for field in ("logits", "q_window", "hidden_norm"):
        expected, actual = (getattr(result, field) for result in results)
        assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max(), field


class KilledError(Exception):
    """Stands for a process that was killed."""


class CountingSource:
    """Counts the weights that are read whole, and may stop in a layer."""

    def __init__(self, source: Checkpoint, stop_at: str | None = None) -> None:
        self.source, self.stop_at, self.whole = source, stop_at, set[str]()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if stop - start > 1 and len(self.shape(name)) > 1:
            if self.stop_at and self.stop_at in name:
                raise KilledError
            self.whole.add(name)
        return self.source.rows(name, start, stop)


def same(one: ScalePlan, other: ScalePlan) -> bool:
    return len(one.layers) == len(other.layers) and all(
        np.array_equal(a.values, b.values)
        and a.results == b.results
        and all(np.array_equal(a.inputs[group], b.inputs[group]) for group in a.inputs)
        and a.clips.keys() == b.clips.keys()
        and all(np.array_equal(a.clips[name], b.clips[name]) for name in a.clips)
        for a, b in zip(one.layers, other.layers, strict=True)
    )


def test_an_interrupted_search_goes_on(tiny: TinyModel, tmp_path: Path) -> None:
    prompts = sequences(tiny)
    with Checkpoint(tiny.checkpoint) as checkpoint:
        config = config_of(tiny, checkpoint)
        whole = search_scales(checkpoint, config, prompts, AWQ)
        with pytest.raises(KilledError):
            search_scales(
                CountingSource(checkpoint, "layers.1.mlp"), config, prompts, AWQ, folder=tmp_path / "plan"
            )
        source = CountingSource(checkpoint)
        resumed = search_scales(source, config, prompts, AWQ, folder=tmp_path / "plan")
        assert same(whole, resumed)
        assert not any(".layers.0." in name for name in source.whole)
        # All is done: nothing is read again.
        source = CountingSource(checkpoint)
        assert same(whole, search_scales(source, config, prompts, AWQ, folder=tmp_path / "plan"))
        assert not source.whole


def test_other_prompts_or_a_damaged_plan_start_over(tiny: TinyModel, tmp_path: Path) -> None:
    with Checkpoint(tiny.checkpoint) as checkpoint:
        config = config_of(tiny, checkpoint)
        first = search_scales(checkpoint, config, sequences(tiny), AWQ, folder=tmp_path)
        source = CountingSource(checkpoint)
        other = search_scales(source, config, sequences(tiny, seed=1), AWQ, folder=tmp_path)
        assert any(".layers.0." in name for name in source.whole)
        assert not same(first, other)
        (tmp_path / "awq" / "layer-000.safetensors").write_bytes(b"\0" * 20)
        again = search_scales(checkpoint, config, sequences(tiny, seed=1), AWQ, folder=tmp_path)
        assert same(other, again)


def test_the_plan_keeps_one_set_of_hidden_states(tiny: TinyModel, tmp_path: Path) -> None:
    with Checkpoint(tiny.checkpoint) as checkpoint:
        search_scales(checkpoint, config_of(tiny, checkpoint), sequences(tiny), AWQ, folder=tmp_path)
    assert sorted(path.name for path in (tmp_path / "awq").iterdir()) == [
        "hidden-002.safetensors",
        "layer-000.safetensors",
        "layer-001.safetensors",
        "plan.json",
    ]


def test_the_searched_model_is_closer_to_the_exact_one(tiny: TinyModel) -> None:
    """Logits of the fake-quantized decoder on new prompts: calibrated against rounded as it is."""
    from starkv.export.quantize.blockwise import dequantize_blockwise, quantize_rows

    def quantized(source: Checkpoint | ScaledSource) -> DecoderReference:
        model = copy.deepcopy(tiny.model)
        for name, weight in model.named_parameters():
            if name.startswith("model.language_model.layers."):
                rows = np.ascontiguousarray(source.rows(name, 0, len(weight)))
                if rows.ndim == 2:
                    codes, scales = quantize_rows(rows, 4, 128)
                    rows = dequantize_blockwise(codes.T, scales.T).T
                weight.data = torch.from_numpy(rows.copy())
        return DecoderReference(model)

    errors = {"plain": 0.0, "awq": 0.0}
    with Checkpoint(tiny.checkpoint) as checkpoint:
        plan = search_scales(checkpoint, config_of(tiny, checkpoint), sequences(tiny), AWQ)
        for name, source in (("plain", checkpoint), ("awq", ScaledSource(checkpoint, plan))):
            for prompt in sequences(tiny, seed=9) + sequences(tiny, seed=10):
                where = positions(len(prompt.embeds))
                expected = DecoderReference(tiny.model).step(prompt.embeds[None], where, 8).logits
                actual = quantized(source).step(prompt.embeds[None], where, 8).logits
                errors[name] += float(((actual - expected) ** 2).sum())
    assert errors["awq"] < errors["plain"]
