# SPDX-License-Identifier: Apache-2.0
"""The tiny random model as engines with packed caches. Its keys have biases many times larger than the rest,
as Qwen2's have: where they are not taken out first, nothing is left of the keys."""

import json
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from engine_runs import PROMPT, random_embeds
from PIL import Image
from safetensors.torch import load_file, save_file

from starkv.calibration.kv_packing import make_packing
from starkv.calibration.kv_statistics import KvStatistics, gather_statistics
from starkv.calibration.prompts import GuiPrompt
from starkv.export.build.pack import AttentionWeights, attention_weights, describe_packing, pack_ort_engine
from starkv.kv_packing.file import Packing
from starkv.kv_packing.options import PackingOptions
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.methods.rows import PromptRows
from starkv.runtime.agent import Agent
from starkv.runtime.engines.base import Engine, Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.kv.buffers import Arena, Pool
from starkv.runtime.kv.codecs import open_codec
from starkv.runtime.kv.low_rank import LowRankKv
from starkv.runtime.kv.packed import KvCodec
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.tokenizer import ChatTokenizer

BIG_BIAS = 80.0
"""Of the channels of keys that have a large one; the rest of a key lies around 1."""
EMBEDDING_DEVIATION = 0.08
"""Of the tiny model's embedding."""
ROWS = 200
"""Of pools with room for a prompt and a long reply."""
VARIANTS = {
    "int8": PackingOptions("int8"),
    "int4": PackingOptions("int4"),
    "rank 1": PackingOptions("none", 1.0),
    "rank 1 int8": PackingOptions("int8", 1.0),
    "rank 0.5": PackingOptions("none", 0.5),
    "rank 0.5 int8": PackingOptions("int8", 0.5),
    "rank 0.5 int4": PackingOptions("int4", 0.5),
}
WHOLE = KvPolicy()
EVICTED = KvPolicy(STAR_KV, Budget(0.5))
QUANTIZED = ("int8", "int4")
LOW_RANK = tuple(name for name in VARIANTS if name not in QUANTIZED)


