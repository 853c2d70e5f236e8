# SPDX-License-Identifier: Apache-2.0
"""What an engine is compared with: a reference, and where there is one, the reference rounded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from starkv.cli.engine_copies import Change, changed_copy
from starkv.cli.engine_layers import LayerSource, TensorRTLayers, shown_layers
from starkv.cli.engine_outputs import Case, outputs_of, prompt_inputs
from starkv.cli.engine_rounding import rounding
from starkv.cli.engine_runner import Contestant, Run
from starkv.cli.engines import engine_directory
from starkv.errors import UsageError
from starkv.manifest import MANIFEST_NAME, ComputeDtype, Manifest, read_manifest
from starkv.runtime.engines.base import Engine, EngineInfo
from starkv.runtime.engines.opening import open_engine
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.preprocess.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Match:
    """An engine and what it is compared with."""

    tested: Path
    manifest: Manifest
    """Of the engine."""
    reference: Path
    """An ONNX Runtime engine in float32."""
    checkpoint: Path | None
    """Of the PyTorch reference; None where ``reference`` itself is what to compare with."""

    @property
    def reference_name(self) -> str:
        return "PyTorch" if self.checkpoint else "ONNX Runtime"

    @property
    def same_weights(self) -> bool:
        """Whether the engine's weights were rounded to what the reference's were."""
        if self.checkpoint:
            return self.manifest.quantization.decoder == "fp32"
        return self._reference_is_quantized_alike

    @property
    def rounded(self) -> ComputeDtype | None:
        """What ``reference`` can be run in to see what rounding does to this engine's weights; None where
        there is nothing to be seen or it has others."""
        dtype = self.manifest.compute_dtype
        return dtype if dtype != "float32" and self._reference_is_quantized_alike else None

    @property
    def _reference_is_quantized_alike(self) -> bool:
        return read_manifest(self.reference).quantization.decoder == self.manifest.quantization.decoder


def find_match(tested: Path, given: Path | None, against: str, checkpoint: Path | None) -> Match:
    """What to compare an engine with.

    Args:
        tested: the engine's directory.
        given: the reference's; found by the engine's name if None.
        against: ``ort`` or ``torch``.
        checkpoint: folder of the weights, with ``torch``.

    Raises:
        EngineError: a directory is no engine, or damaged.
        UsageError: there is no reference, or it is the engine itself.
    """
    manifest = read_manifest(tested)
    if against == "torch" and checkpoint is None:
        raise UsageError("--against torch needs the weights: --checkpoint FOLDER")
    if against == "ort" and checkpoint is not None:
        raise UsageError("--checkpoint is for --against torch")
    own = manifest.backend == "ort" and manifest.compute_dtype == "float32"
    preset = manifest.quantization.preset
    place = given or (tested if own else engine_directory(manifest.name, "ort", preset))
    if not (place / MANIFEST_NAME).is_file():
        raise UsageError(
            f"there is no engine at {place} to compare with; build it with `starkv build {manifest.name} "
            f"--backend ort --quant {preset}`, or name one with --reference"
        )
    if against == "ort" and place.resolve() == tested.resolve():
        raise UsageError(f"{tested} would be compared with itself; name another engine with --reference")
    found = read_manifest(place)
    if found.backend != "ort" or found.compute_dtype != "float32":
        raise UsageError(f"{place} is no engine of ONNX Runtime for processors; name one with --reference")
    if (found.text, found.vision) != (manifest.text, manifest.vision):
        raise UsageError(f"{place} is another model than {tested}; name one of {manifest.name}")
    return Match(tested, manifest, place, checkpoint)


def output_contestants(
    match: Match, cases: list[Case], opened: Callable[[EngineInfo], None]
) -> list[Contestant]:
    """Reference and engine, then the rounded reference if there is to be one.

    Args:
        match: the engines.
        cases: what they will run; the reference leaves its image tokens and replies in them.
        opened: told about the engine when it opens.
    """
    tokenizer = ChatTokenizer.from_directory(match.tested)

    def of(engine: Engine) -> Run:
        return lambda case: outputs_of(engine, tokenizer, cases[case])

    @contextmanager
    def reference() -> Iterator[Run]:
        yield of(_open_reference(match))

    @contextmanager
    def tested() -> Iterator[Run]:
        engine = open_engine(match.tested)
        opened(engine.info)
        yield of(engine)

    @contextmanager
    def rounded(dtype: ComputeDtype) -> Iterator[Run]:
        with changed_copy(match.reference, rounding(dtype)) as copy:
            yield of(OrtEngine(copy, verify=False))

    found = [Contestant(match.reference_name, reference), Contestant("engine", tested)]
    if match.rounded:
        found.append(Contestant("rounded", partial(rounded, match.rounded)))
    return found


def layer_contestants(match: Match, cases: list[Case]) -> list[Contestant]:
    """The same, layer by layer; the cases know their image tokens.

    Raises:
        UsageError: PyTorch shows no layers.
    """
    if match.checkpoint is not None:
        raise UsageError("--layers compares with ONNX Runtime; leave --against torch out")
    if match.manifest.backend == "ort" and match.manifest.compute_dtype != "float32":
        raise UsageError("--layers is for TensorRT and for ONNX Runtime on processors; leave it out")
    tokenizer = ChatTokenizer.from_directory(match.tested)

    def of(source: LayerSource) -> Run:
        return lambda case: source.layers(prompt_inputs(source.engine, tokenizer, cases[case]))

    @contextmanager
    def on_onnx_runtime(directory: Path, *changes: Change) -> Iterator[Run]:
        with shown_layers(directory, *changes) as shown:
            yield of(shown)

    @contextmanager
    def on_tensorrt() -> Iterator[Run]:
        yield of(TensorRTLayers(TrtEngine(match.tested)))

    tested = on_tensorrt if match.manifest.backend == "trt" else partial(on_onnx_runtime, match.tested)
    found = [
        Contestant(match.reference_name, partial(on_onnx_runtime, match.reference)),
        Contestant("engine", tested),
    ]
    if match.rounded:
        found.append(
            Contestant("rounded", partial(on_onnx_runtime, match.reference, rounding(match.rounded)))
        )
    return found


def _open_reference(match: Match) -> Engine:
    if match.checkpoint is None:
        return open_engine(match.reference)
    from starkv.runtime.engines.torch_reference import TorchReferenceEngine

    return TorchReferenceEngine.load(match.reference, match.checkpoint)
