# SPDX-License-Identifier: Apache-2.0
"""What engines that step an engine directory share, whatever runs it: files, embedding, prefill in chunks."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from starkv.errors import EngineError, UsageError
from starkv.manifest import Manifest, read_manifest, verify_files
from starkv.methods.stream_rows import CacheRows
from starkv.runtime.engines.base import EngineInfo, Floats, PicksOnHost, Rope, check_kv_method, packs
from starkv.runtime.engines.embedding import EmbeddingTable
from starkv.runtime.engines.ort_compress import OrtCompressor
from starkv.runtime.kv.buffers import Arena, KvStore, Pool
from starkv.runtime.kv.packed import PackedKv
from starkv.runtime.kv.policy import Compressed, KvPolicy, StarKVMemory

_RUNTIMES = {"ort": "ONNX Runtime", "trt": "TensorRT"}


def chunk_lengths(total: int, chunk: int, window: int) -> list[int]:
    """Split a prefill so that the last chunk holds the whole observation window, if the prefill does.

    No chunk is longer than ``chunk``, or than ``window`` where that is more.
    """
    chunk = max(chunk, window)
    whole, rest = divmod(total, chunk)
    lengths = [chunk] * whole + ([rest] if rest else [])
    if len(lengths) > 1 and lengths[-1] < window:
        lengths[-2:] = [chunk + rest - window, window]
    return lengths


class SteppingEngine(PicksOnHost):
    """Opens an engine directory; subclasses say where keys and values lie and how a graph is run on them."""

    def __init__(self, directory: Path, backend: Literal["ort", "trt"], verify: bool) -> None:
        """Read the manifest, check the files and map the embedding.

        Args:
            directory: the engine.
            backend: that it must have been built for.
            verify: compare every file with its recorded hash first.

        Raises:
            EngineError: the directory is damaged, or built for another backend.
        """
        self._directory = directory
        self._manifest = read_manifest(directory)
        if self._manifest.backend != backend:
            raise EngineError(
                f"{directory} was built for {_RUNTIMES[self._manifest.backend]}, not for {_RUNTIMES[backend]}"
            )
        if verify:
            verify_files(directory, self._manifest)
        self._embedding = EmbeddingTable(directory / "embedding.safetensors")

    @property
    @abstractmethod
    def info(self) -> EngineInfo: ...

    @property
    @abstractmethod
    def _chunk(self) -> int:
        """Rows per prefill call."""

    @property
    @abstractmethod
    def _compressor(self) -> OrtCompressor: ...

    @abstractmethod
    def new_arena(self, rows: int) -> Arena: ...

    @abstractmethod
    def _prefill_chunk(self, arena: Arena, embeds: Floats, rope: Rope, logits: Floats, last: bool) -> None:
        """Append embeddings ``[1, S, hidden]`` and write the last row's logits ``[1, vocab]``.

        Args:
            arena: the sequence.
            embeds: of its next rows.
            rope: of those.
            logits: written.
            last: no further chunk of the prompt follows.
        """

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    def embed(self, token_ids: Sequence[int]) -> Floats:
        return self._embedding(token_ids)

    def most_kept_rows(self, prompt_rows: int, policy: KvPolicy) -> int:
        check_kv_method(self.info, policy.method)
        return self._compressor.most_rows(prompt_rows, policy)

    def most_rows_of(self, rows: CacheRows, policy: KvPolicy) -> int:
        check_kv_method(self.info, policy.method)
        return self._compressor.most_rows_of(rows, policy)

    def _check_rows(self, rows: int) -> None:
        limit = self._manifest.max_context
        if rows > limit:
            raise UsageError(
                f"{rows} KV rows are needed, but {self._manifest.name} was built for {limit} at most"
            )

    def prefill(self, arena: Arena, embeds: Floats, rope: Rope) -> Floats:
        start, total = int(arena.kv.lengths.max()), len(embeds)
        if not total:
            raise UsageError("a prefill needs at least one row")
        if start + total > arena.kv.capacity:
            raise UsageError(
                f"prefill of {total} rows behind {start} exceeds the arena of {arena.kv.capacity} rows"
            )
        logits = np.empty((1, self._manifest.text.vocab), np.float32)
        done = 0
        for length in chunk_lengths(total, self._chunk, self._manifest.observation_window):
            part = slice(done, done + length)
            done += length
            note_positions(arena.kv, 1, rope.part(part))
            self._prefill_chunk(arena, embeds[None, part], rope.part(part), logits, done == total)
        row: Floats = logits[0]
        return row

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
        if not isinstance(pool.kv, PackedKv):
            return self._compress_floats(arena, pool, handle, prompt, policy, memory)
        packs(self.info, replace(policy, packed=True))
        # Where all rows are kept, the arena's rows are packed where they are.
        rows = 0 if policy.keeps_all_of(prompt) else self.most_rows_of(prompt, policy)
        kept = Pool(self.new_arena(rows).kv if rows else arena.kv)
        kept.handles.append(handle)
        compressed = self._compress_floats(arena, kept, handle, prompt, policy, memory)
        pool.kv.pack(pool.slot_of(handle), kept.kv)
        return compressed

    def _compress_floats(
        self,
        arena: Arena,
        pool: Pool,
        handle: int,
        prompt: CacheRows,
        policy: KvPolicy,
        memory: StarKVMemory | None,
    ) -> Compressed:
        slot = pool.slot_of(handle)
        compressed = self._compressor.compress(arena, pool, slot, prompt, policy, memory)
        pool.kv.take_positions(slot, arena.kv, compressed.rows)
        return compressed

    def _start_decode(self, pool: Pool, embeds: Floats, rope: Rope) -> None:
        """Refuse what can't be decoded; note where the new rows are.

        Raises:
            UsageError: a slot is full.
        """
        expected = (pool.active, self._manifest.text.hidden)
        if not pool.active or embeds.shape != expected:
            raise ValueError(f"decode got embeddings {embeds.shape} for {pool.active} sequences in use")
        if int(pool.kv.lengths[:, : pool.active].max()) >= pool.kv.capacity:
            raise UsageError(f"a sequence has filled its slot of {pool.kv.capacity} rows")
        note_positions(pool.kv, pool.active, rope)


def note_positions(kv: KvStore, batch: int, rope: Rope) -> None:
    """Note the positions of the rows that the first ``batch`` slots are about to get, if they are known."""
    if rope.positions is None:
        return
    rows = rope.positions.shape[1]
    for layer, slot in np.ndindex(len(kv.lengths), batch):
        start = kv.lengths[layer, slot]
        kv.positions[layer, slot, start : start + rows] = rope.positions[slot]


def store_norms(arena: Arena, norms: Floats, rows: int) -> None:
    """Note the norms ``[L, 1, S]`` of new rows behind those of the arena's rows."""
    for layer, start in enumerate(arena.kv.lengths[:, 0]):
        arena.hidden_norm[layer, :, start : start + rows] = norms[layer]
