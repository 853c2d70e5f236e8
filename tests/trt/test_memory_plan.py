# SPDX-License-Identifier: Apache-2.0
"""The memory plan says what lowered graphs, the kernel library and the runtime's caches really take."""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import onnx
import pytest
from conftest import PLAIN_PRESETS, TinyModel
from kernel_library import built_for_the_processor
from test_awq_search import random_plan
from tiny_families import make_tiny_opencua, make_tiny_qwen2_vl
from tiny_model import tiny_card

from starkv.errors import UsageError
from starkv.export.cards import resolve_model
from starkv.export.export_model import export_model
from starkv.export.lower.trt import lower_to_trt
from starkv.export.lower.trt_weights import NATIVE_BLOCKS
from starkv.export.quantize.presets import PRESETS
from starkv.export.record import ExportRecord, read_record
from starkv.kernels.c_abi import BFLOAT16, AttentionShape, CompressShape, KernelAbi
from starkv.kernels.c_abi_quantized import QuantizedAttentionShape
from starkv.kernels.library_paths import KERNELS
from starkv.lowrank.quantized_rows import Bits
from starkv.manifest import TextShape, read_manifest
from starkv.memory_plan import weights as planned_weights
from starkv.memory_plan.rows import cache_bytes, kept_rows, usual_prompt_rows
from starkv.memory_plan.weights import weight_bytes
from starkv.memory_plan.workspace import (
    attention_workspace,
    code_attention_workspace,
    compress_workspace,
)
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.runtime.engines.base import kv_bytes_per_row
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.kv.buffers import cache_shape, round_up_rows
from starkv.runtime.kv.policy import KvPolicy
from starkv.trt_compat.version import OLDEST

FAMILIES: dict[str, Callable[[Path], object]] = {"qwen2_vl": make_tiny_qwen2_vl, "opencua": make_tiny_opencua}


def stored_bytes(graph: Path) -> tuple[int, int]:
    """Bytes of a lowered graph's weights in its data file, and of its constants."""
    weights = constants = 0
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
        weights += sum(lengths)
        constants += 0 if lengths else onnx.numpy_helper.to_array(tensor).nbytes
    return weights, constants


def assert_weights_are_as_planned(export: Path, out: Path) -> ExportRecord:
    out.mkdir()
    record = read_record(export)
    planned = weight_bytes(record.text, record.vision, record.quantization)
    lowered = {graph.name: graph for graph in lower_to_trt(export, out, OLDEST, "bfloat16")}
    for name, expected in (("vision", planned.vision), ("decoder", planned.decoder), ("compress", 0)):
        weights, constants = stored_bytes(lowered[name].path)
        assert weights == expected, name
        assert lowered[name].weight_bytes == expected + constants
        assert constants < 1024
    assert (export / "embedding.safetensors").stat().st_size == pytest.approx(planned.embedding, abs=4096)
    return record


@pytest.mark.parametrize("preset", PLAIN_PRESETS)
def test_weights_are_those_of_the_lowered_graphs(tiny: TinyModel, tmp_path: Path, preset: str) -> None:
    assert_weights_are_as_planned(tiny.exports[preset], tmp_path / "trt")


@pytest.mark.parametrize("preset", PLAIN_PRESETS)
def test_weights_of_a_tied_head(tmp_path: Path, preset: str) -> None:
    model = resolve_model("gui-tiny")
    export_model(model.folder, model.card, tmp_path / "export", PRESETS[preset])
    assert assert_weights_are_as_planned(tmp_path / "export", tmp_path / "trt").text.tied_embedding


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["int4", "int4-small"])
def test_weights_of_other_families(tmp_path: Path, family: str, preset: str) -> None:
    FAMILIES[family](tmp_path / "checkpoint")
    card = tiny_card(family=family)
    export_model(tmp_path / "checkpoint", card, tmp_path / "export", PRESETS[preset])
    assert_weights_are_as_planned(tmp_path / "export", tmp_path / "trt")


