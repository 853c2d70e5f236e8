# SPDX-License-Identifier: Apache-2.0
"""Teacher and student: the same weights, with and without compressed rows to look back at.

As at run time: a prompt is prefilled exactly, its rows are packed but for the newest ones, and the tokens
that follow attend to the packed rows and to all rows since. So the teacher runs over the whole sequence,
without gradients, and the student over the rows from a start on, looking back at what compression leaves of
the teacher's rows.

Symbols: L layers, S rows of a sequence, G KV heads, D head dim; and of a batch: B sequences, N new rows.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from starkv.kv_training.lessons import ExactPass, Lesson, LessonBatch, Rows
from starkv.runtime.engines.torch_decoder import TorchDecoder, rotate

EXACT_BYTES = 2 << 30
"""Memory for exact passes that are kept."""


class Compression(Protocol):
    """What remains of projection outputs once they have been latents."""

    def keys(self, layer: int, outputs: Tensor) -> Tensor:
        """Rebuilt ``[..., G·D]`` of the key projection's outputs ``[..., G·D]``."""

    def values(self, layer: int, outputs: Tensor) -> Tensor:
        """Rebuilt ``[..., G·D]`` of the value projection's outputs ``[..., G·D]``."""


class Uncompressed:
    """The path switched off: the student is the teacher."""

    def keys(self, layer: int, outputs: Tensor) -> Tensor:
        return outputs

    def values(self, layer: int, outputs: Tensor) -> Tensor:
        return outputs


def exact_pass(decoder: TorchDecoder, rows: Rows) -> ExactPass:
    """Run the uncompressed model over a sequence, without gradients."""
    keys, values = [], []
    tables = rows.cosines[None], rows.sines[None]
    count = len(rows.embeds)
    visible = torch.ones(count, count, dtype=torch.bool, device=rows.embeds.device).tril()
    with torch.no_grad():
        x = rows.embeds[None].to(decoder.dtype)
        for layer in range(decoder.shape.layers):
            h, outputs = _projected(decoder, x, layer)
            keys.append(outputs[0][0])
            values.append(outputs[1][0])
            x = _layer(decoder, x, h, layer, outputs, tables, visible)
    return ExactPass(torch.stack(keys), torch.stack(values), x[0])


class ExactCache:
    """Exact passes, worked out once while there is room: the model is frozen, so they stay the same.

    Args:
        decoder: the model.
        most_bytes: what they may take together; those beyond are worked out again each time.
    """

    def __init__(self, decoder: TorchDecoder, most_bytes: int = EXACT_BYTES) -> None:
        self._decoder, self._left = decoder, most_bytes
        self._passes: dict[int, tuple[Rows, ExactPass]] = {}

    def of(self, rows: Rows) -> ExactPass:
        """The exact pass over a sequence, which is told from others by identity."""
        found = self._passes.get(id(rows))
        if found is not None:
            return found[1]
        made = exact_pass(self._decoder, rows)
        size = sum(tensor.nbytes for tensor in (made.keys, made.values, made.hidden))
        if size <= self._left:
            self._left -= size
            # With the rows, so that no others get their identity.
            self._passes[id(rows)] = (rows, made)
        return made


def teacher_logits(decoder: TorchDecoder, lessons: Sequence[Lesson]) -> Tensor:
    """``[counted rows, vocab]`` f32 of the uncompressed model, one lesson's behind the other's."""
    with torch.no_grad():
        hidden = [lesson.exact.hidden[lesson.start :][lesson.counted[lesson.start :]] for lesson in lessons]
        return decoder.logits(torch.cat(hidden))


def student_logits(
    decoder: TorchDecoder, lessons: Sequence[Lesson], recent: int, compression: Compression
) -> Tensor:
    """``[counted rows, vocab]`` f32 as of :func:`teacher_logits`, differentiable in the compression.

    Args:
        decoder: the model.
        lessons: run as one batch.
        recent: rows before each start that stay exact.
        compression: what the rows before those go through.
    """
    batch = LessonBatch.of(lessons, recent)
    x = batch.embeds.to(decoder.dtype)
    for layer in range(decoder.shape.layers):
        h, (new_keys, new_values) = _projected(decoder, x, layer)
        outputs = (
            torch.cat(
                [
                    compression.keys(layer, batch.stacked(lessons, "keys", layer, packed=True)),
                    batch.stacked(lessons, "keys", layer, packed=False),
                    new_keys,
                ],
                dim=1,
            ),
            torch.cat(
                [
                    compression.values(layer, batch.stacked(lessons, "values", layer, packed=True)),
                    batch.stacked(lessons, "values", layer, packed=False),
                    new_values,
                ],
                dim=1,
            ),
        )
        x = _layer(decoder, x, h, layer, outputs, batch.tables, batch.visible)
    return decoder.logits(x[batch.counted])


def _projected(decoder: TorchDecoder, x: Tensor, layer: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Normalised input of a layer, and its keys and values without biases, before rotation."""
    name = f"layers.{layer}"
    h = decoder.rms_norm(x, f"{name}.input_layernorm")
    keys, values = (F.linear(h, decoder.weight(f"{name}.self_attn.{kind}_proj.weight")) for kind in "kv")
    return h, (keys, values)


def _layer(
    decoder: TorchDecoder,
    x: Tensor,
    h: Tensor,
    layer: int,
    outputs: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    visible: Tensor,
) -> Tensor:
    """A layer's output ``[B, N, hidden]`` for the last N rows, which attend to ``outputs`` of all rows."""
    name, new = f"layers.{layer}.self_attn", x.shape[1]

    def heads(flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (-1, decoder.shape.head_dim)).transpose(1, 2)

    keys, values = (
        heads(flat + decoder.weight(f"{name}.{kind}_proj.bias"))
        for kind, flat in zip("kv", outputs, strict=True)
    )
    cosines, sines = tables
    queries = rotate(heads(decoder.linear(h, f"{name}.q_proj")), cosines[:, -new:], sines[:, -new:])
    keys = rotate(keys, cosines, sines)
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, enable_gqa=True)
    x = x + decoder.linear(attended.transpose(1, 2).flatten(2), f"{name}.o_proj")
    return x + decoder.mlp(decoder.rms_norm(x, f"layers.{layer}.post_attention_layernorm"), layer)
