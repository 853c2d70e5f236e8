# SPDX-License-Identifier: Apache-2.0
"""The reference engine: a plain PyTorch decoder in float32, and every compression method there is.

Images, embeddings and the manifest come from an engine directory, so that a difference between this engine
and that one is the decoder's and the method's alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from starkv.errors import EngineError, UsageError
from starkv.host import cpu_model
from starkv.manifest import Manifest
from starkv.methods.names import FULL
from starkv.methods.stream_rows import CacheRows
from starkv.runtime.engines.base import EngineInfo, Floats, PicksOnHost, Rope, check_kv_method
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.ort_compress import check_prefilled
from starkv.runtime.engines.stepping import note_positions
from starkv.runtime.engines.torch_compress import (
    REFERENCE_METHODS,
    ReferenceArena,
    cached_heads,
    compress,
    most_kept_rows,
    most_rows_of,
)
from starkv.runtime.engines.torch_decoder import TorchCache, TorchDecoder
from starkv.runtime.engines.torch_weights import load_decoder
from starkv.runtime.kv.buffers import Arena, KvBuffers, Pool
from starkv.runtime.kv.policy import Compressed, KvPolicy, StarKVMemory
from starkv.runtime.preprocess.image import ImageInputs


class TorchReferenceEngine(PicksOnHost):
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
        return cls(engine, load_decoder(checkpoint, text))

    @property
    def manifest(self) -> Manifest:
        return self._engine.manifest

    @property
    def info(self) -> EngineInfo:
        return replace(
            self._engine.info,
            backend="torch-reference",
            device=cpu_model(),
            kv_methods=REFERENCE_METHODS,
            threads=torch.get_num_threads(),
        )

    def embed(self, token_ids: Sequence[int]) -> Floats:
        return self._engine.embed(token_ids)

    def encode_image(self, image: ImageInputs) -> Floats:
        return self._engine.encode_image(image)

    def new_arena(self, rows: int) -> ReferenceArena:
        self._check_rows(rows)
        return ReferenceArena.allocate(self.manifest.text, rows)

    def new_pool(self, slots: int, rows: int, method: str = FULL, packed: bool = False) -> Pool:
        check_kv_method(self.info, method, packed)
        self._check_rows(rows)
        text = self.manifest.text
        return Pool(KvBuffers.allocate(text, slots, rows, cached_heads(method, text)))

    def _check_rows(self, rows: int) -> None:
        limit = self.manifest.max_context
        if rows > limit:
            raise UsageError(
                f"{rows} KV rows are needed, but {self.manifest.name} was built for {limit} at most"
            )

    def prefill(self, arena: Arena, embeds: Floats, rope: Rope) -> Floats:
        arena, starts, total = _own(arena), arena.kv.lengths[:, 0].copy(), len(embeds)
        start = int(starts.max())
        if not total:
            raise UsageError("a prefill needs at least one row")
        if start + total > arena.kv.capacity:
            raise UsageError(
                f"prefill of {total} rows behind {start} exceeds the arena of {arena.kv.capacity} rows"
            )
        note_positions(arena.kv, 1, rope)
        step = self._decoder.step(
            torch.from_numpy(embeds[None]),
            torch.from_numpy(rope.cos),
            torch.from_numpy(rope.sin),
            _cache(arena.host_kv, 1),
        )
        queries, norms = step.queries.numpy(), step.hidden_norm.numpy()
        for layer, first in enumerate(starts):
            arena.queries[layer, :, :, first : first + total] = queries[layer]
            arena.hidden_norm[layer, :, first : first + total] = norms[layer]
        window = min(total, self.manifest.observation_window)
        arena.q_window = queries[:, :, :, total - window :]
        logits: Floats = step.logits[0].numpy()
        return logits

    def most_kept_rows(self, prompt_rows: int, policy: KvPolicy) -> int:
        check_kv_method(self.info, policy.method)
        return most_kept_rows(self.manifest.text, prompt_rows, policy)

    def most_rows_of(self, rows: CacheRows, policy: KvPolicy) -> int:
        check_kv_method(self.info, policy.method)
        return most_rows_of(self.manifest.text, rows, policy)

    def compress(
        self,
        arena: Arena,
        pool: Pool,
        handle: int,
        prompt: CacheRows,
        policy: KvPolicy,
        memory: StarKVMemory | None = None,
    ) -> Compressed:
        check_kv_method(self.info, policy.method)
        arena, slot, length = _own(arena), pool.slot_of(handle), prompt.length
        check_prefilled(arena, prompt)
        if policy.method != FULL:
            for layer, (keys, queries) in enumerate(zip(arena.host_kv.keys, arena.queries, strict=True)):
                if not all(np.isfinite(rows[:, :, :length]).all() for rows in (keys, queries)):
                    raise EngineError(
                        f"keys or queries of layer {layer} are not numbers; nothing can be scored"
                    )
        compressed = compress(arena, pool.host_kv, slot, prompt, policy, memory)
        pool.kv.take_positions(slot, arena.kv, compressed.rows)
        return compressed

    def decode(self, pool: Pool, embeds: Floats, rope: Rope) -> Floats:
        expected = (pool.active, self.manifest.text.hidden)
        if not pool.active or embeds.shape != expected:
            raise ValueError(f"decode got embeddings {embeds.shape} for {pool.active} sequences in use")
        if int(pool.kv.lengths[:, : pool.active].max()) >= pool.kv.capacity:
            raise UsageError(f"a sequence has filled its slot of {pool.kv.capacity} rows")
        note_positions(pool.kv, pool.active, rope)
        step = self._decoder.step(
            torch.from_numpy(embeds[:, None]),
            torch.from_numpy(rope.cos),
            torch.from_numpy(rope.sin),
            _cache(pool.host_kv, pool.active),
        )
        logits: Floats = step.logits.numpy()
        return logits


def _own(arena: Arena) -> ReferenceArena:
    if not isinstance(arena, ReferenceArena):
        raise UsageError("this arena is another engine's; make it with the reference engine's new_arena")
    return arena


def _cache(kv: KvBuffers, batch: int) -> TorchCache:
    """The first sequences of the buffers; the decoder writes into their memory."""
    buffers = (kv.keys[:, :batch], kv.values[:, :batch], kv.lengths[:, :batch])
    return TorchCache(*(torch.from_numpy(buffer) for buffer in buffers))
