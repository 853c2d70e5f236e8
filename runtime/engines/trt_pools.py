# SPDX-License-Identifier: Apache-2.0
"""Caches on the card that are used again, and the decode steps on them.

A CUDA graph holds addresses, so it lives as long as its cache's memory: a pool that nobody uses any more
leaves both to the next one of its size.
"""

import weakref
from collections.abc import Callable
from functools import partial

from starkv.runtime.engines.device_kv import DeviceKv
from starkv.runtime.engines.trt_decode import DecodeParts, TrtDecodeStep
from starkv.runtime.kv.buffers import Pool

SPARE_POOLS = 2
"""Pools whose memory is kept for the next of the same size."""
MOST_STEPS = 32
"""Decode steps that exist at once, each with a context and a CUDA graph of its own; the one that was not used
for longest makes room."""


class SparePools:
    """Memory of pools that are gone, for those to come."""

    def __init__(self) -> None:
        self._caches: list[DeviceKv] = []

    def take(self, kind: type[DeviceKv], slots: int, rows: int) -> DeviceKv | None:
        """A cache of that kind and size, if one is kept."""
        for kv in self._caches:
            if (type(kv), kv.slots, kv.capacity) == (kind, slots, rows):
                self._caches = [other for other in self._caches if other is not kv]
                return kv
        return None

    def lend(self, kv: DeviceKv) -> Pool:
        """A pool on a cache, whose memory comes back when the pool is gone."""
        pool = Pool(kv)
        weakref.finalize(pool, _keep, weakref.ref(self), kv)
        return pool

    def keep(self, kv: DeviceKv) -> None:
        """Keep a cache; the oldest of too many is given up."""
        kv.forget()
        self._caches = [*self._caches, kv][-SPARE_POOLS:]

    def give_up(self) -> bool:
        """Give all memory back; False where there is none."""
        had, self._caches = bool(self._caches), []
        return had

    def way_to_give_up(self) -> Callable[[], bool]:
        """:meth:`give_up` for the allocator, which must not keep alive what it allocated."""
        return partial(_give_up, weakref.ref(self))


def _give_up(spare: "weakref.ref[SparePools]") -> bool:
    owner = spare()
    return owner is not None and owner.give_up()


def _keep(spare: "weakref.ref[SparePools]", kv: DeviceKv) -> None:
    """Keep the memory of a pool that is gone, if its engine is not."""
    if owner := spare():
        owner.keep(kv)


class DecodeSteps:
    """The steps of all caches, by cache and number of sequences."""

    def __init__(self, parts: DecodeParts) -> None:
        self._parts = parts
        self._used: list[weakref.ref[TrtDecodeStep]] = []
        """Latest last."""

    def get(self, kv: DeviceKv, batch: int) -> TrtDecodeStep:
        """The step of a cache's first ``batch`` slots."""
        step: TrtDecodeStep | None = kv.steps.get(batch)
        if step is None:
            self._make_room()
            step = kv.steps[batch] = TrtDecodeStep(self._parts, kv, batch)
        self._used = [*(ref for ref in self._used if ref() not in (None, step)), weakref.ref(step)]
        return step

    def _make_room(self) -> None:
        alive = [step for ref in self._used if (step := ref())]
        for step in alive[: max(0, len(alive) + 1 - MOST_STEPS)]:
            step.leave()
