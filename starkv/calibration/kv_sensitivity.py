# SPDX-License-Identifier: Apache-2.0
"""How much a model's output suffers when one layer's keys or values lose rank.

Energies of different layers can't be compared: what one layer hardly notices changes another's choice of a
row. So each layer's keys, and each layer's values, are cut on their own, and the logits of the reply tell.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from starkv.calibration.kv_statistics import lay_out
from starkv.calibration.prompts import GuiPrompt
from starkv.export.progress import NoProgress, Progress
from starkv.lowrank.factor import Decomposition
from starkv.lowrank.layer import LowRankLayer
from starkv.lowrank.rotary import Rotary
from starkv.runtime.engines.base import Engine, Floats, Rope
from starkv.runtime.kv.codecs import rotary_of
from starkv.runtime.kv.packed import head_major
from starkv.runtime.kv.parked import ParkedRows
from starkv.runtime.preprocess.tokenizer import ChatTokenizer

PROMPTS = 4
"""That are asked: a large model decodes few tokens a second on a processor."""
REPLY_TOKENS = 4
"""Of each."""


@dataclass(frozen=True)
class Sensitivity:
    """Squared error of the logits per energy that is cut off."""

    keys: float
    values: float


@dataclass(frozen=True)
class LayerFactors:
    """A layer before its ranks are settled."""

    keys: tuple[Decomposition, ...]
    values: Decomposition
    key_bias: NDArray[np.float64]
    value_bias: NDArray[np.float64]

    def truncated(self, key_ranks: Sequence[int], value_rank: int) -> LowRankLayer:
        """The layer with these ranks."""
        keys = tuple(each.truncated(rank) for each, rank in zip(self.keys, key_ranks, strict=True))
        return LowRankLayer(keys, self.values.truncated(value_rank), self.key_bias, self.value_bias)


def measure_sensitivities(
    engine: Engine,
    tokenizer: ChatTokenizer,
    layers: Sequence[LayerFactors],
    share: float,
    prompts: Sequence[GuiPrompt],
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """Cut every layer's keys and values to a share of their rank, one after the other.

    Args:
        engine: exact, with keys and values in host memory.
        tokenizer: the engine's.
        layers: factors of full rank.
        share: of full rank that is left.
        prompts: with replies; the first ``PROMPTS`` are used.
        progress: told of every prompt.
    """
    rotary = rotary_of(engine.manifest.text)
    errors = np.zeros((len(layers), 2))
    progress = progress or NoProgress()
    progress.start("sensitivity", len(prompts[:PROMPTS]))
    for number, prompt in enumerate(prompts[:PROMPTS]):
        reply = _Reply.prefilled(engine, tokenizer, prompt)
        exact = reply.logits(engine, reply.rows)
        for layer, factors in enumerate(layers):
            cut = _cut(factors, share)
            for kind, rows in enumerate(_truncated(reply.rows, layer, cut, rotary)):
                errors[layer, kind] += np.square(reply.logits(engine, rows) - exact).mean()
        progress.advance(f"prompt {number}")
    return [
        Sensitivity(keys / max(lost.keys, 1e-30), values / max(lost.values, 1e-30))
        for (keys, values), lost in zip(errors, (_lost(factors, share) for factors in layers), strict=True)
    ]


def _cut(factors: LayerFactors, share: float) -> LowRankLayer:
    ranks = [max(1, round(share * len(each.energies))) for each in (*factors.keys, factors.values)]
    return factors.truncated(ranks[:-1], ranks[-1])


def _lost(factors: LayerFactors, share: float) -> Sensitivity:
    """Energies that are cut off."""
    keys, values = (
        sum(float(each.energies[max(1, round(share * len(each.energies))) :].sum()) for each in part)
        for part in (factors.keys, (factors.values,))
    )
    return Sensitivity(keys, values)


def _truncated(rows: ParkedRows, layer: int, factors: LowRankLayer, rotary: Rotary) -> Iterator[ParkedRows]:
    """The rows with one layer's keys cut, then with its values cut."""
    cosines, sines = rotary.tables(rows.positions[layer])
    latents = factors.key_latents(rows.keys[layer].transpose(1, 0, 2), cosines, sines)
    keys = head_major(factors.lifted_keys(latents, cosines, sines))
    yield replace(rows, keys=(*rows.keys[:layer], keys, *rows.keys[layer + 1 :]))
    flat = factors.values.lift(factors.value_latents(rows.values[layer].transpose(1, 0, 2)))
    lifted = flat.reshape(len(flat), *factors.value_bias.shape) + factors.value_bias
    yield replace(rows, values=(*rows.values[:layer], head_major(lifted), *rows.values[layer + 1 :]))


@dataclass(frozen=True)
class _Reply:
    """A prefilled prompt, and the first tokens of its reply."""

    rows: ParkedRows
    embeds: Floats
    rope: Rope

    @classmethod
    def prefilled(cls, engine: Engine, tokenizer: ChatTokenizer, prompt: GuiPrompt) -> "_Reply":
        sequence = lay_out(engine, tokenizer, prompt)
        start = min(sequence.prompt_tokens, len(sequence.ids) - 1)
        arena = engine.new_arena(start)
        engine.prefill(arena, sequence.embeds[:start], sequence.rope.part(slice(start)))
        said = slice(start, start + REPLY_TOKENS)
        return cls(arena.kv.park(0), sequence.embeds[said], sequence.rope.part(said))

    def logits(self, engine: Engine, rows: ParkedRows) -> Floats:
        """``[tokens, vocab]``, each reply token's mean taken out, behind these rows."""
        pool = engine.new_pool(1, int(rows.lengths.max()) + len(self.embeds))
        pool.acquire()
        pool.kv.load(0, rows)
        steps = [
            engine.decode(pool, self.embeds[index : index + 1], self.rope.part(slice(index, index + 1)))[0]
            for index in range(len(self.embeds))
        ]
        logits = np.stack(steps)
        centred: Floats = logits - logits.mean(-1, keepdims=True)
        return centred
