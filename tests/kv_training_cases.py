# SPDX-License-Identifier: Apache-2.0
"""Sequences of random embeddings for the tiny model, as training takes them, and what is known of it."""

import numpy as np
import torch
from conftest import TinyModel
from tiny_model import HIDDEN

from starkv.calibration.kv_packing import layer_factors
from starkv.calibration.kv_sensitivity import LayerFactors
from starkv.calibration.kv_statistics import KvStatistics
from starkv.kv_training.decoder import exact_pass
from starkv.kv_training.lessons import Lesson, Rows
from starkv.kv_training.pinned import Biases
from starkv.kv_training.sequences import TrainingSequence
from starkv.lowrank.statistics import StatisticsAccumulator
from starkv.manifest import read_manifest
from starkv.runtime.engines.torch_decoder import TorchDecoder
from starkv.runtime.preprocess.positions import rope_tables

RECENT = 5
"""Rows that stay exact; fewer than at run time, so that short sequences have packed ones."""


def tiny_decoder(tiny: TinyModel) -> TorchDecoder:
    text = read_manifest(tiny.engine).text
    weights = {name: weight.detach() for name, weight in tiny.model.named_parameters()}
    return TorchDecoder(text, tiny.model.config.text_config.rms_norm_eps, weights)


def make_sequence(decoder: TorchDecoder, seed: int, length: int = 40, reply: int = 28) -> TrainingSequence:
    """Embeddings near a subspace, so that low ranks can do something; positions t, h and w differ."""
    random = np.random.default_rng([7, seed])
    basis = np.random.default_rng(7).standard_normal((24, HIDDEN))
    embeds = random.standard_normal((length, 24)) @ basis / 5 + 0.05 * random.standard_normal(
        (length, HIDDEN)
    )
    row = np.arange(length)
    cosines, sines = rope_tables(np.stack([row, row // 3 + 5, row % 7 + 2]), decoder.shape)
    rows = Rows(*(torch.from_numpy(table.astype(np.float32)) for table in (embeds, cosines[0], sines[0])))
    counted = torch.ones(length, dtype=torch.bool)
    counted[-1] = False
    counted[reply + 2] = False
    return TrainingSequence(rows, counted, earliest=reply - 8, reply=reply)


def make_sequences(decoder: TorchDecoder, count: int, first: int = 0) -> list[TrainingSequence]:
    """Of different lengths."""
    return [
        make_sequence(decoder, seed, 36 + seed % 3 * 4, 24 + seed % 4) for seed in range(first, first + count)
    ]


def lessons_of(decoder: TorchDecoder, sequences: list[TrainingSequence]) -> list[Lesson]:
    """One for each sequence, beginning at its reply."""
    return [
        Lesson(sequence.rows, exact_pass(decoder, sequence.rows), sequence.reply, sequence.counted)
        for sequence in sequences
    ]


def biases_of(decoder: TorchDecoder) -> list[Biases]:
    size = (decoder.shape.kv_heads, decoder.shape.head_dim)

    def bias(layer: int, kind: str) -> np.ndarray:
        return decoder.weight(f"layers.{layer}.self_attn.{kind}_proj.bias").numpy().reshape(size)

    return [(bias(layer, "k"), bias(layer, "v")) for layer in range(decoder.shape.layers)]


def statistics_of(decoder: TorchDecoder, sequences: list[TrainingSequence]) -> KvStatistics:
    """Of the exact rows of sequences; queries count as long as they are wide."""
    shape = decoder.shape
    accumulators = [StatisticsAccumulator(shape.kv_heads, shape.head_dim) for _ in range(shape.layers)]
    for sequence in sequences:
        exact = exact_pass(decoder, sequence.rows)
        cosines, sines = (table.numpy() for table in (sequence.rows.cosines, sequence.rows.sines))
        for layer, accumulator in enumerate(accumulators):
            keys, values = (
                outputs[layer].numpy().reshape(sequence.length, shape.kv_heads, shape.head_dim)
                for outputs in (exact.keys, exact.values)
            )
            accumulator.add(keys, values, cosines, sines)
            accumulator.add_queries(np.ones((1, shape.heads, shape.head_dim)))
    layers = tuple(accumulator.finish() for accumulator in accumulators)
    return KvStatistics(layers, layers[0].tokens)


def output_weights_of(decoder: TorchDecoder) -> list[np.ndarray]:
    layers = range(decoder.shape.layers)
    return [decoder.weight(f"layers.{layer}.self_attn.o_proj.weight").numpy() for layer in layers]


def factors_of(decoder: TorchDecoder, sequences: list[TrainingSequence]) -> list[LayerFactors]:
    """Of full rank."""
    statistics = statistics_of(decoder, sequences)
    return layer_factors(statistics, biases_of(decoder), output_weights_of(decoder))
