# SPDX-License-Identifier: Apache-2.0
"""``starkv train-kv``: a real training of a few steps, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from command import Command

from starkv.export.build.pack import attention_weights
from starkv.kv_packing.file import load_packing
from starkv.kv_packing.low_rank import LowRankPacking
from starkv.kv_packing.retarget import check_factors, packing_from_factors
from starkv.manifest import read_manifest
from starkv.runtime.agent import Agent


@pytest.mark.slow
def test_factors_of_the_embedded_model(
    starkv: Command, gui_tiny_engine: Path, screenshot: Path, tmp_path: Path
) -> None:
    out = tmp_path / "made" / "r60.factors"
    asked = ("--kv-rank", "0.6", "--kv-quant", "int4", "--steps", "8", "--batch", "2", "--prompts", "6")
    done = starkv("train-kv", "gui-tiny", "--out", out, "--engine", gui_tiny_engine, *asked, "--threads", "1")
    assert done.code == 0, done.err
    assert done.out == f"{out}\n"
    assert "bytes of latents per token over all layers (budget" in done.err
    assert [path.name for path in out.parent.iterdir()] == ["r60.factors"]

    packing = load_packing(out)
    assert isinstance(packing, LowRankPacking)
    text = read_manifest(gui_tiny_engine).text
    check_factors(packing, text, str(out))
    expected = attention_weights(gui_tiny_engine).biases
    np.testing.assert_allclose(packing.layers[2].key_bias, expected[2][0])
    folded = packing_from_factors(packing, "int4")
    full = packing_from_factors(packing, "none")
    assert sum(map(folded.bytes_per_row, range(text.layers))) < sum(
        map(full.bytes_per_row, range(text.layers))
    )
    engine = tmp_path / "engine"
    done = starkv("pack", gui_tiny_engine, "--factors", out, "--kv-quant", "int4", "--out", engine)
    assert (done.code, done.out) == (0, f"{engine}\n"), done.err
    described = read_manifest(engine).kv_packing
    assert described is not None
    assert described.trained
    assert described.rank == packing.rank_share
    assert described.describe() == f"trained rank {packing.rank_share:.3g} int4"
    assert "trained" in starkv("inspect", engine).out
    reply = Agent.load(engine, threads=1).act(screenshot, "Click the red star.")
    assert reply.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv-rank", "1.5"), "a share of full rank in (0, 1]"),
        (("--kv-rank", "0"), "a share of full rank in (0, 1]"),
        (("--kv-quant", "int3"), "unknown KV quantization 'int3'"),
        (("--steps", "2"), "at least 8 steps"),
        (("--device", "tpu"), "unknown device 'tpu'"),
    ],
)
def test_wrong_options_are_refused_at_once(
    starkv: Command, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    done = starkv("train-kv", "gui-tiny", "--out", tmp_path / "factors", *options)
    assert done.code == 2
    assert message in done.err
    assert list(tmp_path.glob("factors*")) == []


def test_a_directory_is_no_file_for_factors(starkv: Command, tmp_path: Path) -> None:
    done = starkv("train-kv", "gui-tiny", "--out", tmp_path)
    assert done.code == 2
    assert f"{tmp_path} is a directory" in " ".join(done.err.split())
