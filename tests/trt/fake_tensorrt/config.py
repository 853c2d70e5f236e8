# SPDX-License-Identifier: Apache-2.0
"""How to build: profiles of input shapes, flags and limits."""

from typing import Any

from fake_tensorrt.binding import Bound, Dims, expect, whole
from fake_tensorrt.callbacks import ILogger, IProgressMonitor
from fake_tensorrt.state import Current, log
from fake_tensorrt.timing import ITimingCache, device

Shape = tuple[int, ...]
Ranges = dict[str, tuple[Shape, Shape, Shape]]


class IOptimizationProfile(Bound):
    _ranges: Ranges

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        """NvInferRuntime.h IOptimizationProfile::setDimensions: one rank, and 0 <= min <= opt <= max.

        Raises:
            RuntimeError: they are not in order (pyCore.cpp opt_profile_set_shape).
        """
        ranges = tuple(tuple(Dims(shape)) for shape in (min, opt, max))
        least, usual, most = ranges
        if not len(least) == len(usual) == len(most) or any(size < 0 for size in least):
            raise RuntimeError("Shape provided for min is inconsistent with other shapes.")
        for name, low, high in (("opt", least, usual), ("max", usual, most)):
            if any(a > b for a, b in zip(low, high, strict=True)):
                raise RuntimeError(f"Shape provided for {name} is inconsistent with other shapes.")
        self._ranges[expect(input, str, "input")] = (least, usual, most)

    def get_shape(self, input: str) -> list[Dims]:
        return [Dims(shape) for shape in self._ranges.get(input, ())]

    def __bool__(self) -> bool:
        return True


class IBuilderConfig(Bound):
    _logger: ILogger
    _flags: set[str]
    _preview: set[str]
    _profiles: list[IOptimizationProfile]
    _limits: dict[str, int]
    _level: int
    _verbosity: Any
    _hardware: Any
    _monitor: IProgressMonitor | None
    _timing: ITimingCache | None
    _streams: int
    _serialized: list[str]

    @classmethod
    def fresh(cls, logger: ILogger) -> "IBuilderConfig":
        enum = Current.get().enum
        made: IBuilderConfig = cls.make(
            _logger=logger,
            _flags={"TF32"},
            _preview=set(),
            _profiles=[],
            _limits={},
            _level=3,
            _verbosity=enum("ProfilingVerbosity").LAYER_NAMES_ONLY,
            _hardware=enum("HardwareCompatibilityLevel").NONE,
            _monitor=None,
            _timing=None,
            _streams=-1,
            _serialized=[],
        )
        return made

    def set_flag(self, flag: Any) -> None:
        self._flags.add(expect(flag, Current.get().enum("BuilderFlag"), "flag").name)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(expect(flag, Current.get().enum("BuilderFlag"), "flag").name)

    def get_flag(self, flag: Any) -> bool:
        return expect(flag, Current.get().enum("BuilderFlag"), "flag").name in self._flags

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        name = expect(feature, Current.get().enum("PreviewFeature"), "feature").name
        (self._preview.add if expect(enable, bool, "enable") else self._preview.discard)(name)

    def get_preview_feature(self, feature: Any) -> bool:
        return expect(feature, Current.get().enum("PreviewFeature"), "feature").name in self._preview

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        name = expect(pool, Current.get().enum("MemoryPoolType"), "pool").name
        self._limits[name] = whole(pool_size, "pool_size")

    def get_memory_pool_limit(self, pool: Any) -> int:
        name = expect(pool, Current.get().enum("MemoryPoolType"), "pool").name
        return self._limits.get(name, Current.get().cuda.total)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        """NvInfer.h addOptimizationProfile: the index; -1 for what is not valid."""
        if not expect(profile, IOptimizationProfile, "profile")._ranges:
            log(self._logger, "ERROR", "addOptimizationProfile: the profile is not valid")
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache | None:
        made = ITimingCache.read(bytes(memoryview(serialized_timing_cache)))
        if made is None:
            log(self._logger, "ERROR", "createTimingCache: the timing cache is corrupted")
        return made

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        """NvInfer.h setTimingCache: of this version, and of this card unless told otherwise."""
        made, here = expect(cache, ITimingCache, "cache")._made, device()
        if made["version"] != here["version"] or (made != here and not ignore_mismatch):
            log(self._logger, "ERROR", "the timing cache was made by another TensorRT, or on another device")
            return False
        self._timing = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._timing

    @property
    def builder_optimization_level(self) -> int:
        return self._level

    @builder_optimization_level.setter
    def builder_optimization_level(self, level: int) -> None:
        # NvInfer.h setBuilderOptimizationLevel: 0 to 5.
        if not 0 <= whole(level, "builder_optimization_level") <= 5:
            log(self._logger, "ERROR", f"builder optimization level {level} is not in 0 to 5")
            return
        self._level = level

    @property
    def profiling_verbosity(self) -> Any:
        return self._verbosity

    @profiling_verbosity.setter
    def profiling_verbosity(self, verbosity: Any) -> None:
        self._verbosity = expect(verbosity, Current.get().enum("ProfilingVerbosity"), "profiling_verbosity")

    @property
    def hardware_compatibility_level(self) -> Any:
        return self._hardware

    @hardware_compatibility_level.setter
    def hardware_compatibility_level(self, level: Any) -> None:
        kind = Current.get().enum("HardwareCompatibilityLevel")
        self._hardware = expect(level, kind, "hardware_compatibility_level")

    @property
    def progress_monitor(self) -> IProgressMonitor | None:
        return self._monitor

    @progress_monitor.setter
    def progress_monitor(self, monitor: IProgressMonitor | None) -> None:
        self._monitor = monitor and expect(monitor, IProgressMonitor, "progress_monitor")

    @property
    def max_aux_streams(self) -> int:
        return self._streams

    @max_aux_streams.setter
    def max_aux_streams(self, streams: int) -> None:
        self._streams = whole(streams, "max_aux_streams")

    @property
    def plugins_to_serialize(self) -> list[str]:
        return self._serialized

    @plugins_to_serialize.setter
    def plugins_to_serialize(self, paths: list[str]) -> None:
        self._serialized = [expect(path, str, "a path") for path in paths]
