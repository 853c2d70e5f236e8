# SPDX-License-Identifier: Apache-2.0
"""Model cards: complete, refused where wrong, and true to the sizes of the models they name."""

import json
import math
from pathlib import Path

import pytest
from hub_configs import OPENCUA_7B, QWEN2_5_VL_7B, QWEN2_VL_2B, UI_TARS_7B
from pydantic import ValidationError
from tiny_model import tiny_card

from starkv.errors import CheckpointError, UsageError
from starkv.export import cards
from starkv.export.cards import card_names, card_of_folder, config_of_card, load_card, resolve_model
from starkv.export.models.families import family_of, tensor_shapes
from starkv.export.quantize.presets import load_preset

PARAMETERS = {
    "ui-tars-1.5-7b": 8_292_166_656,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-3b": 3_754_622_976,
    "opencua-7b": 8_292_166_656,
    "ui-tars-2b-sft": 2_208_985_600,
    "ui-tars-7b-dpo": 8_291_375_616,
}
"""As the Hub counts them from the files."""


def test_every_model_has_a_card() -> None:
    assert set(card_names()) == {"gui-tiny", *PARAMETERS}


@pytest.mark.parametrize("name", card_names())
def test_cards_are_complete(name: str) -> None:
    card = load_card(name)
    assert card.name == name
    assert load_preset(card.quantization).name == card.quantization
    assert 0 < card.min_pixels <= card.max_pixels
    assert 0 < card.kv_budget <= 1
    assert card.folder or card.licence_url.startswith("https://")
    config = json.loads(config_of_card(card).read_text())
    assert family_of(config, Path("config.json")).name == card.family
    sizes = config.get("text_config", config)
    assert card.max_context <= sizes["max_position_embeddings"]


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_configs_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    shapes = tensor_shapes(json.loads(config_of_card(load_card(name)).read_text()))
    assert sum(map(math.prod, shapes.values())) == parameters


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("qwen2.5-vl-7b", QWEN2_5_VL_7B),
        ("ui-tars-1.5-7b", QWEN2_5_VL_7B),
        ("ui-tars-7b-dpo", UI_TARS_7B),
        ("ui-tars-2b-sft", QWEN2_VL_2B),
        ("opencua-7b", OPENCUA_7B),
    ],
)
def test_configs_describe_the_same_graphs_as_the_published_ones(
    name: str, published: dict[str, object]
) -> None:
    path = config_of_card(load_card(name))
    family = family_of(published, path)
    assert family.parse_config(json.loads(path.read_text()), path) == family.parse_config(published, path)


def test_coordinates_follow_the_generation() -> None:
    relative = {name for name in card_names() if load_card(name).coordinates == "relative_1000"}
    assert relative == {"ui-tars-2b-sft", "ui-tars-7b-dpo"}


def test_only_the_research_licence_is_marked() -> None:
    assert {name for name in card_names() if load_card(name).research_only} == {"qwen2.5-vl-3b"}


def test_the_embedded_model_keeps_everything_and_needs_no_network() -> None:
    resolved = resolve_model("gui-tiny", download=None)
    assert resolved.card.kv_budget == 1.0
    assert (resolved.folder / "model.safetensors").is_file()
    with pytest.raises(UsageError, match="comes with its weights"):
        resolve_model("gui-tiny", Path("elsewhere"))


@pytest.mark.parametrize(
    "change",
    [{"licens": "MIT"}, {"source": "org/model"}, {"folder": ""}, {"kv_budget": 0.0}, {"prompt": "prose"}],
)
def test_wrong_fields_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        tiny_card(**change)


def test_a_wrong_card_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "CARDS_DIRECTORY", tmp_path)
    (tmp_path / "mine.toml").write_text('name = "mine"\ncolour = "red"\n')
    with pytest.raises(UsageError, match=r"mine.toml: field \w+: "):
        load_card("mine")
    with pytest.raises(UsageError, match="unknown model 'Mine!'; did you mean 'mine'"):
        load_card("Mine!")


@pytest.mark.parametrize(
    ("model_type", "coordinates"),
    [("qwen2_5_vl", "absolute"), ("qwen2_vl", "relative_1000"), ("opencua", "absolute"), ("new", "absolute")],
)
def test_folders_without_a_card(tmp_path: Path, model_type: str, coordinates: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json is missing"):
        card_of_folder(tmp_path)
    assert card_of_folder(tmp_path, (56, 560)).max_pixels == 560
    limits = {"size": {"shortest_edge": 3136, "longest_edge": 50176}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(limits))
    card = card_of_folder(tmp_path, (56, 560))
    assert (card.family, card.coordinates) == (model_type, coordinates)
    assert (card.min_pixels, card.max_pixels) == (3136, 50176)
    assert card.origin == tmp_path.name
