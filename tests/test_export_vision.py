# SPDX-License-Identifier: Apache-2.0
"""The exported vision tower computes what transformers computes, for every shape of image."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import TinyModel
from decoder_runner import open_session
from tiny_model import HIDDEN

from starkv.export.record import read_record
from starkv.runtime.preprocess.vision_plan import plan_vision

TOLERANCE = 1e-4

GRIDS = {
    "whole windows": (16, 24),
    "cut off in both directions": (20, 36),
    "cut off by one merged patch": (18, 30),
    "one row of merged patches": (2, 50),
    "smaller than a window": (4, 6),
    "tall": (58, 10),
}


@pytest.fixture(params=["standard bodies", "onnxruntime bodies"])
def vision(request: pytest.FixtureRequest, tiny: TinyModel) -> Path:
    folder = tiny.exports["fp32"] if request.param == "standard bodies" else tiny.engine
    return folder / "vision.onnx"


def assert_equals_transformers(path: Path, tiny: TinyModel, grid: tuple[int, int]) -> None:
    rows, columns = grid
    pixels = np.random.default_rng(rows * columns).standard_normal((rows * columns, 1176)).astype(np.float32)
    with torch.no_grad():
        grid_thw = torch.tensor([[1, rows, columns]])
        expected = tiny.model.model.visual(torch.from_numpy(pixels), grid_thw).pooler_output.numpy()
    plan = plan_vision(rows, columns, read_record(tiny.exports["fp32"]).vision)
    (actual,) = open_session(path).run(None, {"pixel_values": pixels, **vars(plan)})
    assert actual.shape == expected.shape == (rows * columns // 4, HIDDEN)
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_canonical_graph_is_valid_onnx(tiny: TinyModel) -> None:
    onnx.checker.check_model(tiny.exports["fp32"] / "vision.onnx", full_check=True)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_equals_transformers(vision: Path, tiny: TinyModel, grid: tuple[int, int]) -> None:
    assert_equals_transformers(vision, tiny, grid)


@pytest.mark.slow
def test_full_hd_screenshot_equals_transformers(tiny: TinyModel) -> None:
    assert_equals_transformers(tiny.engine / "vision.onnx", tiny, (78, 138))


def test_interface_is_the_documented_one(vision: Path) -> None:
    session = open_session(vision)
    assert {value.name: (value.type, value.shape) for value in session.get_inputs()} == {
        "pixel_values": ("tensor(float)", ["N", 1176]),
        "rope_cos": ("tensor(float)", ["M", 16]),
        "rope_sin": ("tensor(float)", ["M", 16]),
        "gather_idx": ("tensor(int64)", ["M"]),
        "window_valid": ("tensor(bool)", ["nW", 64]),
        "real_slots": ("tensor(int64)", ["N"]),
        "back_slots": ("tensor(int64)", ["M"]),
        "unpad_idx": ("tensor(int64)", ["T"]),
    }
    assert [value.name for value in session.get_outputs()] == ["image_embeds"]
