# SPDX-License-Identifier: Apache-2.0
"""Why TensorRT would not build a network: rules of profiles, types and flags."""

from collections.abc import Iterator, Mapping

import onnx
from fake_tensorrt.config import IBuilderConfig, IOptimizationProfile
from fake_tensorrt.network import INetworkDefinition
from fake_tensorrt.program import ONE_TYPE
from fake_tensorrt.shapes import ShapeError, ShapeModel
from fake_tensorrt.state import Current

_PRECISIONS = ("FP16", "BF16", "INT8")


def refusals(network: INetworkDefinition, config: IBuilderConfig) -> Iterator[str]:
    """What is wrong, in TensorRT's words or some like them."""
    if network._graph is None or network._shapes is None:
        yield "the network has no layers"
        return
    # NvInfer.h NetworkDefinitionCreationFlag::kSTRONGLY_TYPED: no precision flags.
    for flag in sorted(config._flags & {*_PRECISIONS}):
        yield f"k{flag} can't be set for a strongly typed network"
    # NvInfer.h BuilderFlag::kREFIT_INDIVIDUAL: not together with the other two.
    if len(config._flags & {"REFIT", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL"}) > 1:
        yield "only one kind of refitting can be chosen"
    gpu = Current.get().gpu
    # NvInfer.h HardwareCompatibilityLevel::kAMPERE_PLUS.
    if config._hardware.name == "AMPERE_PLUS" and gpu is not None and gpu.capability < (8, 0):
        yield "plans for Ampere and newer can't be built on an older device"
    yield from _profiles(network, config)


def _profiles(network: INetworkDefinition, config: IBuilderConfig) -> Iterator[str]:
    """NvInfer.h addOptimizationProfile: every dynamic input has ranges.

    "Called at most once when building a refittable engine" stands there, too, but 8.6 and later refit engines
    of several profiles (NVIDIA/TensorRT issue 3268).
    """
    assert network._shapes is not None
    inputs = {tensor.name: tensor._shape for tensor in network._inputs}
    profiles = config._profiles or [IOptimizationProfile.make(_ranges={})]
    for index, profile in enumerate(profiles):
        if unknown := profile._ranges.keys() - inputs.keys():
            yield f"profile {index} is about {min(unknown)}, which is no input"
            continue
        missing = [name for name, shape in inputs.items() if -1 in shape and name not in profile._ranges]
        if missing:
            yield f"Dynamic input {missing[0]} has no optimization profile {index}"
            continue
        ranges = {name: profile._ranges.get(name, (shape,) * 3) for name, shape in inputs.items()}
        wrong = [name for name, shape in inputs.items() if not _fits(shape, ranges[name])]
        if wrong:
            yield f"profile {index} of {wrong[0]} contradicts the network"
            continue
        for corner, kind in enumerate(("kMIN", "kOPT", "kMAX")):
            shapes = {name: found[corner] for name, found in ranges.items()}
            # The builder computes all shapes at each corner of a profile.
            yield from _corner(network._shapes, shapes, f"{kind} values for profile {index}")


def _fits(shape: tuple[int, ...], ranges: tuple[tuple[int, ...], ...]) -> bool:
    return all(
        len(sizes) == len(shape)
        and all(fixed in (-1, size) for fixed, size in zip(shape, sizes, strict=True))
        for sizes in ranges
    )


def _corner(model: ShapeModel, shapes: Mapping[str, tuple[int, ...]], what: str) -> Iterator[str]:
    try:
        model.outputs(shapes)
    except ShapeError as error:
        yield f"{what} violate shape constraints: {error}"
        return
    kinds = {name: kind for name, (_, kind) in model.values(shapes).items()}
    for node in model.graph.node:
        if node.op_type in ONE_TYPE:
            yield from _one_type(node, kinds)
    for entry in model.graph.output:
        declared = entry.type.tensor_type.elem_type
        if kinds.get(entry.name, declared) != declared:
            yield f"output {entry.name} is declared with another type than it has"


def _one_type(node: onnx.NodeProto, kinds: Mapping[str, int]) -> Iterator[str]:
    """NvInfer.h NetworkDefinitionCreationFlag::kSTRONGLY_TYPED: nothing is converted without a Cast."""
    operands = node.input[1:] if node.op_type == "Where" else node.input
    found = {kinds[name] for name in operands if name in kinds}
    if len(found) > 1:
        names = " and ".join(sorted(onnx.TensorProto.DataType.Name(kind) for kind in found))
        yield f"{node.name}: operands of {names} in a strongly typed network"
