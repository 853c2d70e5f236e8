# SPDX-License-Identifier: Apache-2.0
"""A build keeps TensorRT's rules in every version: the strict fake, which knows them, finds nothing wrong."""

from pathlib import Path

import pytest
from conftest import TinyModel
from fake_tensorrt import H100, ORIN, install

from starkv.errors import EngineError
from starkv.export.build.trt import build_trt_engine
from starkv.export.build.trt_options import TrtBuildOptions
from starkv.manifest import read_manifest, verify_files

VERSIONS = ("10.3.0.26", "10.13.3.9", "10.16.1.11", "11.1.0.106", "11.4.0.106")


@pytest.fixture
def options(tmp_path: Path) -> TrtBuildOptions:
    plugins = tmp_path / "libstarkv_trt.so"
    plugins.write_bytes(b"\x7fELF")
    return TrtBuildOptions(plugins=plugins, timing_directory=tmp_path / "timing")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("preset", ["fp32", "int8", "int4", "int4-small"])
def test_every_version_builds_every_preset(
    monkeypatch: pytest.MonkeyPatch,
    tiny: TinyModel,
    tmp_path: Path,
    options: TrtBuildOptions,
    version: str,
    preset: str,
) -> None:
    state = install(monkeypatch, version, gpu=ORIN)
    # The second begins with what the first has measured.
    for _ in range(2):
        build_trt_engine(tiny.exports[preset], tmp_path / "engine", options)
    assert len(state.builds) == 6
    manifest = read_manifest(tmp_path / "engine")
    verify_files(tmp_path / "engine", manifest)
    assert manifest.tensorrt is not None
    assert (manifest.tensorrt.version, manifest.tensorrt.compute_capability) == (version, "8.7")
    assert set(manifest.tensorrt.scratch_bytes) == {"vision", "decoder.prefill", "decoder.decode", "compress"}


@pytest.mark.parametrize("version", VERSIONS)
def test_plans_without_weights_and_with_visible_layers(
    monkeypatch: pytest.MonkeyPatch, tiny: TinyModel, tmp_path: Path, options: TrtBuildOptions, version: str
) -> None:
    state = install(monkeypatch, version)
    chosen = TrtBuildOptions(
        plugins=options.plugins,
        timing_directory=options.timing_directory,
        strip=True,
        weight_streaming=True,
        debug_layers=("layers.*",),
        hardware_compatibility="ampere_plus",
    )
    build_trt_engine(tiny.exports["int4"], tmp_path / "engine", chosen)
    assert len(state.builds) == 3


def test_too_little_workspace_says_what_to_change(
    monkeypatch: pytest.MonkeyPatch, tiny: TinyModel, tmp_path: Path, options: TrtBuildOptions
) -> None:
    state = install(monkeypatch, gpu=H100)
    state.workspace_needed = 1 << 50
    with pytest.raises(EngineError, match=r"can't build vision\.plan: .*--prefill-rows, --sessions"):
        build_trt_engine(tiny.exports["fp32"], tmp_path / "engine", options)
    assert not (tmp_path / "engine").exists()
