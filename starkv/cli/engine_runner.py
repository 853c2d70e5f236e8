# SPDX-License-Identifier: Apache-2.0
"""Two engines under Polygraphy: it runs both on the same cases and compares what they put out."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.cli.engine_outputs import KEPT_ROWS, TOKENS, Outputs
from starkv.errors import UsageError

Run = Callable[[int], Outputs]
"""Outputs of an engine on a case."""
_CASE = "case"


@dataclass(frozen=True)
class Difference:
    """One output of two engines."""

    name: str
    error: float
    """Largest difference, as a share of the reference's largest number."""
    mean_error: float
    passed: bool


@dataclass(frozen=True)
class Comparison:
    """Two engines on some cases."""

    differences: list[Difference]
    outputs: tuple[list[Outputs], list[Outputs]]
    """Of the reference and of the engine, per case."""


def compare_engines(
    reference: tuple[str, Run],
    engine: tuple[str, Run],
    cases: int,
    tolerance: float,
    save: Path | None = None,
) -> Comparison:
    """Run both engines on all cases and compare every output.

    Args:
        reference: name and runs; goes first.
        engine: likewise.
        cases: how many.
        tolerance: largest error, as a share of a tensor's largest number.
        save: file for Polygraphy's results, which ``polygraphy inspect data`` reads.

    Raises:
        UsageError: Polygraphy is not installed.
    """
    try:
        from polygraphy.comparator import Comparator
        from polygraphy.logger import G_LOGGER
    except ImportError:
        raise UsageError(
            "comparing engines needs the package polygraphy; pip install 'starkv[trt]' or polygraphy"
        ) from None
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    kept: tuple[list[Outputs], list[Outputs]] = ([], [])
    runners = [_runner(*pair, outputs) for pair, outputs in zip((reference, engine), kept, strict=True)]
    feeds = [{_CASE: np.array([case])} for case in range(cases)]
    results = Comparator.run(runners, data_loader=feeds)
    if save is not None:
        results.save(str(save))
    differences = []
    for case in range(cases):
        expected, actual = (results[name][case] for name, _ in (reference, engine))
        differences += _differences(case, expected, actual, tolerance)
    return Comparison(differences, kept)


def _runner(name: str, run: Run, kept: list[Outputs]) -> Any:
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class EngineRunner(BaseRunner):  # type: ignore[misc]
        def get_input_metadata_impl(self) -> Any:
            return TensorMetadata().add(_CASE, np.int64, (1,))

        def infer_impl(self, feed_dict: dict[str, NDArray[np.int64]]) -> "OrderedDict[str, NDArray[Any]]":
            outputs = run(int(feed_dict[_CASE][0]))
            kept.append(outputs)
            self.inference_time = 0.0
            return OrderedDict((key, array) for key, array in outputs.items() if is_compared(key))

    return EngineRunner(name=name)


def is_compared(name: str) -> bool:
    """Whether an output is compared number by number."""
    return name not in (KEPT_ROWS, TOKENS)


def _differences(case: int, expected: Any, actual: Any, tolerance: float) -> list[Difference]:
    from polygraphy.comparator import CompareFunc

    scale = {name: float(np.abs(expected[name]).max()) or 1.0 for name in expected}
    bounds = {name: tolerance * size for name, size in scale.items()}
    compare = CompareFunc.simple(
        rtol=0.0, atol=bounds, check_error_stat="max", find_output_func=lambda name, *_: [name]
    )
    found = []
    for name, result in compare(expected, actual).items():
        found.append(
            Difference(
                f"{name} of prompt {case}",
                float(getattr(result, "max_absdiff", np.inf)) / scale[name],
                float(getattr(result, "mean_absdiff", np.inf)) / scale[name],
                bool(result),
            )
        )
    return found


def agreement(comparison: Comparison, name: str) -> float:
    """Share of equal entries of an output, the smallest over cases: kept rows of those that the reference
    keeps, tokens of all."""
    shares: Sequence[float] = [
        _share(reference[name], engine[name]) for reference, engine in zip(*comparison.outputs, strict=True)
    ]
    return min(shares)


def _share(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    if expected.shape != actual.shape:
        return 0.0
    if expected.dtype == bool:
        return float((expected & actual).sum() / max(1, expected.sum()))
    return float((expected == actual).mean())