def test_weights_of_a_calibrated_export(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What norms were divided by is stored beside them."""

    class NoPrompts:
        digest = "none"

        def sequences(self, *_: object) -> list[object]:
            return []

    monkeypatch.setattr(
        "starkv.export.quantize.awq.search_scales", lambda source, config, *rest: random_plan(config.text)
    )
    export_model(tiny.checkpoint, tiny_card(), tmp_path / "out", PRESETS["int4-awq"], calibration=NoPrompts())
    assert_weights_are_as_planned(tmp_path / "out", tmp_path / "trt")


def test_blocks_of_32_become_16_bits(tiny: TinyModel, tmp_path: Path) -> None:
    preset = replace(PRESETS["int4-small"], block_size=32)
    export_model(tiny.checkpoint, tiny_card(), tmp_path / "export", preset)
    assert_weights_are_as_planned(tmp_path / "export", tmp_path / "trt")
    assert planned_weights.NATIVE_BLOCKS == NATIVE_BLOCKS


SHAPES = [(28, 28, 4, 128), (36, 16, 2, 128), (2, 4, 2, 64), (3, 32, 1, 96)]
"""Layers, query heads, KV heads, head dim."""


def text_shape(layers: int, heads: int, kv_heads: int, head_dim: int) -> TextShape:
    return TextShape(
        layers=layers,
        hidden=heads * head_dim,
        intermediate=2 * heads * head_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=1000,
        rope_theta=1e4,
        mrope_section=None,
        max_positions=1000,
        tied_embedding=False,
    )


@pytest.fixture(scope="module")
def library() -> KernelAbi:
    return KernelAbi(built_for_the_processor("starkv_kernels_cpu", KERNELS["cpu"]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("capacity", [64, 448, 13_696, 32_768])
def test_workspaces_are_what_the_plugins_ask_for(
    library: KernelAbi, shape: tuple[int, int, int, int], capacity: int
) -> None:
    layers, heads, kv_heads, dim = shape
    text = text_shape(*shape)
    for sessions in (1, 8, 32):
        asked = [
            library.workspace_bytes(AttentionShape(count, 1, heads, kv_heads, dim, capacity, BFLOAT16))
            for count in range(1, sessions + 1)
        ]
        assert attention_workspace(text, sessions, capacity) == max(asked)
    assert library.workspace_bytes(AttentionShape(1, 2048, heads, kv_heads, dim, capacity, BFLOAT16)) == 0
    for window in (1, 8, 64):
        for slot in (64, 3456):
            sizes = (layers, 1, kv_heads, heads, window, dim, capacity, 8, slot, 2691, BFLOAT16, 0, 5)
            assert compress_workspace(text, window, capacity, slot) == library.workspace_bytes(
                CompressShape(*sizes)
            )


@pytest.mark.parametrize("shape", [*SHAPES, (2, 24, 2, 80), (2, 9, 1, 256)])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("capacity", [64, 448, 32_768])
def test_workspaces_over_codes_are_what_the_plugins_ask_for(
    library: KernelAbi, shape: tuple[int, int, int, int], bits: Bits, capacity: int
) -> None:
    _, heads, kv_heads, dim = shape
    sections = (dim // 2 - 8, 4, 4)
    for positions in (1, 1000, 40_000):
        sizes = (heads, kv_heads, dim, capacity, positions, bits, BFLOAT16, sections)
        for sessions in (1, 8, 32):
            asked = [
                library.workspace_bytes(QuantizedAttentionShape(count, *sizes))
                for count in range(1, sessions + 1)
            ]
            planned = code_attention_workspace(text_shape(*shape), bits, sessions, capacity, positions)
            assert planned == max(asked)


@pytest.mark.parametrize("rows", [1, 64, 65, 13_645])
@pytest.mark.parametrize("slots", [1, 32])
def test_caches_are_as_large_as_the_runtime_makes_them(tiny: TinyModel, rows: int, slots: int) -> None:
    manifest = read_manifest(tiny.engine).model_copy(update={"compute_dtype": "bfloat16"})
    planned = cache_bytes(manifest.text, slots, rows)
    assert planned == 2 * 2 * prod(cache_shape(manifest.text, slots, rows))
    assert planned == slots * round_up_rows(rows) * kv_bytes_per_row(manifest)


@pytest.mark.parametrize("budget", [1.0, 0.4, 0.2, 0.05])
@pytest.mark.parametrize("prompt_rows", [128, 500])
def test_kept_rows_are_the_engines(tiny: TinyModel, budget: float, prompt_rows: int) -> None:
    engine = OrtEngine(tiny.engine)
    policy = KvPolicy(STAR_KV, Budget(budget))
    window = engine.manifest.observation_window
    assert kept_rows(prompt_rows, budget, window) == engine.most_kept_rows(prompt_rows, policy)


def test_the_usual_prompt(tiny: TinyModel) -> None:
    manifest = read_manifest(tiny.engine)
    limits = manifest.image.model_copy(update={"max_pixels": 12_845_056})
    assert usual_prompt_rows(manifest.vision, limits) == 5 * 39 * 69 + 190
    with pytest.raises(UsageError, match="share of the prompt"):
        kept_rows(100, 1.5, 8)
