# SPDX-License-Identifier: Apache-2.0
"""Opening an engine directory: what is checked, what is refused, and which form of the graphs is taken."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyModel
from tiny_model import HIDDEN

from starkv.errors import EngineError
from starkv.export.build.ort import build_ort_engine
from starkv.manifest import MANIFEST_NAME, read_manifest, seal
from starkv.runtime.engines.base import Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.preprocess.positions import rope_tables, text_positions

FILES = (
    "chat_template.jinja",
    "compact.onnx",
    "compress.onnx",
    "config.json",
    "decoder.data",
    "decoder.onnx",
    "embedding.safetensors",
    "generation_config.json",
    "score_window.onnx",
    "tokenizer.json",
    "tokenizer_config.json",
    "vision.data",
    "vision.onnx",
)


@pytest.fixture
def engine(tiny: TinyModel, tmp_path: Path) -> Path:
    """A copy of the engine that a test may damage."""
    return shutil.copytree(tiny.engine, tmp_path / "engine")


@pytest.fixture(scope="module")
def prepacked(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepacked") / "engine"
    build_ort_engine(tiny.exports["fp32"], out, prepack=True)
    return out


def first_logits(engine: OrtEngine) -> np.ndarray:
    tables = Rope(*rope_tables(text_positions(5).values, engine.manifest.text))
    embeds = np.random.default_rng(0).standard_normal((5, HIDDEN)).astype(np.float32)
    return engine.prefill(engine.new_arena(5), embeds, tables)


def edit_manifest(directory: Path, **changes: object) -> None:
    """Change fields as a rebuild would: with a fresh seal."""
    manifest = read_manifest(directory).model_copy(update=changes)
    (directory / MANIFEST_NAME).write_text(seal(manifest))


def test_the_list_of_files_is_complete(tiny: TinyModel) -> None:
    assert set(FILES) == set(read_manifest(tiny.engine).files)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_in_any_file_is_found(engine: Path, name: str) -> None:
    content = bytearray((engine / name).read_bytes())
    content[len(content) // 2] ^= 1
    (engine / name).write_bytes(content)
    with pytest.raises(EngineError, match=rf"{name} was changed or damaged"):
        OrtEngine(engine, threads=1)


@pytest.mark.parametrize(("before", "after"), [('"max_context": ', '"max_context": 1'), ("}\n", "} ")])
def test_a_changed_manifest_is_found(engine: Path, before: str, after: str) -> None:
    path = engine / MANIFEST_NAME
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(EngineError, match=r"manifest\.json was changed since the build"):
        OrtEngine(engine, threads=1)
    assert np.isfinite(first_logits(OrtEngine(engine, verify=False, threads=1))).all()


def test_a_missing_file_is_found(engine: Path) -> None:
    (engine / "vision.data").unlink()
    with pytest.raises(EngineError, match=r"vision\.data is missing"):
        OrtEngine(engine, threads=1)


def test_unverified_loading_takes_harmless_changes(engine: Path) -> None:
    with (engine / "chat_template.jinja").open("a") as template:
        template.write("more")
    with pytest.raises(EngineError, match="chat_template"):
        OrtEngine(engine, threads=1)
    assert np.isfinite(first_logits(OrtEngine(engine, verify=False, threads=1))).all()


@pytest.mark.parametrize("name", ["decoder.onnx", "vision.onnx", "decoder.data", "embedding.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_unverified_damage_is_one_clear_line(engine: Path, name: str, damage: str) -> None:
    (engine / name).unlink()
    if damage == "garbage":
        (engine / name).write_bytes(b"\xff" * 64)
    with pytest.raises(EngineError, match=name.split(".")[0]) as caught:
        OrtEngine(engine, verify=False, threads=1)
    assert "\n" not in str(caught.value)


def test_an_engine_of_another_backend_is_refused(engine: Path) -> None:
    edit_manifest(engine, backend="trt")
    with pytest.raises(EngineError, match="was built for TensorRT, not for ONNX Runtime"):
        OrtEngine(engine, threads=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "schema_version is None"),
        ('{"schema_version": 99}', "schema_version is 99, this starkv reads 3"),
        ('{"schema_version": 3}', "field name: Field required"),
    ],
)
def test_a_damaged_manifest_is_refused(engine: Path, content: str, message: str) -> None:
    (engine / MANIFEST_NAME).write_text(content)
    with pytest.raises(EngineError, match=message):
        OrtEngine(engine, threads=1)


def test_a_folder_that_is_no_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="is no engine directory"):
        OrtEngine(tmp_path)
    with pytest.raises(EngineError, match="does not exist"):
        OrtEngine(tmp_path / "nowhere")


def test_a_missing_runtime_says_what_to_install(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"pip install starkv\[cpu\]"):
        OrtEngine(tiny.engine)


def test_prepacked_form_is_used_where_it_fits(
    tiny: TinyModel, prepacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitting = OrtEngine(prepacked, threads=1)
    assert fitting.info.loaded_form == "prepacked"
    plain = OrtEngine(tiny.engine, threads=1)
    assert plain.info.loaded_form == "portable"
    np.testing.assert_allclose(first_logits(fitting), first_logits(plain), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr("starkv.runtime.engines.ort.cpu_model", lambda: "another processor")
    assert OrtEngine(prepacked, threads=1).info.loaded_form == "portable"


def test_prepacked_form_of_another_version_is_ignored(prepacked: Path, tmp_path: Path) -> None:
    engine = shutil.copytree(prepacked, tmp_path / "engine")
    versions = read_manifest(engine).tool_versions
    edit_manifest(engine, tool_versions=versions | {"prepacked_onnxruntime": "0.0.1"})
    loaded = OrtEngine(engine, threads=1)
    assert loaded.info.loaded_form == "portable"
    assert np.isfinite(first_logits(loaded)).all()
