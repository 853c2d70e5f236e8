# SPDX-License-Identifier: Apache-2.0
"""Run onnxruntime-genai's model builder on a checkpoint's text decoder in bounded memory.

    python peers_genai_build.py CHECKPOINT SIZE OUT

The builder, as it is, holds all weights in float32 at once: 30 GB for 7 billion. Two of its steps are
replaced here by others that give the same files: weights are mapped instead of read, and each is rounded as
soon as it is reached, by the builder's own quantizer with the builder's own settings. ``--stock`` leaves the
builder as it is.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization.quant_utils import QuantFormat
from onnxruntime_genai.models import builder
from peers_shapes import MAX_POSITIONS, NORM_EPSILON, ROPE_THETA, SIZES, TextSize
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def text_config(size: TextSize) -> Qwen2Config:
    """The text decoder alone, as transformers names it; its rotary tables are those of text in Qwen2.5-VL."""
    config = Qwen2Config(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=NORM_EPSILON,
        tie_word_embeddings=size.tied,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=151643,
        eos_token_id=151645,
        dtype="bfloat16",
    )
    config.architectures = ["Qwen2ForCausalLM"]
    return config


def mapped_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The text decoder's tensors, mapped from the files, under the names of ``Qwen2ForCausalLM``."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - it is no mapping
                if "visual." not in name:
                    tensors[name.replace("language_model.", "")] = stream.get_tensor(name)
    return tensors


def mapped_model(folder: Path, config: Qwen2Config) -> Qwen2ForCausalLM:
    """The model of transformers over mapped weights."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    tensors = mapped_weights(folder)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    return model


def quantize_one_by_one(self: Any) -> ir.Model:
    """Replace ``Model.to_nbits``: each MatMul with a constant weight becomes MatMulNBits, one at a time."""
    settings = self.quant_attrs
    quantizer = nbits.DefaultWeightOnlyQuantizer(
        nbits.DefaultWeightOnlyQuantConfig(
            block_size=settings["matmul_block_size"],
            is_symmetric=settings["is_symmetric"],
            accuracy_level=settings["accuracy_level"],
            quant_format=QuantFormat.QOperator,
            bits=settings["bits"],
        )
    )
    graph = self.model.graph
    for node in list(graph):
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].const_value is not None:
            _quantize_node(graph, node, quantizer)
    self.model.opset_imports["com.microsoft"] = 1
    return self.model


def _quantize_node(graph: ir.Graph, node: ir.Node, quantizer: Any) -> None:
    weight, settings = node.inputs[1], quantizer.config
    # The quantizer reads memory in row-major order whatever the strides are.
    packed, scales, _ = quantizer.qbits_block_quant(np.ascontiguousarray(weight.const_value.numpy()))
    rows, columns = weight.const_value.shape
    inputs = [node.inputs[0]]
    for suffix, array in ((f"_Q{settings.bits}", packed), ("_scales", scales)):
        name = f"{weight.name}{suffix}"
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        graph.register_initializer(value)
        inputs.append(value)
    product = ir.node(
        "MatMulNBits",
        inputs,
        {
            "K": rows,
            "N": columns,
            "bits": settings.bits,
            "block_size": settings.block_size,
            "accuracy_level": settings.accuracy_level,
        },
        domain="com.microsoft",
        name=f"{node.name}_Q{settings.bits}",
    )
    graph.insert_before(node, product)
    output, result = node.outputs[0], product.outputs[0]
    result.name, result.type, result.shape = output.name, output.type, output.shape
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    del graph.initializers[weight.name]


def build(checkpoint: Path, size: TextSize, out: Path, stock: bool) -> None:
    """Write a folder for onnxruntime-genai: int4 in blocks of 32, head too, the builder's defaults.

    Only the logits of the last row are computed, as the other systems do.
    """
    source = out.with_name(out.name + ".source")
    source.mkdir(parents=True, exist_ok=True)
    config = text_config(size)
    config.save_pretrained(source)
    for name in _TOKENIZER_FILES:
        shutil.copy(checkpoint / name, source)
    if stock:
        save_file(mapped_weights(checkpoint), source / "model.safetensors", {"format": "pt"})
    else:
        base = builder.Model
        base.load_weights = lambda self, path: mapped_model(checkpoint, config)
        base.to_nbits = quantize_one_by_one
    options = ["prune_lm_head=true"]
    cache = str(out.with_name(out.name + ".cache"))
    extra = builder.parse_extra_options("", str(source), str(out), "int4", "cpu", cache, options)
    builder.create_model("", str(source), str(out), "int4", "cpu", cache, **extra)
    shutil.rmtree(source)
    settings = json.loads((out / "genai_config.json").read_text())
    if not settings["search"]["past_present_share_buffer"]:
        raise SystemExit(
            "the builder's model copies its cache with every token: not the configuration to measure"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stock", action="store_true", help="the builder as it is, with all its memory")
    args = parser.parse_args()
    build(args.checkpoint, SIZES[args.size], args.out, args.stock)
