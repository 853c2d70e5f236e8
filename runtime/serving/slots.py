# SPDX-License-Identifier: Apache-2.0
"""KV memory of many sequences: pools by capacity, within one limit of bytes."""

from dataclasses import dataclass, field

from starkv.runtime.engines.base import Engine
from starkv.runtime.kv.buffers import ROW_STEP, Arena, Pool, round_up_rows
from starkv.runtime.turn import Turn


def bucket_rows(rows: int) -> int:
    """Capacity of the pool for sequences of so many rows: 64, 128, 256 …

    Few capacities, so that sequences of different lengths share pools and decode together.
    """
    capacity = ROW_STEP
    while capacity < rows:
        capacity *= 2
    return capacity


@dataclass(eq=False)
class TurnPool:
    """A pool and the turns in its slots."""

    pool: Pool
    method: str
    packed: bool
    tail_rows: int
    """Raw rows that a packed slot may grow to; 0 where none does."""
    promised_bytes: int
    """What it takes once its slots have grown so far."""
    turns: dict[int, Turn] = field(default_factory=dict)
    """Handle → turn."""

    @property
    def in_order(self) -> list[Turn]:
        """Turns in the order of their slots."""
        return [self.turns[handle] for handle in self.pool.handles]

    @property
    def full(self) -> bool:
        return self.pool.active == self.pool.kv.slots

    @property
    def bytes_reserved(self) -> int:
        """Bytes that it takes or may grow to."""
        return max(self.pool.kv.bytes_reserved, self.promised_bytes)

    def leave(self, turn: Turn) -> None:
        """Free a turn's slot."""
        handle = next(handle for handle, other in self.turns.items() if other is turn)
        self.pool.release(handle)
        del self.turns[handle]


class KvMemory:
    """Allocates arena and pools.

    Args:
        engine: whose memory it is.
        most_bytes: of keys and values, all together.
        slots: most sequences at once.
    """

    def __init__(self, engine: Engine, most_bytes: int, slots: int) -> None:
        self._engine, self.most_bytes, self._slots = engine, most_bytes, slots
        self._row_bytes = engine.info.kv_bytes_per_row
        self._arena: Arena | None = None
        self._staged_bytes = 0
        self.pools: list[TurnPool] = []

    @property
    def active(self) -> int:
        """Sequences in slots."""
        return sum(pool.pool.active for pool in self.pools)

    @property
    def bytes_held(self) -> int:
        """Bytes of the valid rows in the pools."""
        return sum(pool.pool.kv.bytes_of(slice(pool.pool.active)) for pool in self.pools)

    @property
    def bytes_reserved(self) -> int:
        """Bytes of the arena, of what the turn in it takes beside it while it is packed, and of the pools."""
        arena = self._arena.kv.bytes_reserved if self._arena else 0
        return arena + self._staged_bytes + sum(pool.bytes_reserved for pool in self.pools)

    def never_fits(self, turn: Turn) -> bool:
        """Whether a turn would not fit even if it were alone."""
        needed = self._arena_bytes(turn) + turn.staged_bytes + self._slot_bytes(turn)
        return needed > self.most_bytes

    def _arena_bytes(self, turn: Turn) -> int:
        return round_up_rows(turn.plan.arena_rows) * self._row_bytes

    def _slot_bytes(self, turn: Turn) -> int:
        rows, packing = self._slot_rows(turn), self._engine.info.kv_packing
        if not turn.packed or packing is None:
            return rows * self._row_bytes
        return packing.slot_bytes(rows, turn.slot_rows - turn.kept_rows, self._row_bytes)

    def _tail_rows(self, turn: Turn) -> int:
        packing = self._engine.info.kv_packing
        if not turn.packed or packing is None:
            return 0
        return packing.tail_rows(self._slot_rows(turn), turn.slot_rows - turn.kept_rows)

    def _slot_rows(self, turn: Turn) -> int:
        return min(bucket_rows(turn.slot_rows), round_up_rows(self._engine.manifest.max_context))

    def arena(self, turn: Turn) -> Arena | None:
        """The arena with room for a turn; None if there is no memory for it now."""
        held, beside = self._arena, turn.staged_bytes
        self._staged_bytes = 0
        # One that a long prompt left may leave no room for this turn's slot.
        if (
            held is None
            or held.kv.capacity < turn.plan.arena_rows
            or held.kv.bytes_reserved + beside + self._slot_bytes(turn) > self.most_bytes
            or not self._make_room(beside)
        ):
            # The old one goes first: both at once may be too much.
            self._arena = held = None
            if not self._make_room(self._arena_bytes(turn) + beside):
                return None
            self._arena = self._engine.new_arena(turn.plan.arena_rows)
        self._staged_bytes = beside
        return self._arena

    def slot(self, turn: Turn) -> TurnPool | None:
        """A pool with a free slot for a turn; None if there is none now."""
        if self.active == self._slots:
            return None
        capacity, method, tail_rows = self._slot_rows(turn), turn.policy.method, self._tail_rows(turn)
        for pool in self.pools:
            same_kind = (pool.method, pool.packed) == (method, turn.packed) and pool.tail_rows >= tail_rows
            fits = pool.pool.kv.capacity >= turn.slot_rows and same_kind
            if fits and pool.pool.kv.capacity <= capacity and not pool.full:
                return pool
        slots = self._slots
        while slots and not self._make_room(slots * self._slot_bytes(turn)):
            slots //= 2
        if not slots:
            return None
        rows = min(capacity, self._engine.manifest.max_context)
        made = self._engine.new_pool(slots, rows, method, turn.packed)
        pool = TurnPool(made, method, turn.packed, tail_rows, slots * self._slot_bytes(turn))
        self.pools.append(pool)
        return pool

    def _make_room(self, wanted: int) -> bool:
        """Drop empty pools until so many bytes are free."""
        while self.bytes_reserved + wanted > self.most_bytes:
            empty = next((pool for pool in self.pools if not pool.turns), None)
            if empty is None:
                return False
            self.pools.remove(empty)
        return True
