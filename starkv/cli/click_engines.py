# SPDX-License-Identifier: Apache-2.0
"""What an engine's clicks are compared with: PyTorch, and the engine of the same model in float32."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starkv.errors import CheckpointError, StarkvError, UsageError
from starkv.manifest import MANIFEST_NAME, Manifest, read_manifest
from starkv.runtime.agent import Agent

MOST_TO_BUILD = 100_000_000
"""Parameters of the largest model whose float32 engine is built unasked: 0.4 GB and some seconds."""
RANDOM_SOURCE = "random weights"


@dataclass(frozen=True)
class Rival:
    """An engine that the tested one is compared with."""

    name: str
    open: Callable[[], Agent]


@dataclass(frozen=True)
class Missing:
    """Why there is none."""

    name: str
    reason: str


def has_random_weights(manifest: Manifest) -> bool:
    """Whether what the model says means nothing."""
    return manifest.source.startswith(RANDOM_SOURCE)


def torch_rival(tested: Path, manifest: Manifest, checkpoint: Path | None) -> Rival | Missing:
    """The PyTorch reference: a decoder in float32 from the checkpoint, beside an ONNX Runtime engine.

    Args:
        tested: the engine's directory.
        manifest: its manifest.
        checkpoint: folder of the weights; looked for on this machine, and never downloaded, if None.
    """
    name = "PyTorch"
    try:
        from starkv.cli.engine_reference import find_match
        from starkv.runtime.engines.torch_reference import TorchReferenceEngine
    except ModuleNotFoundError as error:
        return Missing(name, f"the package {error.name} is missing; pip install 'starkv[trace]'")
    try:
        folder = checkpoint or _weights_here(manifest)
        reference = find_match(tested, None, "torch", folder).reference
    except StarkvError as error:
        return Missing(name, str(error))

    def opened() -> Agent:
        engine = TorchReferenceEngine.load(reference, folder)
        return Agent(engine, Agent.load(reference, verify=False).tokenizer)

    return Rival(name, opened)


def float_rival(tested: Path, manifest: Manifest, given: Path | None) -> Rival | Missing:
    """The engine in float32 of the same model; that of a small model is built if it is missing.

    Args:
        tested: the engine's directory.
        manifest: its manifest.
        given: the other engine's directory; found by the model's name if None.
    """
    from starkv.cli.engines import build_engine, engine_directory

    name = "fp32"
    if manifest.quantization.decoder == "fp32" and manifest.compute_dtype == "float32" and given is None:
        return Missing(name, "the engine is in fp32 itself")
    place = given or engine_directory(manifest.name, "ort", "fp32")
    if given is None and not (place / MANIFEST_NAME).is_file():
        build = f"starkv build {manifest.name} --backend ort --quant fp32"
        if manifest.parameters > MOST_TO_BUILD:
            return Missing(name, f"there is no engine at {place}; build it with `{build}`")
        try:
            _weights_here(manifest)
            place, _ = build_engine(manifest.name, "fp32", None)
        except (StarkvError, ModuleNotFoundError) as error:
            return Missing(name, f"there is no engine at {place}, and it can't be built here: {error}")
    try:
        check_reference(place, tested, manifest)
    except StarkvError as error:
        return Missing(name, str(error))
    return Rival(name, lambda: Agent.load(place))


def check_reference(place: Path, tested: Path, manifest: Manifest) -> None:
    """Refuse an engine that is not the tested one's model in float32.

    Raises:
        EngineError: it is no engine.
        UsageError: it is the tested one, another model, or itself quantized.
    """
    found = read_manifest(place)
    if place.resolve() == tested.resolve():
        raise UsageError(f"{tested} would be compared with itself; name another engine with --reference")
    if (found.text, found.vision) != (manifest.text, manifest.vision):
        raise UsageError(
            f"{place} is another model than {tested}; name one of {manifest.name} with --reference"
        )
    if found.quantization.decoder != "fp32":
        raise UsageError(
            f"{place} is quantized as {found.quantization.preset}; name one in fp32 with --reference"
        )


def _weights_here(manifest: Manifest) -> Path:
    """Folder of the weights that the engine was made from.

    Raises:
        StarkvError: they are not on this machine, or the engine's weights were random.
    """
    from starkv.export.cards import resolve_model
    from starkv.export.hub import from_hub

    if has_random_weights(manifest):
        raise CheckpointError("the engine's weights are random, and nobody kept them")

    def on_this_machine(repository: str, local: bool) -> Path:
        if not local:
            raise CheckpointError("nothing is downloaded for this")
        return from_hub(repository, local)

    return resolve_model(manifest.name, None, on_this_machine).folder
