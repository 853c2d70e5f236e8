# SPDX-License-Identifier: Apache-2.0
"""Engines of Qwen2-VL and OpenCUA compute what transformers computes: image tokens, prompt, reply."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from tiny_chat import END_OF_TEXT, IMAGE_PAD
from tiny_families import Reference, make_tiny_opencua, make_tiny_qwen2_vl
from tiny_model import tiny_card

from starkv.export.build.ort import build_ort_engine
from starkv.export.export_model import export_model
from starkv.export.quantize.presets import PRESETS
from starkv.methods.rows import prompt_rows
from starkv.runtime.agent import Agent
from starkv.runtime.engines.base import Engine, Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.torch_reference import TorchReferenceEngine
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.image import ImageInputs, preprocess
from starkv.runtime.preprocess.positions import prompt_positions, rope_tables, text_positions
from starkv.runtime.preprocess.tokenizer import Message, expand_image_tokens
from starkv.runtime.session import Session

TOLERANCE = 1e-4
GRIDS = [(16, 24), (20, 36), (18, 30), (2, 50), (4, 6), (58, 10)]
REPLY = [7, 30, 11, 250, 3, 99]
MAKERS = {"qwen2_vl": make_tiny_qwen2_vl, "opencua": make_tiny_opencua}


@dataclass(frozen=True)
class FamilyModel:
    name: str
    reference: Reference
    export: Path
    checkpoint: Path
    directory: Path
    engine: OrtEngine


@pytest.fixture(scope="module", params=MAKERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyModel:
    root = tmp_path_factory.mktemp(request.param)
    reference = MAKERS[request.param](root / "checkpoint")
    export_model(root / "checkpoint", tiny_card(family=request.param), root / "export", PRESETS["fp32"])
    build_ort_engine(root / "export", root / "engine")
    engine = OrtEngine(root / "engine")
    return FamilyModel(
        request.param, reference, root / "export", root / "checkpoint", root / "engine", engine
    )


def random_image(grid: tuple[int, int]) -> ImageInputs:
    rows, columns = grid
    pixels = np.random.default_rng(rows * columns).standard_normal((rows * columns, 1176)).astype(np.float32)
    size = (rows * 14, columns * 14)
    return ImageInputs(pixels, rows, columns, (rows // 2, columns // 2), *size, *size)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("graph", ["vision", "decoder"])
def test_graphs_are_valid_onnx(model: FamilyModel, graph: str) -> None:
    onnx.checker.check_model(model.export / f"{graph}.onnx", full_check=True)


@pytest.mark.parametrize("grid", GRIDS)
def test_image_tokens_equal_transformers(model: FamilyModel, grid: tuple[int, int]) -> None:
    image = random_image(grid)
    expected = model.reference.image_embeds(image.pixel_values, grid)
    assert_close(model.engine.encode_image(image), expected)


@pytest.mark.parametrize("grids", [[(10, 18)], [(4, 14), (12, 6)]], ids=["one image", "two images"])
@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_prompt_and_reply_equal_transformers(
    model: FamilyModel, backend: str, grids: list[tuple[int, int]]
) -> None:
    images = [random_image(grid) for grid in grids]
    ids = [5, 9, 17]
    for image in images:
        ids += [IMAGE_PAD] * (image.merged_grid[0] * image.merged_grid[1]) + [40, 41]
    engine: Engine = model.engine
    if backend == "torch":
        engine = TorchReferenceEngine.load(model.directory, model.checkpoint)
    text = engine.manifest.text

    embeds = engine.embed(ids)
    embeds[np.asarray(ids) == IMAGE_PAD] = np.concatenate([engine.encode_image(image) for image in images])
    positions = prompt_positions(ids, IMAGE_PAD, [image.merged_grid for image in images], text)
    arena, pool = engine.new_arena(len(ids)), engine.new_pool(1, len(ids) + len(REPLY))
    logits = engine.prefill(arena, embeds, Rope(*rope_tables(positions.values, text)))
    engine.compress(arena, pool, pool.acquire(), prompt_rows(len(ids), [], []), KvPolicy())

    pixels = np.concatenate([image.pixel_values for image in images])
    assert_close(logits, model.reference.prefill(ids, pixels, grids))
    for step, token in enumerate(REPLY):
        rope = Rope(*rope_tables(text_positions(1, positions.next_position + step).values, text))
        logits = engine.decode(pool, engine.embed([token]), rope)[0]
        assert_close(logits, model.reference.decode(token))


def test_a_session_says_what_transformers_says(model: FamilyModel) -> None:
    agent = Agent.load(model.directory, threads=1)
    tokenizer, manifest = agent.tokenizer, agent.engine.manifest
    pixels = np.random.default_rng(1).integers(0, 256, (150, 260, 3), np.uint8)
    screenshot = Image.fromarray(pixels)
    parts: list[dict[str, str]] = [{"type": "image"}, {"type": "text", "text": "click the red star"}]
    messages: list[Message] = [{"role": "user", "content": parts}]
    session = Session(agent.engine, tokenizer)
    reply = "".join(session.reply(messages, [screenshot], SamplingParameters(max_new_tokens=16)))

    image = preprocess(screenshot, manifest.vision, manifest.image)
    tokens = image.merged_grid[0] * image.merged_grid[1]
    ids = expand_image_tokens(tokenizer.encode(tokenizer.render(messages)), IMAGE_PAD, [tokens])
    logits = model.reference.prefill(ids, image.pixel_values, [(image.grid_h, image.grid_w)])
    expected: list[int] = []
    while len(expected) < 16 and (token := int(logits.argmax())) != END_OF_TEXT:
        expected.append(token)
        logits = model.reference.decode(token)
    assert len(expected) > 8
    assert reply == tokenizer.decode(expected)


def test_a_tower_without_windows_takes_rotary_tables_alone(model: FamilyModel) -> None:
    graph = onnx.load(model.export / "vision.onnx", load_external_data=False).graph
    names = {value.name for value in graph.input}
    windows = {"gather_idx", "window_valid", "real_slots", "back_slots", "unpad_idx"}
    expected = {"pixel_values", "rope_cos", "rope_sin"} | (windows if model.name == "opencua" else set())
    assert names == expected


def test_the_manifest_says_how_positions_count(model: FamilyModel) -> None:
    manifest = model.engine.manifest
    assert manifest.family == model.name
    assert manifest.text.mrope_section == (None if model.name == "opencua" else [8, 12, 12])
    assert manifest.tokens.image_pad == IMAGE_PAD
    assert manifest.text.tied_embedding == (model.name == "qwen2_vl")
