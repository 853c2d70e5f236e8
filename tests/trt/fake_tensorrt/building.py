# SPDX-License-Identifier: Apache-2.0
"""The builder and its configuration."""

import json
from typing import Any

from fake_tensorrt.enums import (
    BuilderFlag,
    HardwareCompatibilityLevel,
    MemoryPoolType,
    PreviewFeature,
    ProfilingVerbosity,
)
from fake_tensorrt.network import INetworkDefinition, check_flags
from fake_tensorrt.plan import Plan, write
from fake_tensorrt.state import Current, MisuseError, log

Ranges = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


class IHostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> IHostMemory:
        return IHostMemory(self.content)

    def combine(self, other: "ITimingCache", ignore_mismatch: bool) -> bool:
        return True


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: Ranges = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        ranges = tuple(min), tuple(opt), tuple(max)
        # NvInfer.h IOptimizationProfile::setDimensions: 0 <= min <= opt <= max
        if not all(0 <= a <= b <= c for a, b, c in zip(*ranges, strict=True)):
            raise ValueError(f"Shape provided for min {min} / opt {opt} / max {max} is inconsistent")
        self.shapes[input] = ranges


class IBuilderConfig:
    def __init__(self) -> None:
        self.flags: set[BuilderFlag] = set()
        self.preview: set[PreviewFeature] = set()
        self.profiles: list[IOptimizationProfile] = []
        self.limits: dict[MemoryPoolType, int] = {}
        self.builder_optimization_level = 3
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self.progress_monitor: Any = None
        self.timing_cache: ITimingCache | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(BuilderFlag(flag))

    def get_flag(self, flag: BuilderFlag) -> bool:
        return flag in self.flags

    def set_preview_feature(self, feature: PreviewFeature, enable: bool) -> None:
        (self.preview.add if enable else self.preview.discard)(feature)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self.limits[pool] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        mine = _device()
        if cache.content and json.loads(cache.content)["device"] != mine and not ignore_mismatch:
            return False
        self.timing_cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self.timing_cache


def _device() -> str:
    state = Current.get()
    return f"{state.version} {state.gpu}"


class Builder:
    def __init__(self, logger: Any) -> None:
        state = Current.get()
        self._logger = logger
        if state.gpu is None:
            raise MisuseError("a Builder without a CUDA device is a null pointer")

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(check_flags(flags))

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None:
        content = self._build(network, config)
        return None if content is None else IHostMemory(content)

    def build_serialized_network_to_stream(
        self, network: INetworkDefinition, config: IBuilderConfig, writer: Any
    ) -> bool:
        content = self._build(network, config)
        if content is None:
            return False
        for start in range(0, len(content), 1 << 20):
            piece = content[start : start + (1 << 20)]
            if writer.write(piece) != len(piece):
                return False
        return True

    def _build(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        state = Current.get()
        state.builds.append((network, config))
        if network.graph is None:
            log(self._logger, "ERROR", "the network is empty")
            return None
        if state.workspace_needed > config.limits.get(MemoryPoolType.WORKSPACE, state.cuda.total):
            log(self._logger, "ERROR", "insufficient memory: a layer needs more workspace")
            return None
        dynamic = {tensor.name for tensor in network.inputs if -1 in tensor.shape}
        for profile in config.profiles or [IOptimizationProfile()]:
            if missing := dynamic - profile.shapes.keys():
                log(self._logger, "ERROR", f"Dynamic input {min(missing)} has no optimization profile")
                return None
            for tensor in network.inputs:
                for shape in profile.shapes.get(tensor.name, ()):
                    if len(shape) != len(tensor.shape) or any(
                        fixed not in (-1, size) for fixed, size in zip(tensor.shape, shape, strict=True)
                    ):
                        log(self._logger, "ERROR", f"profile of {tensor.name} contradicts the network")
                        return None
        aliased = network.aliases()
        # NvInfer.h PreviewFeature::kALIASED_PLUGIN_IO_10_03; without it whole caches are copied at each step.
        if aliased and PreviewFeature.ALIASED_PLUGIN_IO_10_03 not in config.preview:
            raise MisuseError("a plugin aliases its inputs, but the preview feature is not set")
        if not self._proceed(config.progress_monitor, len(network.layers)):
            log(self._logger, "ERROR", "the build was cancelled")
            return None
        if config.timing_cache is not None:
            config.timing_cache.content = json.dumps({"device": _device()}).encode()
        return write(
            Plan(
                version=state.version,
                gpu=state.gpu,
                compatibility=int(config.hardware_compatibility_level),
                graph=network.graph.SerializeToString(),
                opset=network.opset,
                constants=network.constants,
                inputs=[(t.name, t.shape, t.dtype) for t in network.inputs],
                outputs=[(t.name, t.shape, t.dtype) for t in network.outputs],
                profiles=[profile.shapes for profile in config.profiles],
                aliases=aliased,
                stripped=BuilderFlag.STRIP_PLAN in config.flags,
                refittable=bool(config.flags & {BuilderFlag.REFIT, BuilderFlag.REFIT_IDENTICAL}),
                streaming=BuilderFlag.WEIGHT_STREAMING in config.flags,
                debug=list(network.debug),
            )
        )

    @staticmethod
    def _proceed(monitor: Any, steps: int) -> bool:
        if monitor is None:
            return True
        monitor.phase_start("Building", None, steps)
        for step in range(steps):
            if not monitor.step_complete("Building", step):
                return False
        monitor.phase_finish("Building")
        return True
