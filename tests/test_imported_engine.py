# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint all the way into an engine: the same integers, and the logits of transformers."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from decoder_reference import DecoderReference
from decoder_runner import DecoderRunner, StepResult
from imported_files import (
    RandomLayer,
    Tensors,
    awq_config,
    awq_gemm,
    compressed,
    compressed_config,
    gptq,
    gptq_config,
    random_layer,
)
from safetensors.numpy import load_file, save_file
from tiny_model import HIDDEN, make_tiny_model, tiny_card
from transformers import Qwen2_5_VLForConditionalGeneration

from starkv.errors import UsageError
from starkv.export.build.ort import build_ort_engine
from starkv.export.export_model import export_model
from starkv.export.quantize.presets import PRESETS, Preset
from starkv.export.record import ExportRecord, Route

UNTOUCHED = Preset("untouched", decoder="fp32", head="fp32", keep_packed=True)
"""Quantizes nothing itself, so that every difference comes from the import."""

TOLERANCE = 1e-4
INTEGER_TOLERANCE = 0.03
"""ONNX Runtime's kernels round activations to 8 bits."""

FLOAT_PRODUCTS = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Makes ONNX Runtime multiply in float32."""

MEMBERS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv_proj.0": ("q_proj", "k_proj"),
    "qkv_proj.1": ("v_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Layers of each fused weight of the graph."""


@dataclass(frozen=True)
class Case:
    config: dict[str, object]
    write: Callable[[RandomLayer], Tensors]
    group_size: int
    bits: int = 4
    symmetric: bool = False
    shuffled: bool = False

    def layer(self, name: str, linear: torch.nn.Linear, seed: int) -> RandomLayer:
        inputs, outputs = linear.in_features, linear.out_features
        groups = 1 if self.group_size == -1 else inputs // self.group_size
        layer = random_layer(inputs, outputs, groups, bits=self.bits, symmetric=self.symmetric, seed=seed)
        scales = np.random.default_rng(seed).uniform(0.1, 0.3, layer.s.shape) / 2**self.bits
        group_of = layer.group_of.copy()
        # Layers of one input have one order, except that v_proj here has none.
        if self.shuffled and not name.endswith("v_proj"):
            np.random.default_rng(0).shuffle(group_of)
        return replace(layer, s=scales.astype(np.float16), group_of=group_of)


CASES = {
    "awq": Case(awq_config(32), awq_gemm, 32),
    "gptq in order of activation": Case(gptq_config(32, desc_act=True), gptq, 32, shuffled=True),
    "gptq with 8 bits": Case(gptq_config(128, 8), gptq, 128, bits=8, symmetric=True),
    "compressed-tensors": Case(compressed_config(128), compressed, 128),
    "compressed-tensors by channel": Case(compressed_config(-1, 8), compressed, -1, bits=8),
}


@dataclass(frozen=True)
class Imported:
    case: Case
    model: Qwen2_5_VLForConditionalGeneration
    """Has the weights that the integers stand for."""
    layers: dict[str, RandomLayer]
    checkpoint: Path
    export: Path
    record: ExportRecord

    def step(self, decoder: Path, config: dict[str, str] | None = None) -> StepResult:
        """Prefill twelve tokens."""
        cos, sin = DecoderReference(self.model).rope(POSITIONS)
        return DecoderRunner(decoder, self.record.text, config=config).step(EMBEDS, cos, sin)

    def expected(self) -> StepResult:
        return DecoderReference(self.model).step(EMBEDS, POSITIONS, 8)


