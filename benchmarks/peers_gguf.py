# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint's text decoder as GGUF with Q4_0 weights, the head included.

    python peers_gguf.py CHECKPOINT SIZE OUT.gguf

Runs in the peers' environment: it needs numpy and gguf. Memory holds one tensor's codes and a few chunks of
weights.
"""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from peers_shapes import MAX_POSITIONS, NORM_EPSILON, ROPE_THETA, SIZES, TextSize

_CHUNK_NUMBERS = 8_000_000
_FILE_TYPE_Q4_0 = 2
_BLOCK, _BLOCK_BYTES = 32, 18

_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a bfloat16 tensor lies."""

    path: Path
    offset: int
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Tensors of a checkpoint folder by name, without the parts of names in which spellings differ.

    Raises:
        ValueError: a tensor is not bfloat16.
    """
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{path}: {name} is {entry['dtype']}, not BF16")
            plain = name.replace("language_model.", "")
            found[plain] = StoredTensor(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
    return found


def read_rows(tensor: StoredTensor, first: int, count: int) -> np.ndarray:
    """Rows of a tensor as float32."""
    width = int(np.prod(tensor.shape[1:], dtype=np.int64))
    stored = np.memmap(tensor.path, np.uint16, "r", tensor.offset + 2 * first * width, (count, width))
    return (stored.astype(np.uint32) << 16).view(np.float32).reshape(count, *tensor.shape[1:])


def _quantized_rows(job: tuple[StoredTensor, int, int]) -> np.ndarray:
    return gguf.quants.quantize(read_rows(*job), Type.Q4_0)


def _jobs(tensor: StoredTensor) -> Iterator[tuple[StoredTensor, int, int]]:
    rows = max(1, _CHUNK_NUMBERS // tensor.shape[1])
    for first in range(0, tensor.shape[0], rows):
        yield tensor, first, min(rows, tensor.shape[0] - first)


def _names(size: TextSize) -> dict[str, str]:
    """Name in GGUF → name in the checkpoint."""
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if not size.tied:
        names["output.weight"] = "lm_head.weight"
    for layer in range(size.layers):
        for stored, name in _LAYER_NAMES.items():
            names[f"blk.{layer}.{name}"] = f"model.layers.{layer}.{stored}"
    return names


def _writer(size: TextSize, path: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(size.layers)
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(size.hidden)
    writer.add_feed_forward_length(size.intermediate)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_file_type(_FILE_TYPE_Q4_0)
    # Token ids go in and come out, so the texts don't matter; a vocabulary without them is refused.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{index}" for index in range(size.vocab)])
    writer.add_token_types([gguf.TokenType.NORMAL] * size.vocab)
    writer.add_token_merges(["t 0", "t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    return writer


def write_gguf(folder: Path, size: TextSize, path: Path) -> None:
    """Write the text decoder of the checkpoint in ``folder`` to ``path``."""
    tensors = stored_tensors(folder)
    names = _names(size)
    partial = path.with_suffix(".partial")
    writer = _writer(size, partial)
    for name, stored in names.items():
        shape = tensors[stored].shape
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0], Type.F32)
        else:
            packed = (shape[0], shape[1] // _BLOCK * _BLOCK_BYTES)
            writer.add_tensor_info(name, packed, np.dtype(np.uint8), packed[0] * packed[1], Type.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with ProcessPoolExecutor() as pool:
        for stored in names.values():
            tensor = tensors[stored]
            if len(tensor.shape) == 1:
                data = read_rows(tensor, 0, tensor.shape[0])
            else:
                data = np.concatenate(list(pool.map(_quantized_rows, _jobs(tensor))))
            writer.write_tensor_data(data)
    writer.close()
    partial.rename(path)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), SIZES[sys.argv[2]], Path(sys.argv[3]))
