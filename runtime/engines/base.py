# SPDX-License-Identifier: Apache-2.0
"""The ``Engine`` protocol: all that the layers above know of a backend."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from starkv.errors import UsageError
from starkv.manifest import Manifest, TextShape
from starkv.methods.names import FULL
from starkv.methods.stream_rows import CacheRows
from starkv.runtime.generation import Sampler
from starkv.runtime.kv.buffers import Arena, Pool, round_up_rows
from starkv.runtime.kv.packed import NO_PACKING, PACKABLE_METHODS
from starkv.runtime.kv.policy import Compressed, KvPolicy, StarKVMemory
from starkv.runtime.preprocess.image import ImageInputs
from starkv.runtime.preprocess.positions import rope_tables

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PackingInfo:
    """How an engine packs kept rows."""

    name: str
    """Such as ``int8`` or ``rank 0.5 int4``."""
    bytes_per_row: int
    """Of one packed token over all layers, with scales, padding and positions."""
    raw_rows: int | None
    """Newest rows of a prompt that stay as they are, as those of the reply do. None: every row is packed."""

    def tail_rows(self, rows: int, reply_rows: int) -> int:
        """Raw rows that a slot of so many rows has room for by the end of a reply."""
        return 0 if self.raw_rows is None else round_up_rows(min(rows, self.raw_rows) + reply_rows)

    def slot_bytes(self, rows: int, reply_rows: int, raw_row_bytes: int) -> int:
        """Bytes that a slot takes by the end of a reply.

        Args:
            rows: its capacity.
            reply_rows: of the reply, at most.
            raw_row_bytes: of a token that is not packed, over all layers.
        """
        return rows * self.bytes_per_row + self.tail_rows(rows, reply_rows) * raw_row_bytes


def packs(info: "EngineInfo", policy: KvPolicy) -> bool:
    """Whether rows that a policy keeps are packed.

    Raises:
        UsageError: they must be, and the engine or the method can't.
    """
    if policy.packed is False or (info.kv_packing is None and policy.packed is None):
        return False
    if info.kv_packing is None:
        raise UsageError(NO_PACKING)
    if policy.method not in PACKABLE_METHODS:
        if policy.packed is None:
            return False
        raise UsageError(
            f"the KV method {policy.method} keeps other rows for every head, which can't be packed; "
            f"choose one of {', '.join(PACKABLE_METHODS)}, or --kv-quant none"
        )
    return True


@dataclass(frozen=True)
class EngineInfo:
    """What a loaded engine is and can do."""

    backend: str
    """Such as ``ort-cpu``."""
    device: str
    compute_dtype: str
    kv_dtype: str
    kv_bytes_per_row: int
    """Bytes of one token's keys and values over all layers."""
    kv_methods: tuple[str, ...]
    """Compression methods that ``compress`` takes."""
    threads: int
    loaded_form: str
    """``portable``, or ``prepacked`` where weights packed for this processor were used."""
    kv_packing: PackingInfo | None = None
    """How the engine can pack kept rows; None if it can't."""


def kv_bytes_per_row(manifest: Manifest) -> int:
    """Bytes of one token's keys and values over all layers, in the dtype that the engine computes in."""
    text = manifest.text
    bytes_each = 4 if manifest.compute_dtype == "float32" else 2
    return 2 * text.layers * text.kv_heads * text.head_dim * bytes_each


def check_kv_method(info: EngineInfo, method: str, packed: bool = False) -> None:
    """Refuse a compression method that an engine doesn't have.

    Raises:
        UsageError: ``method`` is none of ``info.kv_methods``, or rows are to be packed and the engine can't.
    """
    if packed and info.kv_packing is None:
        raise UsageError(NO_PACKING)
    if method not in info.kv_methods:
        known = ", ".join(info.kv_methods)
        raise UsageError(f"this engine has no KV method {method!r}; it has: {known}")


class PicksOnHost(ABC):
    """Engines whose logits come to the host in any case."""

    @abstractmethod
    def decode(self, pool: Pool, embeds: "Floats", rope: "Rope") -> "Floats": ...

    def decode_tokens(
        self, pool: Pool, embeds: "Floats", rope: "Rope", samplers: Sequence[Sampler]
    ) -> list[int]:
        logits = self.decode(pool, embeds, rope)
        return [sampler.pick(row) for sampler, row in zip(samplers, logits, strict=True)]


