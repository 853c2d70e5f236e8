# SPDX-License-Identifier: Apache-2.0
"""Every family's sizes, names and tensors are those of the models that transformers builds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hub_configs
import pytest
import torch
import transformers
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from starkv.errors import CheckpointError
from starkv.export.checkpoint import canonical_name
from starkv.export.models.families import FAMILIES, check_tensors, family_of, tensor_shapes

CONFIGS = {
    "Qwen2.5-VL-7B": hub_configs.QWEN2_5_VL_7B,
    "Qwen2-VL-2B": hub_configs.QWEN2_VL_2B,
    "UI-TARS-7B": hub_configs.UI_TARS_7B,
    "OpenCUA-7B": hub_configs.OPENCUA_7B,
}
SIZES = {"Qwen2.5-VL-7B": 8.29e9, "Qwen2-VL-2B": 2.21e9, "UI-TARS-7B": 8.29e9, "OpenCUA-7B": 8.29e9}
"""Weights as the Hub's pages give them."""


def few_layers(config: dict[str, Any]) -> dict[str, Any]:
    """The same model with two layers and two blocks, which transformers builds in no time."""
    cut = config | {"vision_config": config["vision_config"] | {"depth": 2}}
    if "text_config" in config:
        return cut | {"text_config": config["text_config"] | {"num_hidden_layers": 2}}
    return cut | {"num_hidden_layers": 2}


def transformers_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that transformers would save."""
    with torch.device("meta"):
        if config["model_type"] == "opencua":
            # transformers has no such class; its authors' code puts these two together.
            vision = transformers.Qwen2_5_VLConfig(vision_config=config["vision_config"]).vision_config
            parts = {
                "vision_tower": Qwen2_5_VisionTransformerPretrainedModel(vision),
                "language_model": transformers.Qwen2ForCausalLM(
                    transformers.Qwen2Config(**config["text_config"])
                ),
            }
            model: torch.nn.Module = torch.nn.ModuleDict(parts)
        else:
            classes = {
                "qwen2_vl": (transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration),
                "qwen2_5_vl": (
                    transformers.Qwen2_5_VLConfig,
                    transformers.Qwen2_5_VLForConditionalGeneration,
                ),
            }
            config_class, model_class = classes[config["model_type"]]
            model = model_class(config_class(**config))
    # named_parameters names a tied weight once.
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


class FakeCheckpoint:
    """Shapes without weights."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.folder = Path("checkpoint")
        self._shapes = {canonical_name(name): shape for name, shape in shapes.items()}

    def names(self) -> Sequence[str]:
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]


def check(checkpoint: FakeCheckpoint, config: dict[str, Any]) -> None:
    family = family_of(config, Path("config.json"))
    check_tensors(checkpoint, family, family.parse_config(config, Path("config.json")))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_tensors_are_those_of_transformers(config: dict[str, Any]) -> None:
    cut = few_layers(config)
    expected = transformers_shapes(cut)
    shapes = tensor_shapes(cut)
    assert {canonical_name(name): shape for name, shape in shapes.items()} == {
        canonical_name(name): shape for name, shape in expected.items()
    }
    check(FakeCheckpoint(expected), cut)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_published_number_of_weights(name: str) -> None:
    counted = sum(torch.Size(shape).numel() for shape in tensor_shapes(CONFIGS[name]).values())
    assert counted == pytest.approx(SIZES[name], rel=2e-3)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            hub_configs.QWEN2_5_VL_7B,
            {"visual.blocks.31.mlp.gate_proj.weight", "model.norm.weight", "lm_head.weight"},
        ),
        (hub_configs.UI_TARS_7B, {"visual.merger.ln_q.bias", "model.layers.27.mlp.up_proj.weight"}),
        (
            hub_configs.OPENCUA_7B,
            {
                "vision_tower.patch_embed.proj.weight",
                "language_model.model.layers.0.self_attn.k_proj.bias",
                "language_model.lm_head.weight",
            },
        ),
    ],
)
def test_names_are_those_of_the_hub(config: dict[str, Any], names: set[str]) -> None:
    assert names <= tensor_shapes(config).keys()


def test_a_tied_head_is_not_stored() -> None:
    assert "lm_head.weight" not in tensor_shapes(hub_configs.QWEN2_VL_2B)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_canonical_names_come_back_from_the_hubs_spelling(config: dict[str, Any]) -> None:
    family = family_of(config, Path("config.json"))
    for name in family.canonical_shapes(family.parse_config(config, Path("config.json"))):
        assert canonical_name(family.hub_name(name)) == canonical_name(name) == name


def test_every_family_has_one_architecture() -> None:
    assert len({family.name for family in FAMILIES.values()}) == len(FAMILIES)
    assert all(architecture == family.architecture for architecture, family in FAMILIES.items())


def test_missing_tensors_are_counted_and_the_first_is_named() -> None:
    config = few_layers(hub_configs.QWEN2_5_VL_7B)
    shapes = {name: shape for name, shape in tensor_shapes(config).items() if "blocks.1.attn" not in name}
    message = r"4 of \d+ tensors are missing, the first is visual\.blocks\.1\.attn\.qkv\.weight"
    with pytest.raises(CheckpointError, match=message):
        check(FakeCheckpoint(shapes), config)


def test_a_tensor_of_another_shape_is_named() -> None:
    config = few_layers(hub_configs.OPENCUA_7B)
    shapes = tensor_shapes(config) | {"language_model.model.norm.weight": (2048,)}
    with pytest.raises(
        CheckpointError, match=r"language_model\.model\.norm\.weight has shape \[2048\].*\[3584\]"
    ):
        check(FakeCheckpoint(shapes), config)


def test_further_tensors_do_no_harm() -> None:
    config = few_layers(hub_configs.OPENCUA_7B)
    buffers = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": (64,)}
    check(FakeCheckpoint(tensor_shapes(config) | buffers), config)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(CheckpointError, match="LlamaForCausalLM is not supported; starkv knows Qwen2_5_VL"):
        family_of({"architectures": ["LlamaForCausalLM"]}, Path("config.json"))
