# SPDX-License-Identifier: Apache-2.0
"""When a context may run: what TensorRT refuses, and what it leaves undefined."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fake_tensorrt.shapes import ShapeError
from fake_tensorrt.state import MisuseError

if TYPE_CHECKING:
    from fake_tensorrt.context import IExecutionContext


def unready(context: "IExecutionContext") -> Iterator[str]:
    """Why TensorRT refuses to run."""
    for name in context._engine._tensors:
        # "each input must have a non-null address and each output" (setTensorAddress).
        if not context._addresses.get(name):
            yield f"{name} has no address"
    for name, tensor in context._inputs().items():
        if name not in context._shapes and -1 in tensor.shape:
            yield f"{name} has no shape"
    try:
        context._output_shapes()
    except ShapeError as error:
        yield str(error)


def check_use(context: "IExecutionContext", stream: int) -> None:
    """Refuse what TensorRT leaves undefined."""
    engine, cuda = context._engine, context._state.cuda
    # "Using default stream may lead to performance issues" (enqueueV3); it can't be captured, either.
    if not stream:
        raise MisuseError("an engine runs on the default stream, which waits for all others")
    if not engine._ready:
        raise MisuseError("a stripped plan is used before its weights are refitted")
    if not context._chosen:
        raise MisuseError("no profile is set, and the engine has several")
    if any(other != stream for other in context._life.moving):
        raise MisuseError("the profile was set on another stream, and nobody waits for it")
    if context._strategy == "USER_MANAGED":
        if context._scratch is None:
            raise MisuseError("a context without memory for its activations")
        check_scratch(context)
    for output, source in engine._plan.aliases.items():
        # NvInferRuntime.h IPluginV3OneBuildV2::getAliasedInput: TensorRT copies where they differ.
        ends = output in engine._tensors and source in engine._tensors
        if ends and context._addresses[output] != context._addresses[source]:
            raise MisuseError(f"{output} does not share the memory of {source}")
    if stream in cuda.capturing:
        # "If the Engine is streaming weights … the graph will not be capturable" (enqueueV3).
        if engine.streams():
            raise MisuseError("a graph is captured while weights are streamed")
        # Developer guide, CUDA graphs: enqueueV3 once after a change of shapes, before the capture.
        if not context._settled:
            raise MisuseError("a graph is captured before the shapes have run once")


def check_scratch(context: "IExecutionContext") -> None:
    """Whether the memory given is large enough for the profile, or for the shapes it was measured for."""
    assert context._scratch is not None
    needed = context._engine.get_device_memory_size_for_profile_v2(context._profile)
    if context._partition and (not context._shapes or context._partition == context._shapes):
        needed = context._engine.scratch(context._all_shapes() | context._partition)
    if context._scratch[1] < needed:
        raise MisuseError(f"{context._scratch[1]} bytes for activations, {needed} are needed")
