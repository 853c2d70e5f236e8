# SPDX-License-Identifier: Apache-2.0
"""The model families that starkv exports, and what sets them apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from starkv.errors import CheckpointError
from starkv.export.graph import GraphBuilder
from starkv.export.models import opencua_config, qwen2_5_vl_config, qwen2_vl_config
from starkv.export.models.config import ModelConfig
from starkv.export.models.qwen2_5_vl_vision import build_vision as build_qwen2_5_vision
from starkv.export.models.qwen2_vl_vision import build_vision as build_qwen2_vision
from starkv.export.models.tensor_shapes import (
    Shapes,
    qwen2_5_tower_shapes,
    qwen2_tower_shapes,
    text_shapes,
)


@dataclass(frozen=True)
class Family:
    """One family; its decoder is :func:`~starkv.export.models.qwen2_decoder.build_decoder`."""

    name: str
    architecture: str
    """As ``architectures`` in ``config.json`` spells it."""
    hub_prefixes: tuple[tuple[str, str], ...]
    """Beginnings of tensor names: canonical spelling → spelling of the files on the Hub."""
    parse_config: Callable[[dict[str, Any], Path], ModelConfig]
    build_vision: Callable[[GraphBuilder, ModelConfig], None]
    tower_shapes: Callable[[ModelConfig], Shapes]

    def canonical_shapes(self, config: ModelConfig) -> Shapes:
        """Shape of every weight by canonical name."""
        return text_shapes(config) | self.tower_shapes(config)

    def hub_name(self, name: str) -> str:
        """Spell a canonical name as this family's files on the Hub do."""
        for canonical, hub in self.hub_prefixes:
            if name.startswith(canonical):
                return hub + name[len(canonical) :]
        return name


_QWEN_PREFIXES = (("model.language_model.", "model."), ("model.visual.", "visual."))

FAMILIES = {
    family.architecture: family
    for family in (
        Family(
            "qwen2_5_vl",
            "Qwen2_5_VLForConditionalGeneration",
            _QWEN_PREFIXES,
            qwen2_5_vl_config.parse_config,
            build_qwen2_5_vision,
            qwen2_5_tower_shapes,
        ),
        Family(
            "qwen2_vl",
            "Qwen2VLForConditionalGeneration",
            _QWEN_PREFIXES,
            qwen2_vl_config.parse_config,
            build_qwen2_vision,
            qwen2_tower_shapes,
        ),
        Family(
            "opencua",
            "OpenCUAForConditionalGeneration",
            (
                ("model.language_model.", "language_model.model."),
                ("model.visual.", "vision_tower."),
                ("lm_head.", "language_model.lm_head."),
            ),
            opencua_config.parse_config,
            build_qwen2_5_vision,
            qwen2_5_tower_shapes,
        ),
    )
}
"""By architecture."""


class Shaped(Protocol):
    """Tensors by canonical name; a :class:`~starkv.export.checkpoint.Checkpoint` is one."""

    @property
    def folder(self) -> Path: ...

    def names(self) -> Sequence[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; ``[outputs, inputs]`` also where a linear layer is stored quantized."""


def family_of(config: dict[str, Any], path: Path) -> Family:
    """Find the family of a parsed ``config.json``; ``path`` is named in errors.

    Raises:
        CheckpointError: the architecture is not supported.
    """
    found = (config.get("architectures") or [f"model_type {config.get('model_type')}"])[0]
    if found not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"{path}: architecture {found} is not supported; starkv knows {known}")
    return FAMILIES[found]


def tensor_shapes(config: dict[str, Any]) -> Shapes:
    """Every weight of a checkpoint with this ``config.json``: name in the Hub's spelling → shape.

    Raises:
        CheckpointError: the architecture is not supported, or a size is missing or makes no sense.
    """
    path = Path("config.json")
    family = family_of(config, path)
    shapes = family.canonical_shapes(family.parse_config(config, path))
    return {family.hub_name(name): shape for name, shape in shapes.items()}


def check_tensors(checkpoint: Shaped, family: Family, config: ModelConfig) -> None:
    """Compare a checkpoint's tensors with the sizes in its ``config.json`` before hours go into it.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    expected = family.canonical_shapes(config)
    stored = set(checkpoint.names())
    if missing := [name for name in expected if name not in stored]:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(missing)} of {len(expected)} tensors are missing, the first is "
            f"{family.hub_name(missing[0])}; download the missing files again"
        )
    for name, shape in expected.items():
        if (found := tuple(checkpoint.shape(name))) != shape:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {family.hub_name(name)} has shape {list(found)}, but the sizes "
                f"in config.json ask for {list(shape)}; take both from the same repository"
            )