EMBEDS = np.random.default_rng(0).standard_normal((1, 12, HIDDEN)).astype(np.float32)
POSITIONS = np.stack([np.arange(12), np.arange(12) // 3 + 5, np.arange(12) % 7 + 2])[:, None]


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """The tiny model with random integers in all linear layers of its decoder."""
    case: Case = request.param
    root = tmp_path_factory.mktemp("imported")
    model = make_tiny_model(root / "checkpoint")
    file = root / "checkpoint" / "model.safetensors"
    tensors = load_file(file)
    layers: dict[str, RandomLayer] = {}
    for seed, (name, module) in enumerate(model.model.language_model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            layer = case.layer(name, module, seed)
            module.weight.data = torch.from_numpy(layer.weight.copy())
            layers[f"model.language_model.layers.{name}"] = layer
    for name, layer in layers.items():
        stored = name if f"{name}.weight" in tensors else name.replace("model.language_model.", "model.")
        del tensors[f"{stored}.weight"]
        for part, array in case.write(layer).items():
            tensors[f"{stored}.{part}"] = np.ascontiguousarray(array)
    save_file(tensors, file)
    config = json.loads((root / "checkpoint" / "config.json").read_text())
    (root / "checkpoint" / "config.json").write_text(
        json.dumps(config | {"quantization_config": case.config})
    )
    record = export_model(root / "checkpoint", tiny_card(), root / "export", UNTOUCHED)
    return Imported(case, model, layers, root / "checkpoint", root / "export", record)


def assert_close(actual: StepResult, expected: StepResult, tolerance: float) -> None:
    for ours, theirs in ((actual.logits, expected.logits), (actual.q_window, expected.q_window)):
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def test_integers_scales_and_zero_points_are_those_of_the_file(imported: Imported) -> None:
    graph = ir.load(imported.export / "decoder.onnx").graph
    stored = {
        name: value.const_value.numpy()
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }
    half = 2 ** (imported.case.bits - 1)
    found = 0
    for name in [name.removesuffix(".codes") for name in stored if name.endswith(".codes")]:
        # model.language_model.layers.0.mlp | gate_up_proj
        parts = name.split(".")
        parent, fused = ".".join(parts[:5]), ".".join(parts[5:])
        members = [imported.layers[f"{parent}.{member}"] for member in MEMBERS.get(fused, (fused,))]
        order = stored.get(f"{name}.input_order", np.arange(len(members[0].q)))
        codes = np.concatenate([layer.q for layer in members], axis=1)[order] - half
        np.testing.assert_array_equal(stored[f"{name}.codes"].astype(int), codes)
        groups = members[0].group_of[order].reshape(len(stored[f"{name}.scales"]), -1)[:, 0]
        scales = np.concatenate([layer.s for layer in members], axis=1)[groups]
        np.testing.assert_array_equal(stored[f"{name}.scales"], scales.astype(np.float32))
        zero_points = np.concatenate([layer.z for layer in members], axis=1)[groups] - half
        if imported.case.symmetric:
            assert f"{name}.zero_points" not in stored
        else:
            np.testing.assert_array_equal(stored[f"{name}.zero_points"].astype(int), zero_points)
        found += len(members)
    assert found == len(imported.layers) == 14


def test_logits_are_those_of_transformers(imported: Imported) -> None:
    decoder = imported.export / "decoder.onnx"
    onnx.checker.check_model(decoder, full_check=True)
    assert_close(imported.step(decoder, FLOAT_PRODUCTS), imported.expected(), TOLERANCE)


def test_the_engine_multiplies_integers(imported: Imported, tmp_path: Path) -> None:
    build_ort_engine(imported.export, tmp_path / "engine")
    decoder = tmp_path / "engine" / "decoder.onnx"
    operators = [node.op_type for node in onnx.load(decoder, load_external_data=False).graph.node]
    assert "DequantizeLinear" not in operators
    assert operators.count("MatMulNBits") == (10 if imported.case.shuffled else 8)
    assert_close(imported.step(decoder), imported.expected(), INTEGER_TOLERANCE)


def test_fp32_undoes_the_quantization(imported: Imported, tmp_path: Path) -> None:
    record = export_model(imported.checkpoint, tiny_card(), tmp_path / "export", PRESETS["fp32"])
    assert record.quantization.decoder == "fp32"
    assert_close(imported.step(tmp_path / "export" / "decoder.onnx"), imported.expected(), TOLERANCE)


@pytest.mark.parametrize(
    ("preset", "route", "message"),
    [
        ("int4-awq", "build", "quantized already"),
        ("fp32", "trace", "trace route reads no quantized checkpoint"),
    ],
)
def test_what_makes_no_sense_is_refused(
    imported: Imported, tmp_path: Path, preset: str, route: Route, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export_model(imported.checkpoint, tiny_card(), tmp_path / "export", PRESETS[preset], route=route)
    assert not list(tmp_path.iterdir())


def test_presets_keep_the_integers(imported: Imported, tmp_path: Path) -> None:
    record = export_model(imported.checkpoint, tiny_card(), tmp_path / "export", PRESETS["int8"])
    assert record.quantization.preset == imported.case.config["quant_method"]
    assert record.quantization.decoder == f"int{imported.case.bits}"
    assert record.parameters == sum(weight.numel() for weight in imported.model.parameters())
    # The head, which the checkpoint left alone, has 8 bits now.
    actual, expected = (
        imported.step(tmp_path / "export" / "decoder.onnx", FLOAT_PRODUCTS),
        imported.expected(),
    )
    assert np.abs(actual.q_window - expected.q_window).max() <= TOLERANCE * np.abs(expected.q_window).max()
    assert np.abs(actual.logits - expected.logits).max() <= INTEGER_TOLERANCE * np.abs(expected.logits).max()
