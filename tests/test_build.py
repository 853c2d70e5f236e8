# SPDX-License-Identifier: Apache-2.0
"""Exports and engines appear whole or not at all, and an engine describes itself."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLAIN_PRESETS, TinyModel
from decoder_runner import DecoderRunner
from safetensors.torch import load_file
from tiny_model import HIDDEN, make_tiny_model, tiny_card

from starkv.errors import CheckpointError, UsageError
from starkv.export.build import ort as build_ort
from starkv.export.build.ort import PREPACKED_CPU, PREPACKED_RUNTIME, build_ort_engine
from starkv.export.export_model import export_model
from starkv.export.quantize.presets import PRESETS, load_preset
from starkv.export.record import RECORD_NAME, read_record
from starkv.host import cpu_model
from starkv.manifest import MANIFEST_NAME, read_manifest, verify_files


class CountingProgress:
    def __init__(self) -> None:
        self.stages: dict[str, tuple[int, list[str]]] = {}

    def start(self, stage: str, total: int) -> None:
        self.items: list[str] = []
        self.stages[stage] = (total, self.items)

    def advance(self, item: str) -> None:
        self.items.append(item)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_engine_verifies_and_describes_itself(tiny: TinyModel) -> None:
    manifest = read_manifest(tiny.engine)
    verify_files(tiny.engine, manifest)
    assert set(manifest.files) | {MANIFEST_NAME} == {path.name for path in tiny.engine.iterdir()}
    assert manifest.backend == "ort"
    assert manifest.text == read_record(tiny.exports["fp32"]).text
    assert (manifest.text.layers, manifest.text.kv_heads, manifest.text.head_dim) == (2, 2, 64)
    assert manifest.vision.full_attention_blocks == [1]
    assert manifest.tokens.image_pad == 290
    assert manifest.tokens.end_of_text == [2]
    assert manifest.parameters == sum(weight.numel() for weight in tiny.model.parameters())
    assert not any(
        str(tiny.checkpoint.parent) in value
        for value in manifest.model_dump(mode="json").values()
        if isinstance(value, str)
    )


def test_same_input_gives_the_same_bytes(tiny: TinyModel, tmp_path: Path) -> None:
    for preset, export in tiny.exports.items():
        export_model(tiny.checkpoint, tiny_card(), tmp_path / preset, load_preset(preset))
        assert files_of(tmp_path / preset) == files_of(export)


def test_embedding_keeps_values_and_dtype(tiny: TinyModel, tmp_path: Path) -> None:
    expected = tiny.model.get_input_embeddings().weight.detach()
    stored = load_file(tiny.exports["fp32"] / "embedding.safetensors")["embedding"]
    assert torch.equal(stored, expected)

    model = make_tiny_model(tmp_path / "checkpoint", dtype=torch.bfloat16)
    record = export_model(tmp_path / "checkpoint", tiny_card(), tmp_path / "export", PRESETS["fp32"])
    stored = load_file(tmp_path / "export" / "embedding.safetensors")["embedding"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, model.get_input_embeddings().weight.detach())
    assert record.quantization.embedding == "bf16"


def test_progress_reaches_its_totals(tiny: TinyModel, tmp_path: Path) -> None:
    progress = CountingProgress()
    export_model(tiny.checkpoint, tiny_card(), tmp_path / "export", PRESETS["int8"], progress)
    build_ort_engine(tmp_path / "export", tmp_path / "engine", progress)
    assert list(progress.stages) == ["vision", "embedding", "decoder", "engine"]
    for total, items in progress.stages.values():
        assert len(items) == total > 0


def test_failed_build_keeps_the_old_engine(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "engine"
    build_ort_engine(tiny.exports["int4"], out)
    before = files_of(out)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(build_ort, "write_manifest", fail)
    with pytest.raises(OSError, match="disk full"):
        build_ort_engine(tiny.exports["fp32"], out)
    assert files_of(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_build_replaces_an_engine(tiny: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    build_ort_engine(tiny.exports["int4"], out)
    build_ort_engine(tiny.exports["fp32"], out)
    assert read_manifest(out).quantization.preset == "fp32"
    verify_files(out, read_manifest(out))
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("marker", [MANIFEST_NAME, RECORD_NAME])
def test_foreign_folder_is_never_overwritten(tiny: TinyModel, tmp_path: Path, marker: str) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "holiday.jpg").write_bytes(b"precious")
    write: dict[str, Callable[[], object]] = {
        MANIFEST_NAME: lambda: build_ort_engine(tiny.exports["fp32"], out),
        RECORD_NAME: lambda: export_model(tiny.checkpoint, tiny_card(), out, PRESETS["fp32"]),
    }
    with pytest.raises(UsageError, match=f"photos exists, has files and no {marker}"):
        write[marker]()
    assert files_of(out) == {"holiday.jpg": b"precious"}


def test_file_in_the_way_is_not_overwritten(tiny: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("precious")
    with pytest.raises(UsageError, match="is no directory"):
        build_ort_engine(tiny.exports["fp32"], out)
    assert out.read_text() == "precious"


def test_empty_folder_is_used(tiny: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    build_ort_engine(tiny.exports["fp32"], tmp_path / "engine")
    verify_files(tmp_path / "engine", read_manifest(tmp_path / "engine"))


def test_linked_files_are_shared(tiny: TinyModel, tmp_path: Path) -> None:
    export_model(tiny.checkpoint, tiny_card(), tmp_path / "export", PRESETS["fp32"])
    build_ort_engine(tmp_path / "export", tmp_path / "engine", link=True)
    for name in ("decoder.data", "embedding.safetensors"):
        assert (tmp_path / "engine" / name).samefile(tmp_path / "export" / name)
    assert not (tmp_path / "engine" / "decoder.onnx").samefile(tmp_path / "export" / "decoder.onnx")


def test_a_disk_without_room_is_refused_at_once(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match=r"it needs about 0\.0\d GiB in .* and 0\.00 GiB are free"):
        build_ort_engine(tiny.exports["fp32"], tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["posix_fallocate", "copyfile"])
def test_a_disk_that_fills_up_leaves_nothing_behind(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if step == "posix_fallocate" else shutil, step, full)
    with pytest.raises(UsageError, match="no room for the engine: it needs"):
        build_ort_engine(tiny.exports["int4"], tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", PLAIN_PRESETS)
def test_prepacked_form_computes_the_same(tiny: TinyModel, tmp_path: Path, preset: str) -> None:
    import onnxruntime

    manifest = build_ort_engine(tiny.exports[preset], tmp_path / "engine", prepack=True)
    assert manifest.tool_versions[PREPACKED_RUNTIME] == onnxruntime.__version__
    assert manifest.tool_versions[PREPACKED_CPU] == cpu_model()
    assert {"vision.prepacked.onnx", "decoder.prepacked.onnx"} <= set(manifest.files)
    embeds = np.random.default_rng(0).standard_normal((1, 7, HIDDEN))
    ones = np.ones((1, 7, 32))
    logits = [
        DecoderRunner(tmp_path / "engine" / name, manifest.text).step(embeds, ones, 0 * ones).logits
        for name in ("decoder.onnx", "decoder.prepacked.onnx")
    ]
    np.testing.assert_array_equal(*logits)


def test_incomplete_export_is_refused(tiny: TinyModel, tmp_path: Path) -> None:
    export = tmp_path / "export"
    with pytest.raises(UsageError, match=r"no exported model: it has no export\.json; run `starkv export`"):
        build_ort_engine(export, tmp_path / "engine")
    shutil.copytree(tiny.exports["fp32"], export)
    (export / "vision.data").unlink()
    with pytest.raises(UsageError, match=r"vision\.data is missing from the export"):
        build_ort_engine(export, tmp_path / "engine")
    record = json.loads((export / RECORD_NAME).read_text())
    for broken, message in (
        (json.dumps(record | {"schema_version": 0}), "schema_version is 0, not 3"),
        (json.dumps(record | {"surprise": 1}), "field surprise"),
        ("{", "not readable JSON"),
    ):
        (export / RECORD_NAME).write_text(broken)
        with pytest.raises(UsageError, match=message):
            build_ort_engine(export, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_checkpoint_without_a_side_file_is_refused(tiny: TinyModel, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        export_model(tmp_path / "checkpoint", tiny_card(), tmp_path / "out", PRESETS["fp32"])
    assert not (tmp_path / "out").exists()


def test_chat_template_comes_from_whichever_file_has_it(tiny: TinyModel, tmp_path: Path) -> None:
    assert (tiny.exports["fp32"] / "chat_template.jinja").read_text() == "{{ messages }}"
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint, checkpoint)
    (checkpoint / "chat_template.jinja").write_text("own file")
    export_model(checkpoint, tiny_card(), tmp_path / "export", PRESETS["fp32"])
    assert (tmp_path / "export" / "chat_template.jinja").read_text() == "own file"
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no chat template"):
        export_model(checkpoint, tiny_card(), tmp_path / "export", PRESETS["fp32"])
