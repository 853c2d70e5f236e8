# SPDX-License-Identifier: Apache-2.0
"""The builder."""

import threading
from typing import Any

from fake_tensorrt.binding import Bound, called, expect, whole
from fake_tensorrt.build_rules import refusals
from fake_tensorrt.callbacks import ILogger, IProgressMonitor, IStreamWriter, written
from fake_tensorrt.config import IBuilderConfig, IOptimizationProfile
from fake_tensorrt.memory import IHostMemory
from fake_tensorrt.network import INetworkDefinition
from fake_tensorrt.plan import Plan, Tensor, described, write
from fake_tensorrt.state import Current, MisuseError, State, log

_NO_DEVICE = "createInferBuilder: CUDA initialization failure with error: 35"


class Builder(Bound):
    def __init__(self, logger: ILogger) -> None:
        self._initialised = True
        self._logger = expect(logger, ILogger, "logger")
        if Current.get().gpu is None:
            # What the bindings make of a null pointer (seen with stand-ins for the library).
            log(logger, "ERROR", _NO_DEVICE)
            raise TypeError("pybind11::init(): factory function returned nullptr")

    @property
    def logger(self) -> ILogger:
        return self._logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        """NvInfer.h createNetworkV2.

        Raises:
            MisuseError: it is not strongly typed. TensorRT before 11 would choose types itself.
        """
        state = Current.get()
        strong = state.enum("NetworkDefinitionCreationFlag").STRONGLY_TYPED
        if not whole(flags, "flags") >> int(strong) & 1 and not state.since(11, 0):
            raise MisuseError("a network that is not strongly typed: TensorRT would choose types itself")
        return INetworkDefinition.empty(self, True)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig.fresh(self._logger)

    def create_optimization_profile(self) -> IOptimizationProfile:
        made: IOptimizationProfile = IOptimizationProfile.make(_ranges={})
        return made

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None:
        content = self._build(network, config)
        return None if content is None else IHostMemory(content)

    def build_serialized_network_to_stream(
        self, network: INetworkDefinition, config: IBuilderConfig, writer: IStreamWriter
    ) -> bool:
        expect(writer, IStreamWriter, "writer")
        content = self._build(network, config)
        if content is None:
            return False
        if not written(writer, content):
            log(self._logger, "ERROR", "the stream writer did not take all")
            return False
        return True

    def _build(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        state = Current.get()
        expect(network, INetworkDefinition, "network")
        expect(config, IBuilderConfig, "config")
        state.builds.append((network, config))
        if reasons := list(refusals(network, config)):
            log(self._logger, "ERROR", reasons[0])
            return None
        aliased = network.aliases()
        # NvInferRuntime.h IPluginV3OneBuildV2::getAliasedInput is only asked with kALIASED_PLUGIN_IO_10_03;
        # without it whole caches are copied at each step.
        if aliased and "ALIASED_PLUGIN_IO_10_03" not in config._preview:
            raise MisuseError("a plugin aliases its inputs, but the preview feature is not set")
        plan = _plan(state, network, config, aliased)
        if not self._affordable(state, config, plan):
            return None
        if not _proceed(config._monitor, len(network)):
            log(self._logger, "ERROR", "the build was cancelled by the progress monitor")
            return None
        kernels = {f"{layer.name}" for layer in network._layers}
        state.measured += len(kernels) if config._timing is None else config._timing.measure(kernels)
        return write(plan)

    def _affordable(self, state: State, config: IBuilderConfig, plan: Plan) -> bool:
        limit = config._limits.get("WORKSPACE", state.cuda.total)
        if state.workspace_needed > limit:
            log(self._logger, "ERROR", "insufficient memory: a layer needs more workspace")
            return False
        free, _ = state.cuda.memory()
        if plan.weight_bytes > free and not plan.streaming:
            log(self._logger, "ERROR", f"OutOfMemory: requested size was {plan.weight_bytes} bytes")
            return False
        return True


def _plan(state: State, network: INetworkDefinition, config: IBuilderConfig, aliased: dict[str, str]) -> Plan:
    assert network._graph is not None
    return described(
        Plan(
            version=state.version,
            gpu=state.gpu,
            compatibility=config._hardware.name,
            graph=network._graph.SerializeToString(),
            opset=network._opset,
            constants=network._constants,
            inputs=[Tensor(t._name, t._shape, t._kind) for t in network._inputs],
            outputs=[Tensor(t._name, t._shape, t._kind) for t in network._outputs],
            profiles=[dict(profile._ranges) for profile in config._profiles],
            aliases=aliased,
            flags=frozenset(config._flags),
            verbosity=config._verbosity.name,
            debug=list(network._debug),
        )
    )


def _proceed(monitor: IProgressMonitor | None, layers: int) -> bool:
    """Report phases within phases; whether the monitor lets the build go on.

    NvInferRuntime.h IProgressMonitor: calls come from several threads; after a refusal, open phases finish.
    """
    if monitor is None:
        return True
    outer, inner = "Building engine", "Selecting tactics"
    failures: list[BaseException] = []
    going = []

    def select() -> None:
        try:
            going.append(_phase(monitor, inner, outer, layers, lambda step: True))
        except BaseException as error:
            failures.append(error)

    def step(index: int) -> bool:
        if index == 1:
            worker = threading.Thread(target=select, name="fake-tensorrt")
            worker.start()
            worker.join()
            return bool(going and going[0])
        return True

    done = _phase(monitor, outer, None, 3, step)
    if failures:
        raise failures[0]
    return done


def _phase(monitor: IProgressMonitor, name: str, parent: str | None, steps: int, work: Any) -> bool:
    called(monitor.phase_start, name, parent, steps, otherwise=None)
    going = True
    for step in range(steps):
        # An exception counts as a refusal (pyCore.cpp PyProgressMonitor::stepComplete).
        going = work(step) and bool(called(monitor.step_complete, name, step, otherwise=False))
        if not going:
            break
    called(monitor.phase_finish, name, otherwise=None)
    return going
