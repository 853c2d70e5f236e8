# SPDX-License-Identifier: Apache-2.0
"""What ``starkv validate engine`` compares an engine with, and what it makes of the differences."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from starkv.cli.engine_layers import OnnxLayers, TensorRTLayers, shown_layers
from starkv.cli.engine_outputs import KEPT_ROWS, TOKENS, Case
from starkv.cli.engine_runner import Comparison, Difference, agreement
from starkv.cli.engine_tolerances import Tolerances
from starkv.cli.engines import engine_directory
from starkv.errors import UsageError
from starkv.manifest import MANIFEST_NAME, Manifest, read_manifest
from starkv.runtime.engines.base import Engine, Rope
from starkv.runtime.engines.opening import open_engine
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.preprocess.image import preprocess
from starkv.runtime.preprocess.positions import rope_tables, text_positions
from starkv.validation.report import Check

_LAYER_ROWS = 128
"""Rows of the prompt that layers are compared on; one prefill call holds it."""


@dataclass(frozen=True)
class Reference:
    """What an engine is compared with."""

    name: str
    directory: Path
    """An ONNX Runtime engine in float32 activations."""
    checkpoint: Path | None
    """Of the PyTorch reference; None where the engine itself is the reference."""


def find_reference(
    directory: Path, manifest: Manifest, given: Path | None, against: str, checkpoint: Path | None
) -> Reference:
    """What to compare with.

    Raises:
        UsageError: there is none, or it is the engine itself.
    """
    if against == "torch" and checkpoint is None:
        raise UsageError("--against torch needs the weights: --checkpoint FOLDER")
    if against == "ort" and checkpoint is not None:
        raise UsageError("--checkpoint is for --against torch")
    own = manifest.backend == "ort" and manifest.compute_dtype == "float32"
    preset = manifest.quantization.preset
    place = given or (directory if own else engine_directory(manifest.name, "ort", preset))
    if not (place / MANIFEST_NAME).is_file():
        raise UsageError(
            f"there is no engine at {place} to compare with; build it with `starkv build {manifest.name} "
            f"--backend ort --quant {preset}`, or name one with --reference"
        )
    if against == "ort" and place.resolve() == directory.resolve():
        raise UsageError(f"{directory} would be compared with itself; name another engine with --reference")
    found = read_manifest(place)
    if found.backend != "ort" or found.compute_dtype != "float32":
        raise UsageError(f"{place} is no engine of ONNX Runtime for processors; name one with --reference")
    if (found.text, found.vision) != (manifest.text, manifest.vision):
        raise UsageError(f"{place} is another model than {directory}; name one of {manifest.name}")
    return Reference("PyTorch" if checkpoint else "ONNX Runtime", place, checkpoint)


def open_reference(reference: Reference) -> Engine:
    """The engine to compare with."""
    if reference.checkpoint is None:
        return open_engine(reference.directory)
    from starkv.runtime.engines.torch_reference import TorchReferenceEngine

    return TorchReferenceEngine.load(reference.directory, reference.checkpoint)


def output_checks(comparison: Comparison, bounds: Tolerances, blank: Check) -> Iterator[Check]:
    """One check for each kind of output, and one each for kept rows and tokens."""
    kinds: dict[str, list[Difference]] = defaultdict(list)
    for difference in comparison.differences:
        kinds[difference.name.partition(" ")[0].partition(".")[0]].append(difference)
    for kind, found in kinds.items():
        check = replace(blank, case=kind)
        worst = max(found, key=lambda difference: difference.error)
        measures = {"error": worst.error, "mean_error": worst.mean_error, "tolerance": bounds.values}
        if not bounds.applies_to(kind):
            reason = "the weights were rounded differently"
            yield replace(check, status="skipped", reason=reason, measures=measures)
            continue
        failures = [] if all(each.passed for each in found) else [f"{worst.name} is off by {worst.error:.1e}"]
        yield check.finished(failures, measures)
    for name, least in ((KEPT_ROWS, bounds.kept_rows), (TOKENS, bounds.tokens)):
        share = agreement(comparison, name)
        failures = [] if share >= least else [f"only {share:.1%} are the same"]
        yield replace(blank, case=name).finished(failures, {"kept_agreement": share, "tolerance": least})


def compare_layers(
    tested: Engine,
    directory: Path,
    reference: Reference,
    case: Case,
    bounds: Tolerances,
    blank: Check,
) -> list[Check]:
    """One check for each layer, in their order."""
    if reference.checkpoint is not None:
        raise UsageError("--layers compares with ONNX Runtime; leave --against torch out")
    manifest = tested.manifest
    image = preprocess(case.prompt.image, manifest.vision, manifest.image)
    ids = (np.arange(_LAYER_ROWS) * 7919 % manifest.text.vocab).tolist()
    embeds = tested.embed(ids)
    if case.image_embeds is not None:
        embeds = np.concatenate([embeds[: _LAYER_ROWS // 2], case.image_embeds])[:_LAYER_ROWS]
    rope = Rope(*rope_tables(text_positions(len(embeds)).values, manifest.text))
    with shown_layers(reference.directory) as shown:
        expected = shown.layers(image, embeds, rope)
        if isinstance(tested, TrtEngine):
            actual = TensorRTLayers(tested).layers(image, embeds, rope)
        else:
            with shown_layers(directory) as own:
                source: OnnxLayers = own
                actual = source.layers(image, embeds, rope)
    checks, first = [], True
    for name, array in expected.items():
        check = replace(blank, case=name)
        if name not in actual:
            checks.append(replace(check, status="skipped", reason="the engine does not show it"))
            continue
        difference = np.abs(actual[name].astype(np.float32).reshape(array.shape) - array)
        error = float(difference.max() / (np.abs(array).max() or 1.0))
        failures = []
        if not error <= bounds.values:
            failures = ["the first layer that differs" if first else f"off by {error:.1e}"]
            first = False
        measures = {"error": error, "mean_error": float(difference.mean()), "tolerance": bounds.values}
        checks.append(check.finished(failures, measures))
    return checks
