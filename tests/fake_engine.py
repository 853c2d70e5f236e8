# SPDX-License-Identifier: Apache-2.0
"""An engine without a model: what it says next is a checksum of every row that a sequence holds.

So a reply shows whether its rows were all there, in their order, and nobody else's among them. It notes every
call, so that tests see what was done in between.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np

from starkv.manifest import Manifest
from starkv.methods.names import FULL, STAR_KV
from starkv.methods.stream_rows import CacheRows
from starkv.runtime.engines.base import EngineInfo, Floats, PicksOnHost, Rope
from starkv.runtime.engines.ort_compress import check_prefilled, check_room
from starkv.runtime.kv.buffers import Arena, KvBuffers, Pool
from starkv.runtime.kv.policy import Compressed, KvPolicy, StarKVMemory
from starkv.runtime.preprocess.image import ImageInputs

IMAGE_VALUE = 1000.0
"""What an image token counts, plus the image's first pixel."""


def spoken(values: Sequence[float], tokens: Sequence[int]) -> int:
    """The token that follows rows of these values.

    Args:
        values: of the rows, in order.
        tokens: that may be said.
    """
    places = np.arange(1, len(values) + 1, dtype=np.float64)
    checksum = int(np.round((np.asarray(values, np.float64) * places).sum() * 16))
    return tokens[checksum * 2_654_435_761 % 65_537 % len(tokens)]


class FakeEngine(PicksOnHost):
    """Steps nothing.

    Args:
        manifest: of any engine; its sizes are used.
        tokens: that it may say.
        step_seconds: that a decode step takes.
        chunk_seconds: that a prefill takes.
    """

    def __init__(
        self, manifest: Manifest, tokens: Sequence[int], step_seconds: float = 0, chunk_seconds: float = 0
    ) -> None:
        self.manifest, self.tokens = manifest, tuple(tokens)
        self.step_seconds, self.chunk_seconds = step_seconds, chunk_seconds
        self.calls: list[tuple[str, int]] = []
        """Name of a call, and rows or sequences that it was for."""
        self.before_decode: Callable[[], None] = lambda: None

    @property
    def info(self) -> EngineInfo:
        text = self.manifest.text
        row_bytes = 2 * text.layers * text.kv_heads * text.head_dim * 4
        return EngineInfo("fake", "none", "float32", "float32", row_bytes, (FULL, STAR_KV), 1, "portable")

    def embed(self, token_ids: Sequence[int]) -> Floats:
        values = np.zeros((len(token_ids), self.manifest.text.hidden), np.float32)
        values[:, 0] = token_ids
        return values

    def encode_image(self, image: ImageInputs) -> Floats:
        self.calls.append(("encode", 1))
        rows, columns = image.merged_grid
        values = np.zeros((rows * columns, self.manifest.text.hidden), np.float32)
        values[:, 0] = IMAGE_VALUE + image.pixel_values[0, 0]
        return values

    def new_arena(self, rows: int) -> Arena:
        return Arena.allocate(self.manifest.text, rows)

    def new_pool(self, slots: int, rows: int, method: str = FULL, packed: bool = False) -> Pool:
        return Pool(KvBuffers.allocate(self.manifest.text, slots, rows))

    def most_kept_rows(self, prompt_rows: int, policy: KvPolicy) -> int:
        return prompt_rows

    def most_rows_of(self, rows: CacheRows, policy: KvPolicy) -> int:
        return rows.length

    def prefill(self, arena: Arena, embeds: Floats, rope: Rope) -> Floats:
        self.calls.append(("prefill", len(embeds)))
        time.sleep(self.chunk_seconds)
        start = int(arena.kv.lengths.max())
        assert rope.cos.shape[:2] == (1, len(embeds))
        arena.host_kv.keys[:, 0, :, start : start + len(embeds), 0] = embeds[:, 0]
        arena.kv.lengths += len(embeds)
        return self._logits(arena.host_kv, 0)

    def compress(
        self,
        arena: Arena,
        pool: Pool,
        handle: int,
        prompt: CacheRows,
        policy: KvPolicy,
        memory: StarKVMemory | None = None,
    ) -> Compressed:
        self.calls.append(("compress", prompt.length))
        check_prefilled(arena, prompt)
        slot, rows = pool.slot_of(handle), prompt.length
        check_room(rows, pool)
        pool.host_kv.keys[:, slot, :, :rows] = arena.host_kv.keys[:, 0, :, :rows]
        pool.kv.row_meta[:, slot, :rows] = prompt.row_meta
        pool.kv.lengths[:, slot] = rows
        every = np.broadcast_to(np.arange(rows), (self.manifest.text.layers, 1, rows))
        return Compressed(every, memory=memory)

    def decode(self, pool: Pool, embeds: Floats, rope: Rope) -> Floats:
        self.before_decode()
        self.calls.append(("decode", pool.active))
        time.sleep(self.step_seconds)
        assert len(embeds) == pool.active == len(rope.cos)
        logits = []
        for slot, row in enumerate(embeds):
            length = int(pool.kv.lengths[0, slot])
            pool.host_kv.keys[:, slot, :, length, 0] = row[0]
            pool.kv.lengths[:, slot] += 1
            logits.append(self._logits(pool.host_kv, slot))
        return np.stack(logits)

    def _logits(self, kv: KvBuffers, slot: int) -> Floats:
        logits = np.zeros(self.manifest.text.vocab, np.float32)
        logits[spoken(kv.keys[0, slot, 0, : kv.lengths[0, slot], 0].tolist(), self.tokens)] = 1
        return logits
