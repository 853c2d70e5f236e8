# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints: what transformers loads without a complaint and starkv exports like any other."""

import copy
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_configs import Config, qwen2_vl_config, small_config
from safetensors import safe_open
from tiny_model import tiny_config
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

from starkv.errors import CheckpointError, UsageError
from starkv.export import random_checkpoint as module
from starkv.export.build.ort import build_ort_engine
from starkv.export.cards import card_of_folder
from starkv.export.export_model import export_model
from starkv.export.models.families import tensor_shapes
from starkv.export.quantize.presets import PRESETS
from starkv.export.random_checkpoint import is_random_checkpoint, write_random_checkpoint
from starkv.export.random_checkpoint_values import RandomValues, parse_random_dtype
from starkv.export.safetensors_header import shard_paths
from starkv.runtime.agent import Agent
from starkv.runtime.generation import SamplingParameters


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def stored(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of all tensors, by the safetensors library."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in shard_paths(folder):
        with safe_open(path, "np") as shard:
            shapes |= {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
    return shapes


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_random_checkpoint(small_config(), tmp_path / name, seed=seed)
    first, again, other = (hashes(tmp_path / name) for name in "abc")
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]
    assert first["tokenizer.json"] == other["tokenizer.json"]


@pytest.mark.parametrize("config", [small_config(), small_config(tied=True), qwen2_vl_config()])
def test_names_and_shapes_are_the_familys(config: Config, tmp_path: Path) -> None:
    write_random_checkpoint(config, tmp_path / "model")
    assert stored(tmp_path / "model") == tensor_shapes(config)


def test_shards_keep_the_limit_and_lose_nothing(tmp_path: Path) -> None:
    folder, limit = tmp_path / "model", 100_000
    write_random_checkpoint(small_config(), folder, shard_bytes=limit)
    write_random_checkpoint(small_config(), tmp_path / "whole")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    with safe_open(tmp_path / "whole" / "model.safetensors", "pt") as file:
        whole = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for path in shards:
        with safe_open(path, "pt") as shard:
            names = list(shard.keys())
            sizes = [shard.get_tensor(name).nbytes for name in names]
            assert sum(sizes) <= limit or len(names) == 1
            for name in names:
                assert index["weight_map"][name] == path.name
                assert torch.equal(shard.get_tensor(name), whole.pop(name))
    assert not whole
    assert index["metadata"]["total_size"] == sum(2 * np.prod(s) for s in stored(folder).values())


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (small_config(), Qwen2_5_VLForConditionalGeneration),
        (small_config(tied=True), Qwen2_5_VLForConditionalGeneration),
        (qwen2_vl_config(), Qwen2VLForConditionalGeneration),
        (
            tiny_config(tied=False).to_dict() | {"architectures": ["Qwen2_5_VLForConditionalGeneration"]},
            Qwen2_5_VLForConditionalGeneration,
        ),
    ],
    ids=["hub", "tied", "qwen2_vl", "nested"],
)
def test_transformers_loads_it(config: Config, model: Any, tmp_path: Path) -> None:
    write_random_checkpoint(config, tmp_path / "model", "fp32")
    loaded, report = model.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        logits = loaded(input_ids=tokens).logits
        tower = loaded.model.visual(torch.randn(16, 1176), torch.tensor([[1, 4, 4]]))
    assert logits.isfinite().all()
    # Neither nothing nor an explosion: the head sees normed values and keeps their size.
    assert 0.1 < logits.std() < 10
    features = tower.pooler_output if hasattr(tower, "pooler_output") else tower
    assert torch.as_tensor(features[0] if isinstance(features, tuple) else features).isfinite().all()


def test_values_have_the_promised_scales() -> None:
    values = RandomValues(0, "fp32")

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.concatenate([chunk.view(np.float32) for chunk in values.chunks(name, shape)])

    weight = read("model.layers.0.mlp.up_proj.weight", (3000, 2500))
    assert weight.size == 3000 * 2500
    assert weight.std() == pytest.approx(2500**-0.5, rel=1e-2)
    assert abs(weight.mean()) < 1e-4
    # Longer than the block that it is cut from, yet no row comes twice.
    rows = weight.reshape(3000, 2500)
    assert len({row.tobytes() for row in rows}) == 3000
    assert np.linalg.matrix_rank(rows[:600]) == 600
    assert read("model.norm.weight", (5000,)).mean() == pytest.approx(1.0, abs=0.01)
    assert abs(read("model.layers.0.self_attn.q_proj.bias", (5000,))).max() < 0.2
    assert not np.array_equal(weight[:100], read("model.layers.1.mlp.up_proj.weight", (3000, 2500))[:100])


def test_fewer_layers(tmp_path: Path) -> None:
    config = small_config()
    before = copy.deepcopy(config)
    write_random_checkpoint(config, tmp_path / "model", layers=1)
    assert config == before
    assert {name.split(".")[2] for name in stored(tmp_path / "model") if ".layers." in name} == {"0"}
    for layers in (0, 4):
        with pytest.raises(UsageError, match=f"3 layers, so --layers {layers}"):
            write_random_checkpoint(config, tmp_path / "other", layers=layers)
    assert os.listdir(tmp_path) == ["model"]


def test_a_complete_checkpoint_is_kept_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_random_checkpoint(small_config(), folder)
    assert is_random_checkpoint(folder)
    weights = folder / "model.safetensors"
    inode, content = weights.stat().st_ino, weights.read_bytes()
    write_random_checkpoint(small_config(), folder)
    assert weights.stat().st_ino == inode
    weights.write_bytes(content[:-1])
    write_random_checkpoint(small_config(), folder)
    assert weights.read_bytes() == content
    write_random_checkpoint(small_config(), folder, dtype="fp16")
    with safe_open(weights, "pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.float16


def test_real_weights_are_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(UsageError, match="not overwritten"):
        write_random_checkpoint(small_config(), folder)
    assert hashes(folder).keys() == {"model.safetensors"}


def test_a_small_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=100_000))
    with pytest.raises(UsageError, match=r"needs 0\.0 GB, but .* has 0\.0 GB free"):
        write_random_checkpoint(small_config(), tmp_path / "deep" / "model")
    assert os.listdir(tmp_path) == []


def test_nothing_half_written_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_tokenizer", fail)
    with pytest.raises(OSError, match="No space"):
        write_random_checkpoint(small_config(), tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM is not supported"),
        ({"vocab_size": 200}, "vocabulary of 200 has no room"),
        ({"vision_start_token_id": 301}, "ids of their own"),
        ({"hidden_size": None}, "config.json"),
    ],
)
def test_configs_that_make_no_sense(change: Config, error: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=error):
        write_random_checkpoint(small_config() | change, tmp_path / "model")


def test_unknown_dtype() -> None:
    with pytest.raises(UsageError, match=r"'int4'.*bf16, fp16, fp32"):
        parse_random_dtype("int4")


def test_it_is_exported_and_answers(tmp_path: Path) -> None:
    """Through the same code as a real checkpoint, down to the words."""
    write_random_checkpoint(small_config(), tmp_path / "model", pixel_limits=(3136, 50176))
    card = card_of_folder(tmp_path / "model")
    assert (card.min_pixels, card.max_pixels) == (3136, 50176)
    export_model(tmp_path / "model", card, tmp_path / "export", PRESETS["int4"])
    build_ort_engine(tmp_path / "export", tmp_path / "engine")
    agent = Agent.load(tmp_path / "engine")
    screen = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8))
    reply = agent.act(screen, "Click.", SamplingParameters(max_new_tokens=12))
    assert reply.text
    assert reply.timings.generated_tokens == 12
