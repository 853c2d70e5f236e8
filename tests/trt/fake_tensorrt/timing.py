# SPDX-License-Identifier: Apache-2.0
"""Timing caches: which kernels were measured, by which TensorRT and on which card."""

import json
from typing import Any

from fake_tensorrt.binding import Bound, expect
from fake_tensorrt.memory import IHostMemory
from fake_tensorrt.state import Current


def device() -> dict[str, Any]:
    """What a cache's header says of where it was made."""
    state = Current.get()
    gpu = state.gpu
    return {"version": state.version, "card": gpu and [gpu.name, *gpu.capability]}


class ITimingCache(Bound):
    _made: dict[str, Any]
    _entries: set[str]

    @classmethod
    def read(cls, content: bytes) -> "ITimingCache | None":
        """NvInfer.h createTimingCache: nothing makes a new one; what is no cache makes none."""
        if not content:
            return cls.make(_made=device(), _entries=set())
        try:
            found = json.loads(content)
            return cls.make(_made=found["made"], _entries=set(found["entries"]))
        except (ValueError, KeyError, TypeError):
            return None

    def serialize(self) -> IHostMemory:
        return IHostMemory(json.dumps({"made": self._made, "entries": sorted(self._entries)}).encode())

    def combine(self, input_cache: "ITimingCache", ignore_mismatch: bool) -> bool:
        """NvInfer.h ITimingCache::combine: never of another version, of another card only on request."""
        other = expect(input_cache, ITimingCache, "input_cache")
        if other._made["version"] != self._made["version"]:
            return False
        if other._made != self._made and not ignore_mismatch:
            return False
        self._entries |= other._entries
        return True

    def reset(self) -> bool:
        self._entries.clear()
        return True

    def measure(self, kernels: set[str]) -> int:
        """Add kernels; how many of them were not known."""
        new = kernels - self._entries
        self._entries |= new
        return len(new)
