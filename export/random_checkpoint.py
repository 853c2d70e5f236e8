# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder of any model's true sizes, with random weights, laid out like one of the Hub.

For measuring size, memory and speed where the real weights can't be had. What such a model says means
nothing.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from starkv.errors import UsageError
from starkv.export.disk_space import free_space
from starkv.export.models.families import tensor_shapes
from starkv.export.progress import NoProgress, Progress
from starkv.export.random_checkpoint_tokenizer import end_of_text, special_token_ids, write_tokenizer
from starkv.export.random_checkpoint_values import DTYPES, RandomDtype, RandomValues
from starkv.export.safetensors_header import INDEX_NAME, SINGLE_NAME, header_bytes
from starkv.export.staging import check_replaceable, staged_directory

STAMP_NAME = "random_weights.json"
"""Says that a folder is a random checkpoint, and which."""
_SHARD_BYTES = 5_000_000_000
"""As large as the Hub's shards."""
_STORED = {"bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16"), "fp32": ("F32", "float32")}
"""Dtype → its name in safetensors and in ``config.json``."""
_PIXEL_LIMITS = (3136, 12_845_056)
"""The family's, for models without a card."""

Shapes = Mapping[str, tuple[int, ...]]


class _Stamp(BaseModel):
    """What a random checkpoint was made from; equal stamps mean equal files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int
    dtype: str
    config: dict[str, Any]
    pixel_limits: tuple[int, int]
    shard_bytes: int
    sizes: dict[str, int]
    """File name → bytes of each file with weights."""


def write_random_checkpoint(
    config: Mapping[str, Any],
    folder: Path,
    dtype: RandomDtype = "bf16",
    seed: int = 0,
    layers: int | None = None,
    pixel_limits: tuple[int, int] = _PIXEL_LIMITS,
    shard_bytes: int = _SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint with the tensors that ``config`` describes into ``folder``.

    ``folder`` appears complete or not at all. The same random checkpoint there is kept as it is, another
    random one is replaced, anything else is refused. The same arguments give the same bytes. Memory holds one
    block of random numbers at a few scales, under 250 MB.

    Args:
        config: parsed ``config.json`` of a supported family; only sizes and token ids matter.
        folder: to write.
        dtype: of the weights.
        seed: of the random numbers.
        layers: of the text decoder, instead of the config's; the vision tower keeps its own.
        pixel_limits: smallest and largest image in pixels, for ``preprocessor_config.json``.
        shard_bytes: most bytes of tensors in one file; a larger tensor gets a file of its own.
        progress: one step for each tensor.

    Raises:
        CheckpointError: the config is of no supported family, or its vocabulary is too small.
        UsageError: too many layers, ``folder`` holds something else, or the disk is too small.
    """
    config = _with_layers(config, layers) | {"torch_dtype": _STORED[dtype][1]}
    special_token_ids(config)
    shapes = tensor_shapes(config)
    files = _plan_files(shapes, DTYPES[dtype].itemsize, shard_bytes)
    headers = {
        name: header_bytes({tensor: (_STORED[dtype][0], shapes[tensor]) for tensor in names})
        for name, names in files.items()
    }
    sizes = {
        name: len(headers[name]) + sum(_bytes(shapes[tensor], dtype) for tensor in names)
        for name, names in files.items()
    }
    stamp = _Stamp(
        seed=seed,
        dtype=dtype,
        config=config,
        pixel_limits=pixel_limits,
        shard_bytes=shard_bytes,
        sizes=sizes,
    )
    if _is_complete(folder, stamp):
        return
    check_replaceable(folder, STAMP_NAME)
    _check_space(folder, sum(sizes.values()))
    progress = progress or NoProgress()
    progress.start("random", len(shapes))
    values = RandomValues(seed, dtype)
    with staged_directory(folder, STAMP_NAME) as staging:
        for name, tensors in files.items():
            _write_file(staging / name, headers[name], tensors, shapes, values, progress)
        if len(files) > 1:
            _write_index(staging, files, sum(_bytes(shape, dtype) for shape in shapes.values()))
        _write_side_files(staging, config, pixel_limits)
        (staging / STAMP_NAME).write_text(stamp.model_dump_json(indent=2) + "\n")


def is_random_checkpoint(folder: Path) -> bool:
    """Whether the weights in ``folder`` come from :func:`write_random_checkpoint`."""
    return (folder / STAMP_NAME).is_file()


def _with_layers(config: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    """A copy of ``config`` with so many layers in the text decoder."""
    changed: dict[str, Any] = json.loads(json.dumps(config))
    text = changed.get("text_config") or changed
    available = text.get("num_hidden_layers")
    if layers is None:
        return changed
    if not isinstance(available, int) or not 1 <= layers <= available:
        raise UsageError(f"the model has {available} layers, so --layers {layers} is not possible")
    text["num_hidden_layers"] = layers
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:layers]
    return changed


def _bytes(shape: tuple[int, ...], dtype: RandomDtype) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def _plan_files(shapes: Shapes, item_size: int, shard_bytes: int) -> dict[str, list[str]]:
    """File name → its tensors, in order; each file is filled before the next one begins."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item_size
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }


def _write_file(
    path: Path, header: bytes, names: Iterable[str], shapes: Shapes, values: RandomValues, progress: Progress
) -> None:
    with path.open("wb") as stream:
        stream.write(header)
        for name in names:
            for chunk in values.chunks(name, shapes[name]):
                stream.write(chunk.data)
            progress.advance(name)


def _write_index(folder: Path, files: Mapping[str, list[str]], total: int) -> None:
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _write_side_files(folder: Path, config: Mapping[str, Any], pixel_limits: tuple[int, int]) -> None:
    vision = config.get("vision_config") or {}
    ends = end_of_text(write_tokenizer(config, folder))
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": pixel_limits[0],
        "max_pixels": pixel_limits[1],
        "patch_size": vision.get("patch_size", 14),
        "temporal_patch_size": vision.get("temporal_patch_size", 2),
        "merge_size": vision.get("spatial_merge_size", 2),
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[-1]}),
        ("preprocessor_config.json", preprocessor),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _is_complete(folder: Path, stamp: _Stamp) -> bool:
    """Whether ``folder`` already holds exactly this checkpoint."""
    try:
        found = _Stamp.model_validate_json((folder / STAMP_NAME).read_bytes())
    except (OSError, ValidationError):
        return False
    return found == stamp and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in stamp.sizes.items()
    )


def _check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk can't hold."""
    place, free = free_space(folder)
    if free < needed + needed // 100:
        raise UsageError(
            f"the random checkpoint {folder} needs {needed / 1e9:.1f} GB, but {place} has "
            f"{free / 1e9:.1f} GB free; free some, choose another place, or take fewer --layers"
        )
