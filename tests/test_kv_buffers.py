# SPDX-License-Identifier: Apache-2.0
"""The arena and the pool of slots: whatever comes and goes, every sequence keeps its own rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from starkv.errors import UsageError
from starkv.manifest import TextShape
from starkv.runtime.kv.buffers import ROW_STEP, Arena, KvBuffers, Pool, round_up_rows

TEXT = TextShape(
    layers=3,
    hidden=8,
    intermediate=8,
    heads=4,
    kv_heads=2,
    head_dim=4,
    vocab=8,
    rope_theta=1e4,
    mrope_section=None,
    max_positions=128,
    tied_embedding=False,
)


@given(st.integers(0, 100_000))
def test_capacity_is_the_next_step(rows: int) -> None:
    capacity = round_up_rows(rows)
    assert capacity >= max(rows, 1)
    assert capacity % ROW_STEP == 0
    assert capacity - ROW_STEP < max(rows, 1)


@given(st.integers(1, 4), st.integers(1, 200), st.data())
def test_bytes_are_rows_times_bytes_per_row(slots: int, rows: int, data: st.DataObject) -> None:
    kv = KvBuffers.allocate(TEXT, slots, rows)
    assert kv.keys.shape == kv.values.shape == (3, slots, 2, round_up_rows(rows), 4)
    assert (kv.slots, kv.capacity, kv.bytes_held) == (slots, round_up_rows(rows), 0)
    lengths = data.draw(st.lists(st.integers(0, rows), min_size=3 * slots, max_size=3 * slots))
    kv.lengths[:] = np.reshape(lengths, (3, slots))
    per_layer_row = 2 * TEXT.kv_heads * TEXT.head_dim * 4
    assert kv.row_bytes == per_layer_row
    assert kv.bytes_held == sum(lengths) * per_layer_row
    assert kv.bytes_reserved == 3 * slots * round_up_rows(rows) * per_layer_row


def test_a_layer_of_the_first_slots_is_one_piece_of_memory() -> None:
    """A batch is bound by the address of a view."""
    kv = KvBuffers.allocate(TEXT, 4, 10)
    for batch in range(1, 5):
        assert kv.keys[1, :batch].flags.c_contiguous
        assert kv.values[1, :batch].flags.c_contiguous


def test_arena_forgets_its_sequence_and_keeps_its_memory() -> None:
    arena = Arena.allocate(TEXT, 70)
    assert arena.kv.slots == 1
    assert arena.hidden_norm.shape == (3, 1, 128)
    address, arena.kv.lengths[:] = arena.kv.keys.ctypes.data, 5
    arena.reset()
    assert arena.kv.bytes_held == 0
    assert arena.kv.keys.ctypes.data == address


def test_a_full_pool_and_an_unknown_sequence_are_refused() -> None:
    pool = Pool(KvBuffers.allocate(TEXT, 2, 1))
    first, _ = pool.acquire(), pool.acquire()
    with pytest.raises(UsageError, match="all 2 slots of the KV pool are in use"):
        pool.acquire()
    pool.release(first)
    for call in (pool.slot_of, pool.release):
        with pytest.raises(UsageError, match="sequence 0 is not in the KV pool"):
            call(first)
    assert pool.active == 1


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, grow by rows marked with their own values, and leave, in any order."""

    slots = 4

    @initialize()
    def start(self) -> None:
        self.pool = Pool(KvBuffers.allocate(TEXT, self.slots, ROW_STEP))
        self.expected: dict[int, list[list[float]]] = {}
        """Handle → per layer, the value that fills each row."""
        self.written = 0.0

    @precondition(lambda self: len(self.expected) < self.slots)
    @rule()
    def acquire(self) -> None:
        handle = self.pool.acquire()
        assert handle not in self.expected
        self.expected[handle] = [[] for _ in range(TEXT.layers)]

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), rows=st.lists(st.integers(0, 3), min_size=TEXT.layers, max_size=TEXT.layers))
    def append(self, data: st.DataObject, rows: list[int]) -> None:
        handle = data.draw(st.sampled_from(sorted(self.expected)))
        slot, kv = self.pool.slot_of(handle), self.pool.kv
        for layer, count in enumerate(rows):
            for _ in range(count):
                row = int(kv.lengths[layer, slot])
                if row == kv.capacity:
                    break
                self.written += 1
                kv.keys[layer, slot, :, row] = self.written
                kv.values[layer, slot, :, row] = -self.written
                kv.lengths[layer, slot] += 1
                self.expected[handle][layer].append(self.written)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(sorted(self.expected)))
        self.pool.release(handle)
        del self.expected[handle]

    @invariant()
    def every_sequence_has_its_rows(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool, kv = self.pool, self.pool.kv
        assert sorted(pool.handles) == sorted(self.expected)
        assert sorted(map(pool.slot_of, self.expected)) == list(range(pool.active))
        for handle, layers in self.expected.items():
            slot = pool.slot_of(handle)
            for layer, values in enumerate(layers):
                assert kv.lengths[layer, slot] == len(values)
                for row, value in enumerate(values):
                    assert (kv.keys[layer, slot, :, row] == value).all()
                    assert (kv.values[layer, slot, :, row] == -value).all()


TestPool = PoolMachine.TestCase
