# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint: values, names, and one clear line for everything that can be wrong with it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from starkv.errors import CheckpointError
from starkv.export.checkpoint import Checkpoint, canonical_name
from starkv.export.models.qwen2_5_vl_config import parse_config

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "vision_config": {"hidden_size": 64, "num_heads": 2},
}
TENSORS = {
    "visual.merger.ln_q.weight": np.arange(6, dtype=np.float32),
    "model.layers.0.mlp.up_proj.weight": np.arange(-12, 12).reshape(6, 4).astype(ml_dtypes.bfloat16),
    "model.embed_tokens.weight": np.linspace(-2, 2, 10).reshape(5, 2).astype(np.float16),
}


def make_folder(folder: Path, config: dict[str, Any] = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(TENSORS, folder / "model.safetensors")
    return folder


def shard(folder: Path) -> Path:
    """Split the single file into two shards with an index; returns the second shard."""
    names = sorted(TENSORS)
    (folder / "model.safetensors").unlink()
    files = {"one.safetensors": names[:1], "two.safetensors": names[1:]}
    for file, held in files.items():
        save_file({name: TENSORS[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / "two.safetensors"


def message_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_values_under_todays_names(tmp_path: Path, sharded: bool) -> None:
    folder = make_folder(tmp_path)
    if sharded:
        shard(folder)
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.names() == [
            "model.language_model.embed_tokens.weight",
            "model.language_model.layers.0.mlp.up_proj.weight",
            "model.visual.merger.ln_q.weight",
        ]
        for name, expected in TENSORS.items():
            array = checkpoint.array(canonical_name(name))
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, expected.astype(np.float32))
        up = "model.language_model.layers.0.mlp.up_proj.weight"
        assert checkpoint.stored_dtype(up) == "BF16"
        np.testing.assert_array_equal(checkpoint.rows(up, 2, 4), np.arange(-4, 4).reshape(2, 4))
        chunks = dict(checkpoint.row_chunks(up, 4))
        assert [rows.shape for rows in chunks.values()] == [(4, 4), (2, 4)]
        np.testing.assert_array_equal(np.concatenate(list(chunks.values())), checkpoint.array(up))
        assert checkpoint.parameters == 6 + 24 + 10


def test_arrays_outlive_the_checkpoint(tmp_path: Path) -> None:
    with Checkpoint(make_folder(tmp_path)) as checkpoint:
        array = checkpoint.array("model.visual.merger.ln_q.weight")
    np.testing.assert_array_equal(array, np.arange(6))


@pytest.mark.parametrize("name", ["model.language_model.norm.weight", "model.visual.x", "lm_head.weight"])
def test_todays_names_stay(name: str) -> None:
    assert canonical_name(name) == name


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    with (
        Checkpoint(make_folder(tmp_path)) as checkpoint,
        pytest.raises(CheckpointError, match=r"tensor lm_head\.weight is missing"),
    ):
        checkpoint.array("lm_head.weight")


def test_missing_folder(tmp_path: Path) -> None:
    assert message_of(tmp_path / "nowhere").startswith(
        f"checkpoint folder {tmp_path / 'nowhere'} does not exist"
    )


def test_missing_config(tmp_path: Path) -> None:
    (make_folder(tmp_path) / "config.json").unlink()
    assert "config.json is missing" in message_of(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[]"])
def test_unreadable_config(tmp_path: Path, content: bytes) -> None:
    (make_folder(tmp_path) / "config.json").write_bytes(content)
    assert re.search(r"config\.json (is not readable JSON|holds no JSON object)", message_of(tmp_path))


def test_wrong_architecture_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    make_folder(tmp_path, {"architectures": ["LlamaForCausalLM"]})
    message = message_of(tmp_path)
    assert "architecture LlamaForCausalLM is not supported" in message
    assert "starkv knows Qwen2_5_VLForConditionalGeneration" in message


def test_quantization_that_starkv_cannot_read(tmp_path: Path) -> None:
    make_folder(tmp_path, CONFIG | {"quantization_config": {"quant_method": "fp8"}})
    assert "weights quantized with fp8 are not supported; starkv reads AWQ" in message_of(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (make_folder(tmp_path) / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in message_of(tmp_path)


def test_shard_named_in_the_index_is_missing(tmp_path: Path) -> None:
    shard(make_folder(tmp_path)).unlink()
    assert "two.safetensors is missing although model.safetensors.index.json names it" in message_of(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{}"])
def test_unreadable_index(tmp_path: Path, content: str) -> None:
    shard(make_folder(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "is no readable index of safetensors shards" in message_of(tmp_path)


def test_truncated_shard(tmp_path: Path) -> None:
    path = make_folder(tmp_path) / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 3)
    message = message_of(tmp_path)
    assert f"model.safetensors is truncated: it has {size - 3} bytes, its header asks for {size}" in message


def test_shard_truncated_inside_its_header(tmp_path: Path) -> None:
    os.truncate(make_folder(tmp_path) / "model.safetensors", 40)
    assert "model.safetensors is truncated inside its header" in message_of(tmp_path)


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>error 404</html>",
        header("not json"),
        header("[1, 2]"),
        header('{"a": 1}'),
        header('{"a": {"dtype": "F32", "shape": [1]}}'),
        header('{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}') + bytes(4),
        header('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}') + bytes(4),
        header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}'),
        header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}') + bytes(4),
        header('{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}') + bytes(4),
    ],
)
def test_garbage_instead_of_a_header(tmp_path: Path, content: bytes) -> None:
    (make_folder(tmp_path) / "model.safetensors").write_bytes(content)
    assert "is no safetensors file (its header is damaged)" in message_of(tmp_path)


def test_size_that_contradicts_the_shape(tmp_path: Path) -> None:
    content = header('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}') + bytes(4)
    (make_folder(tmp_path) / "model.safetensors").write_bytes(content)
    assert "tensor a has the wrong size for its shape" in message_of(tmp_path)


def test_dtype_that_is_no_weight(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3, np.int32)}, make_folder(tmp_path) / "model.safetensors")
    assert "tensor a has dtype I32; starkv reads F32, F16, BF16 only" in message_of(tmp_path)


def test_old_and_new_config_dialects_agree(tmp_path: Path) -> None:
    old = parse_config(CONFIG, tmp_path)
    text = {key: CONFIG[key] for key in CONFIG if key not in ("vision_config", "rope_theta", "rope_scaling")}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    new = parse_config(
        {
            "text_config": text | {"rope_parameters": rope},
            "vision_config": CONFIG["vision_config"] | {"rope_parameters": {"rope_theta": 10000.0}},
        },
        tmp_path,
    )
    assert old == new
    assert old.text.rope_theta == 1e6
    assert old.vision.full_attention_blocks == [7, 15, 23, 31]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window is on"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, not silu"),
        ({"num_hidden_layers": "two"}, "field layers: Input should be a valid integer"),
        ({"hidden_size": "big"}, "a size is no number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads does not divide"),
        ({"rope_scaling": {"mrope_section": [8, 8, 8]}}, "mrope_section does not add up"),
        ({"vision_config": {"hidden_size": 64, "num_heads": 3}}, "vision num_heads does not divide"),
        ({"vision_config": {"hidden_size": 64, "window_size": 100}}, "window_size is no multiple"),
    ],
)
def test_config_that_no_graph_fits_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config(CONFIG | change, tmp_path / "config.json")


def test_missing_config_field_is_named(tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "rms_norm_eps"}
    with pytest.raises(CheckpointError, match=r"config\.json: field rms_norm_eps is missing"):
        parse_config(config, tmp_path / "config.json")


def test_export_room_needs_no_torch() -> None:
    """Only the tracing route may import torch or transformers."""
    program = (
        "import sys; import starkv.export.export_model, starkv.export.build.ort; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
