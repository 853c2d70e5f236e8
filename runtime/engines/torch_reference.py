# SPDX-License-Identifier: Apache-2.0
"""The reference engine: a plain PyTorch decoder in float32, and every compression method there is.

Images, embeddings and the manifest come from an engine directory, so that a difference between this engine and
that one is the decoder's and the method's alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from starkv.errors import CheckpointError, EngineError, UsageError
from starkv.host import cpu_model
from starkv.manifest import Manifest, TextShape
from starkv.methods import star_kv
from starkv.methods.budget import window_rows
from starkv.methods.prefill import Prefill
from starkv.methods.rows import NO_FRAME, PromptRows, official_rows
from starkv.methods.select import Kept
from starkv.methods.star_kv_plan import StarKVProgress, layer_limits, plan_step
from starkv.runtime.engines.base import EngineInfo, Floats, Rope, check_kv_method
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.torch_decoder import TorchCache, TorchDecoder, decoder_name, decoder_weights
from starkv.runtime.kv.buffers import Arena, KvBuffers, Pool
from starkv.runtime.kv.policy import FULL, STAR_KV, Compressed, KvPolicy, StarKVMemory
from starkv.runtime.preprocess.image import ImageInputs


@dataclass
class ReferenceArena(Arena):
    """Also remembers every query: some methods ask how much attention each row got from all rows."""

    queries: NDArray[np.float32]
    """``[L, 1, H, C, D]`` after rotation."""

    @classmethod
    def allocate(cls, text: TextShape, rows: int) -> "ReferenceArena":
        plain = Arena.allocate(text, rows)
        queries = np.zeros((text.layers, 1, text.heads, plain.kv.capacity, text.head_dim), np.float32)
        return cls(plain.kv, plain.q_window, plain.hidden_norm, queries)


class TorchReferenceEngine:
    """Runs a checkpoint's decoder in PyTorch beside an ONNX Runtime engine of the same model."""

    def __init__(self, engine: OrtEngine, decoder: TorchDecoder) -> None:
        """Take the parts; see :meth:`load`."""
        self._engine, self._decoder = engine, decoder

    @classmethod
    def load(
        cls, directory: Path, checkpoint: Path, verify: bool = True, threads: int | None = None
    ) -> "TorchReferenceEngine":
        """Open an engine directory and the checkpoint that it was made from.

        Args:
            directory: the engine, for its manifest, embedding and vision graph.
            checkpoint: folder with ``config.json`` and safetensors.
            verify: compare the engine's files with their recorded hashes first.
            threads: threads of the vision graph.

        Raises:
            EngineError: the engine is damaged.
            CheckpointError: the checkpoint is damaged, or not of the engine's model.
        """
        engine = OrtEngine(directory, verify, threads)
        text = engine.manifest.text
        return cls(engine, TorchDecoder(text, _norm_epsilon(checkpoint), _read_weights(checkpoint, text)))

    @property
    def manifest(self) -> Manifest:
        return self._engine.manifest

    @property
    def info(self) -> EngineInfo:
        return replace(
            self._engine.info,
            backend="torch-reference",
            device=cpu_model(),
            kv_methods=(FULL, STAR_KV),
            threads=torch.get_num_threads(),
        )

    def embed(self, token_ids: Sequence[int]) -> Floats:
        return self._engine.embed(token_ids)

    def encode_image(self, image: ImageInputs) -> Floats:
        return self._engine.encode_image(image)

    def new_arena(self, rows: int) -> ReferenceArena:
        self._check_rows(rows)
        return ReferenceArena.allocate(self.manifest.text, rows)

    def new_pool(self, slots: int, rows: int, method: str = FULL) -> Pool:
        self._check_rows(rows)
        text = self.manifest.text
        return Pool(KvBuffers.allocate(text, slots, rows))

    def _check_rows(self, rows: int) -> None:
        limit = self.manifest.max_context
        if rows > limit:
            raise UsageError(f"{rows} KV rows are needed, but {self.manifest.name} was built for {limit} at most")

    def prefill(self, arena: Arena, embeds: Floats, rope: Rope) -> Floats:
        arena, start, total = _own(arena), int(arena.kv.lengths.max()), len(embeds)
        if not total:
            raise UsageError("a prefill needs at least one row")
        if start + total > arena.kv.capacity:
            raise UsageError(
                f"prefill of {total} rows behind {start} exceeds the arena of {arena.kv.capacity} rows"
            )
        step = self._decoder.step(
            torch.from_numpy(embeds[None]), torch.from_numpy(rope.cos), torch.from_numpy(rope.sin), _cache(arena.kv, 1)
        )
        rows, end = slice(start, start + total), start + total
        arena.queries[:, :, :, rows] = step.queries.numpy()
        arena.hidden_norm[:, :, rows] = step.hidden_norm.numpy()
        window = min(total, self.manifest.observation_window)
        arena.q_window = arena.queries[:, :, :, end - window : end]
        logits: Floats = step.logits[0].numpy()
        return logits

    def most_kept_rows(self, prompt_rows: int, policy: KvPolicy) -> int:
        check_kv_method(self.info, policy.method)
        kept = policy.kept_rows(prompt_rows)
        if policy.method == STAR_KV:
            window = window_rows(policy.star_kv.window, kept)
            plan, _ = plan_step(policy.star_kv, StarKVProgress(), NO_FRAME)
            return window + layer_limits(plan, kept, window, prompt_rows - window, 0).ceiling
        return kept

    def compress(
        self,
        arena: Arena,
        pool: Pool,
        handle: int,
        prompt: PromptRows,
        policy: KvPolicy,
        memory: StarKVMemory | None = None,
    ) -> Compressed:
        check_kv_method(self.info, policy.method)
        arena, slot, length = _own(arena), pool.slot_of(handle), int(arena.kv.lengths.max())
        if prompt.length != length:
            raise UsageError(f"the prompt has {prompt.length} rows, but {length} were prefilled")
        cache = (arena.kv.keys, arena.queries)
        if policy.method != FULL and not all(np.isfinite(part[:, :, :, :length]).all() for part in cache):
            raise EngineError("the model's keys or queries are not numbers; nothing can be scored")
        kept, scores = None, None
        if policy.method == STAR_KV:
            kept, scores, memory = self._star_kv(arena, prompt, policy, memory)
        if kept is None:
            kept = _all_rows(arena, prompt)
        _store(kept, pool, slot, policy.method)
        return Compressed(kept.rows[:, 0].numpy(), scores, memory)

    def _star_kv(
        self, arena: ReferenceArena, prompt: PromptRows, policy: KvPolicy, memory: StarKVMemory | None
    ) -> tuple[Kept | None, Floats | None, StarKVMemory]:
        """Kept rows, scores ``[L, 1, C]`` and memory; the first two are None where the prompt stays as it is."""
        config, text, kept_rows = policy.star_kv, self.manifest.text, policy.kept_rows(prompt.length)
        window = window_rows(config.window, kept_rows)
        rows = official_rows(prompt.length, prompt.spans, window) if config.is_official else prompt
        protected = rows.protected(kept_rows, window) if config.protect_rows else ()
        kept, scores, after = star_kv.compress(
            _prefill(arena, rows, window, protected),
            _state_of(memory or StarKVMemory.initial(text.layers, text.kv_heads)),
            config,
            kept_rows,
            prompt.length,
            len(protected),
        )
        return kept, None if scores is None else scores.final.numpy(), _memory_of(after)

    def decode(self, pool: Pool, embeds: Floats, rope: Rope) -> Floats:
        expected = (pool.active, self.manifest.text.hidden)
        if not pool.active or embeds.shape != expected:
            raise ValueError(f"decode got embeddings {embeds.shape} for {pool.active} sequences in use")
        if int(pool.kv.lengths[:, : pool.active].max()) >= pool.kv.capacity:
            raise UsageError(f"a sequence has filled its slot of {pool.kv.capacity} rows")
        step = self._decoder.step(
            torch.from_numpy(embeds[:, None]),
            torch.from_numpy(rope.cos),
            torch.from_numpy(rope.sin),
            _cache(pool.kv, pool.active),
        )
        logits: Floats = step.logits.numpy()
        return logits