@dataclass(frozen=True)
class Rope:
    """Rotary tables of a run of tokens."""

    cos: Floats
    """``[B, S, head_dim / 2]``."""
    sin: Floats
    """``[B, S, head_dim / 2]``."""
    positions: NDArray[np.int32] | None = None
    """``[B, S, 3]``: the t, h and w that the angles are of. Rows prefilled or decoded without them can't be
    packed."""

    @classmethod
    def at(cls, positions: NDArray[np.integer], text: TextShape) -> "Rope":
        """Tables of tokens at ``[3, S]`` or ``[3, B, S]``; see :func:`rope_tables`."""
        batched = positions if positions.ndim == 3 else positions[:, None]
        return cls(*rope_tables(batched, text), np.moveaxis(batched, 0, -1).astype(np.int32))

    def part(self, rows: slice) -> "Rope":
        """Tables of some of the tokens."""
        positions = None if self.positions is None else self.positions[:, rows]
        return Rope(self.cos[:, rows], self.sin[:, rows], positions)


class Engine(Protocol):
    """Steps one model on one device.

    Prefill works on an arena (one sequence), decode on the used slots of a pool (any number of sequences,
    one new token each); ``compress`` moves a sequence from the first into the second.
    """

    @property
    def manifest(self) -> Manifest: ...

    @property
    def info(self) -> EngineInfo: ...

    def embed(self, token_ids: Sequence[int]) -> Floats:
        """Embedding rows ``[S, hidden]`` of token ids."""
        ...

    def encode_image(self, image: ImageInputs) -> Floats:
        """Image tokens ``[T, hidden]`` in reading order."""
        ...

    def new_arena(self, rows: int) -> Arena:
        """Memory to prefill up to ``rows`` rows in."""
        ...

    def new_pool(self, slots: int, rows: int, method: str = FULL, packed: bool = False) -> Pool:
        """Memory to decode ``slots`` sequences of up to ``rows`` rows in.

        Args:
            slots: sequences at once.
            rows: of each.
            method: that keeps the rows.
            packed: they are to be packed, as ``info.kv_packing`` says.

        Raises:
            UsageError: the engine has no such method, was built for fewer rows, or can't pack.
        """
        ...

    def most_kept_rows(self, prompt_rows: int, policy: KvPolicy) -> int:
        """Most rows that any layer can hold after :meth:`compress`: what a slot needs before the first
        token."""
        ...

    def most_rows_of(self, rows: CacheRows, policy: KvPolicy) -> int:
        """The same where the rows are known: of a prompt, or of a history with what comes behind it.

        Raises:
            UsageError: as for :meth:`compress`.
        """
        ...

    def prefill(self, arena: Arena, embeds: Floats, rope: Rope) -> Floats:
        """Append ``embeds`` ``[S, hidden]`` to the arena's sequence.

        Returns:
            logits ``[vocab]`` of the last row.

        Raises:
            UsageError: the arena has no room for S more rows.
        """
        ...

    def compress(
        self,
        arena: Arena,
        pool: Pool,
        handle: int,
        prompt: CacheRows,
        policy: KvPolicy,
        memory: StarKVMemory | None = None,
    ) -> Compressed:
        """Move the arena's sequence into a slot of the pool, keeping the rows that the policy chooses.

        Args:
            arena: a prefilled prompt.
            pool: where to.
            handle: the sequence in it.
            prompt: what the arena's rows are, of a prompt or of a stream.
            policy: method and budget.
            memory: what STaR-KV remembers of the trajectory's earlier prompts.

        Raises:
            UsageError: the method is none of ``info.kv_methods``, the slot is too small, or the budget too
            small
                for the method.
            EngineError: the model's keys or queries are not numbers.
        """
        ...

    def decode_tokens(self, pool: Pool, embeds: Floats, rope: Rope, samplers: Sequence[Sampler]) -> list[int]:
        """Append one row to each used slot and pick each sequence's next token, where the logits are.

        Args:
            pool: as for :meth:`decode`.
            embeds: likewise.
            rope: likewise.
            samplers: one for each slot in use.

        Returns:
            token ids.

        Raises:
            UsageError: a slot is full.
        """
        ...

    def decode(self, pool: Pool, embeds: Floats, rope: Rope) -> Floats:
        """Append one row to each used slot.

        Args:
            pool: B of its slots are in use.
            embeds: ``[B, hidden]``, in the order of the slots.
            rope: tables for S = 1.

        Returns:
            logits ``[B, vocab]``.

        Raises:
            UsageError: a slot is full.
        """
        ...
