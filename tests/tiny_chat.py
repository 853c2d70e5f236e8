# SPDX-License-Identifier: Apache-2.0
"""Makes the tiny random model able to chat: a tokenizer, a template, and weights that recite a click."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_model import VOCAB
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

# Ids 0 to 285 are bytes and merges; the image tokens are where the model's config has them.
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|spare|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
]
RECITED = ["Action: click(start_box='(", "56,28", ")')"]
"""Tokens that the reciting model says, each after the one before, whatever it sees."""
END_OF_TEXT = 288
IMAGE_PAD = 290
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def tiny_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL) - 6,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["user assistant click the red star on the blue button"] * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens(RECITED)
    assert tokenizer.token_to_id("<|im_end|>") == END_OF_TEXT
    assert tokenizer.token_to_id("<|image_pad|>") == IMAGE_PAD
    return tokenizer


def write_chat_files(folder: Path) -> None:
    """Give a checkpoint of ``make_tiny_model`` a tokenizer, a template and pixel limits."""
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END_OF_TEXT}))
    limits = {"min_pixels": 3136, "max_pixels": 50176}
    (folder / "preprocessor_config.json").write_text(json.dumps(limits))


def make_reciting_checkpoint(source: Path, folder: Path) -> None:
    """Copy a chat checkpoint and let it say ``RECITED`` and stop, on every image and prompt.

    Its blocks add nothing to the last token's embedding, which is what the head of the successor looks for.
    """
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and "visual" not in name:
            weight.zero_()
    tokenizer = tiny_tokenizer()
    newline = tokenizer.encode("\n").ids[-1]
    chain = [newline, *(tokenizer.token_to_id(token) for token in RECITED), END_OF_TEXT]
    text = {name.split(".", 1)[1]: weight for name, weight in weights.items() if "visual" not in name}
    embedding, head = text["embed_tokens.weight"], text["weight"]
    text["norm.weight"].fill_(1.0)
    for before, after in pairwise(chain):
        head[after] = 20 * torch.nn.functional.normalize(embedding[before], dim=0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