def with_big_biases(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint and give a few channels of every layer's keys large biases."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    random = np.random.default_rng(5)
    for name, weight in weights.items():
        if name.endswith("k_proj.bias") and "visual" not in name:
            for channel in random.choice(weight.numel(), 6, replace=False):
                weight[channel] = BIG_BIAS * random.choice([-1.0, 1.0])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def calibration_prompts(count: int = 8) -> list[GuiPrompt]:
    """Noisy screens with instructions that share no beginning."""
    prompts = []
    for seed in range(count):
        random = np.random.default_rng([7, seed])
        pixels = random.integers(0, 256, (150, 200, 3), np.uint8)
        letters = "".join(random.choice(list("abcdefghijklmnop 0123456789"), 60))
        prompts.append(GuiPrompt(Image.fromarray(pixels), letters, reply=letters[::-1]))
    return prompts


def write_prompts(folder: Path, count: int = 8) -> Path:
    """Those prompts as files."""
    lines = []
    for number, prompt in enumerate(calibration_prompts(count)):
        prompt.image.save(folder / f"{number}.png")
        line = {"image": f"{number}.png", "prompt": prompt.instruction, "reply": prompt.reply}
        lines.append(json.dumps(line))
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


@dataclass
class PackedEngines:
    """One plain engine and those that are packed of it, each made once."""

    plain: Path
    folder: Path
    _agents: dict[str, Agent] = field(default_factory=dict)

    @cached_property
    def weights(self) -> AttentionWeights:
        return attention_weights(self.plain)

    @cached_property
    def statistics(self) -> KvStatistics:
        tokenizer = ChatTokenizer.from_directory(self.plain)
        return gather_statistics(self.exact.engine, tokenizer, self.weights.biases, calibration_prompts())

    @cached_property
    def exact(self) -> Agent:
        """The plain engine."""
        return Agent.load(self.plain, threads=1)

    def packing(self, variant: str) -> Packing:
        return make_packing(VARIANTS[variant], self.statistics, self.weights.biases, self.weights.outputs)

    def directory(self, variant: str) -> Path:
        """An engine that packs so; tests must not change its files."""
        out = self.folder / variant.replace(" ", "-")
        if not out.exists():
            packing, options = self.packing(variant), VARIANTS[variant]
            description = describe_packing(packing, options, self.statistics.tokens)
            pack_ort_engine(self.plain, out, packing, description, link=True)
        return out

    def agent(self, variant: str) -> Agent:
        if variant not in self._agents:
            self._agents[variant] = Agent.load(self.directory(variant), threads=1)
        return self._agents[variant]

    def engine(self, variant: str) -> OrtEngine:
        engine = self.agent(variant).engine
        assert isinstance(engine, OrtEngine)
        return engine


def rope(engine: Engine, rows: int, start: int = 0) -> Rope:
    """Tables of positions whose t, h and w differ."""
    row = np.arange(start, start + rows)
    return Rope.at(np.stack([row, row // 3 + 5, row % 7 + 2]), engine.manifest.text)


def tokens(rows: int, seed: int) -> np.ndarray:
    """Random embeddings as large as those that calibration saw."""
    return EMBEDDING_DEVIATION * random_embeds(rows, seed)


def prefilled(engine: Engine, rows: int, seed: int = 0) -> Arena:
    """An arena with so many random rows."""
    arena = engine.new_arena(rows)
    engine.prefill(arena, tokens(rows, seed), rope(engine, rows))
    return arena


def placed(
    engine: Engine, pool: Pool, prompt: PromptRows = PROMPT, policy: KvPolicy = WHOLE, seed: int = 0
) -> int:
    """Prefill a prompt and compress it into the pool; returns its handle."""
    handle = pool.acquire()
    engine.compress(prefilled(engine, prompt.length, seed), pool, handle, prompt, policy)
    return handle


def decoded(
    engine: Engine, pool: Pool, steps: int, start: int = PROMPT.length, seed: int = 100
) -> np.ndarray:
    """Logits ``[steps, batch, vocab]`` of random tokens behind what the pool holds."""
    batch, logits = pool.active, []
    for step in range(steps):
        at = rope(engine, 1, start + step).positions
        assert at is not None
        table = Rope.at(np.repeat(np.moveaxis(at, -1, 0), batch, 1), engine.manifest.text)
        embeds = np.concatenate([tokens(1, seed + step + 1000 * slot) for slot in range(batch)])
        logits.append(engine.decode(pool, embeds, table))
    return np.stack(logits)


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Error relative to how far logits lie apart."""
    spread = expected - expected.mean(-1, keepdims=True)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(spread))


def codec_of(engine: OrtEngine, packed: PackedEngines, variant: str) -> KvCodec:
    codec = open_codec(packed.directory(variant), engine.manifest)
    assert codec is not None
    return codec


def pool_with(engine: Engine, policy: KvPolicy = WHOLE, packed: bool = True, rows: int = ROWS) -> Pool:
    pool = engine.new_pool(1, rows, policy.method, packed)
    placed(engine, pool, policy=policy)
    return pool


def unpacked(engine: OrtEngine, codec: KvCodec, pool: Pool) -> Pool:
    """A float pool with what a packed one stands for, its raw tail as it is."""
    floats = engine.new_pool(1, ROWS)
    floats.acquire()
    floats.kv.load(0, codec.unpack(pool.kv.park(0)))
    if isinstance(pool.kv, LowRankKv):
        for layer, recent in enumerate(pool.kv.tail_lengths[:, 0]):
            last = slice(pool.kv.lengths[layer, 0] - recent, pool.kv.lengths[layer, 0])
            floats.host_kv.keys[layer, 0, :, last] = pool.kv.tail_keys[layer, 0, :, :recent]
            floats.host_kv.values[layer, 0, :, last] = pool.kv.tail_values[layer, 0, :, :recent]
    return floats
