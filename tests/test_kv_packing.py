# SPDX-License-Identifier: Apache-2.0
"""What an engine is packed with, and which engines can be."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from conftest import TinyModel
from packed_engines import (
    QUANTIZED,
    VARIANTS,
    PackedEngines,
    calibration_prompts,
    decoded,
    placed,
)

from starkv.calibration.kv_packing import make_packing
from starkv.calibration.kv_statistics import gather_statistics
from starkv.errors import CalibrationError, EngineError, UsageError
from starkv.export.build.ort import build_ort_engine
from starkv.export.build.pack import attention_weights, describe_packing, pack_ort_engine
from starkv.kv_packing.low_rank import LowRankPacking
from starkv.kv_packing.options import PackingOptions, parse_kv_quant
from starkv.manifest import MANIFEST_NAME, Manifest, read_manifest, seal
from starkv.runtime.engines.base import Floats, Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.kv.buffers import Arena


def pack(packed: PackedEngines, plain: Path, out: Path, variant: str = "int8") -> Manifest:
    """Pack an engine with what ``packed`` was calibrated to."""
    packing = packed.packing(variant)
    return pack_ort_engine(plain, out, packing, describe_packing(packing, VARIANTS[variant], 1))


def test_a_prepacked_engine_loses_its_prepacked_form(
    packed: PackedEngines, tiny: TinyModel, tmp_path: Path
) -> None:
    """Those graphs know nothing of the packed cache; the engine must not look for them either."""
    plain = tmp_path / "plain"
    build_ort_engine(tiny.exports["fp32"], plain, prepack=True)
    assert OrtEngine(plain).info.loaded_form == "prepacked"
    manifest = pack(packed, plain, tmp_path / "packed")
    assert not [name for name in manifest.files if "prepacked" in name]
    engine = OrtEngine(tmp_path / "packed", threads=1)
    assert engine.info.loaded_form == "portable"
    pool = engine.new_pool(1, 100, packed=True)
    placed(engine, pool)
    assert np.isfinite(decoded(engine, pool, 2)).all()


@pytest.mark.parametrize("preset", ["int8", "int4", "int4-small"])
def test_engines_with_quantized_weights(
    packed: PackedEngines, tiny: TinyModel, preset: str, tmp_path: Path
) -> None:
    """Biases and output weights are found in them, too, and the cache is packed as well as on floats."""
    build_ort_engine(tiny.exports[preset], tmp_path / "plain")
    build_ort_engine(tiny.exports["fp32"], tmp_path / "floats")
    mine, expected = (attention_weights(tmp_path / name) for name in ("plain", "floats"))
    for one, other in zip(mine.biases, expected.biases, strict=True):
        np.testing.assert_array_equal(one, other)
    for weight, exact in zip(mine.outputs, expected.outputs, strict=True):
        assert weight.shape == exact.shape
        assert np.abs(weight - exact).max() < 0.15 * np.abs(exact).max()
    plain = OrtEngine(tmp_path / "plain", threads=1)
    statistics = gather_statistics(plain, packed.exact.tokenizer, mine.biases, calibration_prompts())
    packing = make_packing(VARIANTS["rank 1"], statistics, mine.biases, mine.outputs)
    description = describe_packing(packing, VARIANTS["rank 1"], statistics.tokens)
    pack_ort_engine(tmp_path / "plain", tmp_path / "packed", packing, description)
    engine = OrtEngine(tmp_path / "packed", threads=1)
    logits = []
    for one, own in ((plain, False), (engine, True)):
        pool = one.new_pool(1, 150, packed=own)
        placed(one, pool)
        logits.append(decoded(one, pool, 20))
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-2 * np.abs(logits[0]).max())


class EngineWithBrokenKeys:
    """An engine whose model overflows in one layer."""

    def __init__(self, engine: OrtEngine, number: float) -> None:
        self._engine, self._number = engine, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def prefill(self, arena: Arena, embeds: Floats, rope: Rope) -> Floats:
        logits = self._engine.prefill(arena, embeds, rope)
        arena.host_kv.keys[1, 0, 0, 40] = self._number
        return logits


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_keys_that_are_no_numbers(packed: PackedEngines, number: float) -> None:
    broken: Any = EngineWithBrokenKeys(packed.engine("int8"), number)
    biases, prompts = packed.weights.biases, calibration_prompts()
    with pytest.raises(CalibrationError, match="key projection put out values that are not finite"):
        gather_statistics(broken, packed.exact.tokenizer, biases, prompts)


def test_too_few_tokens(packed: PackedEngines) -> None:
    engine, tokenizer, biases = packed.exact.engine, packed.exact.tokenizer, packed.weights.biases
    with pytest.raises(CalibrationError, match=r"calibration saw 70 tokens of a kind.*channels need 128"):
        gather_statistics(engine, tokenizer, biases, calibration_prompts(2))
    with pytest.raises(CalibrationError, match="there are no calibration prompts"):
        gather_statistics(engine, tokenizer, biases, [])
    # The same words over and over are not many tokens.
    same = [replace(prompt, instruction="click", reply="") for prompt in calibration_prompts()]
    with pytest.raises(CalibrationError, match="tokens of a kind"):
        gather_statistics(engine, tokenizer, biases, same)


@pytest.mark.parametrize("rank", [0.0, -0.5, 1.01, 2.0, float("nan"), float("inf")])
def test_impossible_ranks(rank: float) -> None:
    with pytest.raises(UsageError, match=r"a KV rank is a share of full rank in \(0, 1\]"):
        PackingOptions("int8", rank)


def test_ranks_below_the_least(packed: PackedEngines) -> None:
    """A share that no rank comes near is refused, not rounded up to four times its bytes."""
    weights = packed.weights
    with pytest.raises(
        UsageError, match=r"rank of 0\.05 can't be reached.*16 of 64.*--kv-rank 0\.25 or more"
    ):
        make_packing(PackingOptions("int4", 0.05), packed.statistics, weights.biases, weights.outputs)
    packing = make_packing(PackingOptions("int4", 0.25), packed.statistics, weights.biases, weights.outputs)
    assert isinstance(packing, LowRankPacking)
    assert {factor.rank for layer in packing.layers for factor in layer.keys} == {16}


def test_nothing_to_pack() -> None:
    with pytest.raises(UsageError, match="nothing to pack: give --kv-quant int8 or int4, --kv-rank, or both"):
        PackingOptions()
    with pytest.raises(UsageError, match="unknown KV quantization 'int3'; known: none, int8, int4"):
        parse_kv_quant("int3")


def test_names_of_packings() -> None:
    assert [VARIANTS[name].directory_suffix for name in VARIANTS] == [
        "kv-int8",
        "kv-int4",
        "kv-r100",
        "kv-r100-int8",
        "kv-r50",
        "kv-r50-int8",
        "kv-r50-int4",
    ]
    assert PackingOptions("int4", 0.125).directory_suffix == "kv-r12.5-int4"


def copy_with(plain: Path, out: Path, **changes: object) -> Path:
    """An engine whose manifest says something else, sealed as if it had been built so."""
    shutil.copytree(plain, out)
    (out / MANIFEST_NAME).write_text(seal(read_manifest(plain).model_copy(update=changes)))
    return out


@pytest.mark.parametrize("changes", [{"compute_dtype": "bfloat16"}, {"backend": "trt"}])
def test_engines_for_gpus(packed: PackedEngines, changes: dict[str, object], tmp_path: Path) -> None:
    engine = copy_with(packed.plain, tmp_path / "engine", **changes)
    with pytest.raises(UsageError, match="is for a GPU; packed caches run in TensorRT"):
        attention_weights(engine)
    with pytest.raises(UsageError, match="is for a GPU"):
        pack(packed, engine, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_an_engine_that_is_packed_already(packed: PackedEngines, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has a packed cache already; pack the engine that it was made from"):
        pack(packed, packed.directory("int8"), tmp_path / "packed")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", [*QUANTIZED, "rank 1 int8"])
def test_an_onnxruntime_without_quantized_caches(
    packed: PackedEngines, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions refuse the operator when they load the graph. The error says what to do about it."""
    folder, opened = packed.directory(variant), onnxruntime.InferenceSession

    def old(path: str, *rest: Any, **named: Any) -> Any:
        if path.endswith("decoder.onnx"):
            raise RuntimeError("Unrecognized attribute: k_quant_type for operator GroupQueryAttention\nmore")
        return opened(path, *rest, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", old)
    with pytest.raises(EngineError) as raised:
        OrtEngine(folder)
    message = str(raised.value)
    assert f"can't load {folder / 'decoder.onnx'}: Unrecognized attribute: k_quant_type" in message
    assert "\n" not in message
    hint = f"attention to its {variant} cache is an operator that older versions don't have"
    assert (hint in message) == (variant in QUANTIZED)
    assert ("--kv-rank 1 --kv-quant int8" in message) == (variant in QUANTIZED)
