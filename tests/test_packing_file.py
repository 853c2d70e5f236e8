# SPDX-License-Identifier: Apache-2.0
"""``kv_packing.safetensors`` and the engine directory around it."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_engines import (
    VARIANTS,
    PackedEngines,
)
from safetensors import safe_open
from safetensors.numpy import save_file

from starkv.errors import EngineError
from starkv.kv_packing.file import PACKING_NAME, load_packing, save_packing
from starkv.kv_packing.low_rank import LowRankPacking
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.manifest import MANIFEST_NAME, read_manifest
from starkv.runtime.engines.ort import OrtEngine


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_gives_back_what_was_written(packed: PackedEngines, variant: str, tmp_path: Path) -> None:
    packing, path = packed.packing(variant), tmp_path / PACKING_NAME
    save_packing(packing, path)
    found = load_packing(path)
    again = tmp_path / "again"
    save_packing(found, again)
    assert path.read_bytes() == again.read_bytes()
    if isinstance(packing, QuantizedPacking):
        assert isinstance(found, QuantizedPacking)
        assert found.bits == packing.bits
        for one, other in zip(found.layers, packing.layers, strict=True):
            np.testing.assert_array_equal(one.key_scales, other.key_scales)
            np.testing.assert_array_equal(one.key_bias, other.key_bias)
    else:
        assert isinstance(found, LowRankPacking)
        assert (found.latent, found.recent_rows) == (packing.latent, packing.recent_rows)
        for layer, (one, other) in enumerate(zip(found.layers, packing.layers, strict=True)):
            assert found.bytes_per_row(layer) == packing.bytes_per_row(layer)
            np.testing.assert_allclose(one.values.up, other.values.up, rtol=1e-6, atol=1e-8)


def rewritten(path: Path, edit: Callable[[dict[str, np.ndarray], dict[str, Any]], None]) -> None:
    """Change the tensors and facts of a packing's file."""
    with safe_open(path, "np") as file:
        facts = json.loads(file.metadata()["packing"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    edit(tensors, facts)
    save_file(tensors, path, {"packing": json.dumps(facts)})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda path: path.write_bytes(b""),
        lambda path: save_file({"x": np.zeros(1, np.float32)}, path),
        lambda path: save_file({"x": np.zeros(1, np.float32)}, path, {"packing": "{"}),
        lambda path: save_file({"x": np.zeros(1, np.float32)}, path, {"packing": "[]"}),
        lambda path: rewritten(path, lambda tensors, facts: facts.update(layers=9)),
        lambda path: rewritten(path, lambda tensors, facts: facts.pop("layers")),
        lambda path: rewritten(path, lambda tensors, facts: tensors.__delitem__("1.key_bias")),
    ],
    ids=[
        "truncated",
        "empty",
        "no facts",
        "no JSON",
        "other JSON",
        "too few layers",
        "no layers",
        "a bias less",
    ],
)
@pytest.mark.parametrize("variant", ["int4", "rank 0.5 int8"])
def test_a_damaged_file(
    packed: PackedEngines, variant: str, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / PACKING_NAME
    shutil.copy(packed.directory(variant) / PACKING_NAME, path)
    damage(path)
    with pytest.raises(EngineError, match=r"kv_packing\.safetensors is damaged .*build the engine again"):
        load_packing(path)


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("int8", lambda tensors, facts: tensors["0.key_scales"].__setitem__((0, 3), 7.0)),
        ("rank 0.5", lambda tensors, facts: tensors.update({"0.values.up": np.zeros((3, 5), np.float32)})),
        ("rank 0.5", lambda tensors, facts: facts.update(latent="int5")),
        ("rank 0.5", lambda tensors, facts: facts.update(groups=[1])),
    ],
    ids=["scales of a pair", "factors", "latent", "groups"],
)
def test_a_file_that_contradicts_itself(
    packed: PackedEngines,
    variant: str,
    change: Callable[[Mapping[str, np.ndarray], dict[str, Any]], None],
    tmp_path: Path,
) -> None:
    path = tmp_path / PACKING_NAME
    shutil.copy(packed.directory(variant) / PACKING_NAME, path)
    rewritten(path, change)
    with pytest.raises(EngineError, match="is damaged"):
        load_packing(path)


def test_an_engine_without_its_file(packed: PackedEngines, tmp_path: Path) -> None:
    engine = shutil.copytree(packed.directory("int8"), tmp_path / "engine")
    content = bytearray((engine / PACKING_NAME).read_bytes())
    content[-1] ^= 1
    (engine / PACKING_NAME).write_bytes(content)
    with pytest.raises(EngineError, match=r"kv_packing\.safetensors was changed or damaged"):
        OrtEngine(engine)
    (engine / PACKING_NAME).unlink()
    for verify in (True, False):
        with pytest.raises(EngineError, match=r"kv_packing\.safetensors is missing from the engine"):
            OrtEngine(engine, verify)


def test_a_changed_manifest(packed: PackedEngines, tmp_path: Path) -> None:
    engine = shutil.copytree(packed.directory("int8"), tmp_path / "engine")
    path = engine / MANIFEST_NAME
    path.write_text(path.read_text().replace('"bytes_per_row": 536', '"bytes_per_row": 5'))
    with pytest.raises(EngineError, match=r"manifest\.json was changed since the build"):
        OrtEngine(engine)
    path.write_text(path.read_text().replace('"quant": "int8"', '"quant": "int5"'))
    with pytest.raises(EngineError, match=r"field kv_packing\.quant: .*build the engine again"):
        OrtEngine(engine)


def test_an_engine_holds_its_packing_and_is_sealed(packed: PackedEngines) -> None:
    for variant, options in VARIANTS.items():
        manifest = read_manifest(packed.directory(variant))
        assert PACKING_NAME in manifest.files
        found = manifest.kv_packing
        assert found is not None
        assert (found.quant, found.rank) == (options.quant, options.rank)
        assert found.calibration_tokens == packed.statistics.tokens > 500
