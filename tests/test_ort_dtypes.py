# SPDX-License-Identifier: Apache-2.0
"""Engines in 16 bits: float16 against float32 on the processor, and what is computed in which dtype."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import TinyModel
from decoder_runner import DecoderRunner, open_session
from tiny_families import make_tiny_qwen2_vl
from tiny_model import HIDDEN, tiny_card

from starkv.errors import UsageError
from starkv.export.build.ort import build_ort_engine
from starkv.export.export_model import export_model
from starkv.export.lower.compute_dtype import ISLANDS, MOVES
from starkv.export.quantize.presets import load_preset
from starkv.manifest import Manifest, read_manifest, verify_files
from starkv.runtime.preprocess.vision_plan import plan_vision

PRESETS = ("fp32", "int4", "int4-small")
TOLERANCE = 1e-2
"""Of the largest value; float16 rounds to 5e-4 at every step."""
EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Without it ONNX Runtime rounds float32 activations to 8 bits on their way into quantized layers."""


@pytest.fixture(scope="module")
def engines(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(preset, compute dtype) → engine."""
    root, built = tmp_path_factory.mktemp("dtypes"), {}
    for preset in PRESETS:
        for dtype in ("float32", "float16", "bfloat16"):
            built[preset, dtype] = root / f"{preset}-{dtype}"
            build_ort_engine(tiny.exports[preset], built[preset, dtype], compute_dtype=dtype)
    return built


def manifest_of(engines: dict[tuple[str, str], Path]) -> Manifest:
    return read_manifest(engines["fp32", "float16"])


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual.astype(np.float32) - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("preset", ["fp32", "int4"])
def test_a_float16_decoder_computes_what_a_float32_one_does(
    tiny: TinyModel, engines: dict[tuple[str, str], Path], preset: str
) -> None:
    """Prefill, and steps on the cache that it left."""
    text = manifest_of(engines).text
    narrow = DecoderRunner(engines[preset, "float16"] / "decoder.onnx", text)
    wide = DecoderRunner(tiny.exports[preset] / "decoder.onnx", text, config=EXACT)
    random = np.random.default_rng(0)
    for rows in (20, 1, 1, 1):
        embeds, angles = random.standard_normal((1, rows, HIDDEN)), random.uniform(0, 6, (1, rows, 32))
        steps = [runner.step(embeds, np.cos(angles), np.sin(angles)) for runner in (narrow, wide)]
        assert steps[0].logits.dtype == steps[0].hidden_norm.dtype == np.float32
        assert steps[0].q_window.dtype == np.float16
        assert_close(steps[0].logits, steps[1].logits)
        assert_close(steps[0].q_window, steps[1].q_window)
        assert_close(steps[0].hidden_norm, steps[1].hidden_norm)
    for name, cache in narrow.cache.items():
        assert cache.dtype == np.float16
        assert_close(cache[:, :, :23], wide.cache[name][:, :, :23])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_float16_vision_tower_sees_what_a_float32_one_does(
    tiny: TinyModel, engines: dict[tuple[str, str], Path], preset: str
) -> None:
    """A grid with cut windows, whose mask became a bias."""
    manifest = manifest_of(engines)
    plan = plan_vision(20, 10, manifest.vision)
    pixels = np.random.default_rng(0).standard_normal((200, 1176)).astype(np.float32)
    feeds = {"pixel_values": pixels, **plan.inputs()}
    sessions = (
        open_session(engines[preset, "float16"] / "vision.onnx"),
        open_session(tiny.exports[preset] / "vision.onnx", EXACT),
    )
    results = [session.run(["image_embeds"], feeds)[0] for session in sessions]
    assert results[0].dtype == np.float32
    assert_close(*results)


def moves_only(node: ir.Node) -> bool:
    return node.op_type in MOVES


def is_residual_sum(node: ir.Node) -> bool:
    return node.op_type == "Add" and not any(value and value.is_initializer() for value in node.inputs)


@pytest.mark.parametrize("graph", ["decoder", "vision"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_only_the_named_operators_compute_in_float32(
    engines: dict[tuple[str, str], Path], dtype: str, preset: str, graph: str
) -> None:
    model = ir.load(engines[preset, dtype] / f"{graph}.onnx")
    narrow = ir.DataType[dtype.upper()]
    seen = {}
    for node in model.graph:
        floats = [value.dtype for value in (*node.inputs, *node.outputs) if value is not None and value.name]
        floats = [kind for kind in floats if kind in (ir.DataType.FLOAT, narrow)]
        if node.op_type in ISLANDS or is_residual_sum(node):
            assert set(floats) == {ir.DataType.FLOAT}
        elif node.op_type == "Cast":
            assert len(set(floats)) == 2 or not floats
        elif moves_only(node):
            assert len(set(floats)) <= 1
        else:
            assert set(floats) <= {narrow}, node.op_type
            seen[node.op_type] = floats
    multiplication = (
        "MatMulNBits" if preset == "int4-small" or (graph, preset) == ("decoder", "int4") else "MatMul"
    )
    assert seen[multiplication]
    # Weights that nothing reads in float32 are not stored so, and nothing is stored twice.
    stored = {value.dtype for value in model.graph.initializers.values() if value.const_value.nbytes > 4096}
    assert stored <= {narrow, ir.DataType.UINT8}


@pytest.mark.parametrize("graph", ["decoder", "vision"])
@pytest.mark.parametrize("preset", PRESETS)
def test_graphs_in_bfloat16_are_valid(engines: dict[tuple[str, str], Path], preset: str, graph: str) -> None:
    """Checker and shape inference compare the declared types with those that the operators give."""
    path = engines[preset, "bfloat16"] / f"{graph}.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    narrow = {name for name, kind in types.items() if kind == onnx.TensorProto.BFLOAT16}
    if graph == "decoder":
        assert narrow == {f"present_{kind}.{layer}" for kind in "kv" for layer in range(2)} | {"q_window"}
    else:
        assert narrow == set()


def test_bfloat16_weights_are_rounded_as_pytorch_rounds(
    tiny: TinyModel, engines: dict[tuple[str, str], Path]
) -> None:
    import torch

    model = ir.load(engines["fp32", "bfloat16"] / "decoder.onnx")
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    tensor = model.graph.initializers[f"{name}.bfloat16"].const_value
    assert tensor is not None
    expected = dict(tiny.model.named_parameters())[name].detach().T.to(torch.bfloat16).float()
    np.testing.assert_array_equal(tensor.numpy().astype(np.float32), expected.numpy())


def test_engines_say_what_they_are(engines: dict[tuple[str, str], Path]) -> None:
    for (_, dtype), directory in engines.items():
        manifest = read_manifest(directory)
        verify_files(directory, manifest)
        assert (manifest.backend, manifest.compute_dtype) == ("ort", dtype)
    halves = [(engines["fp32", dtype] / "decoder.data").stat().st_size for dtype in ("bfloat16", "float32")]
    assert halves[0] < 0.52 * halves[1]


def test_prepacking_is_for_processors(tiny: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--prepack is for processors, not for an engine in bfloat16"):
        build_ort_engine(tiny.exports["fp32"], tmp_path / "out", prepack=True, compute_dtype="bfloat16")
    assert list(tmp_path.iterdir()) == []


def test_a_tower_without_windows_computes_in_16_bits(tmp_path: Path) -> None:
    """Qwen2-VL's: layer norms and another activation; against transformers."""
    reference = make_tiny_qwen2_vl(tmp_path / "checkpoint")
    card = tiny_card(family="qwen2_vl")
    export_model(tmp_path / "checkpoint", card, tmp_path / "export", load_preset("fp32"))
    for dtype in ("float16", "bfloat16"):
        build_ort_engine(tmp_path / "export", tmp_path / dtype, compute_dtype=dtype)
        onnx.checker.check_model(tmp_path / dtype / "vision.onnx", full_check=True)
    plan = plan_vision(4, 6, read_manifest(tmp_path / "float16").vision)
    pixels = np.random.default_rng(0).standard_normal((24, 1176)).astype(np.float32)
    session = open_session(tmp_path / "float16" / "vision.onnx")
    embeds = session.run(["image_embeds"], {"pixel_values": pixels, **plan.inputs()})[0]
    assert_close(embeds, reference.image_embeds(pixels, (4, 6)))
