# SPDX-License-Identifier: Apache-2.0
"""What ``starkv validate engine`` makes of the outputs of an engine, its reference and a rounded run."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from itertools import chain

import numpy as np

from starkv.cli.engine_outputs import KEPT_ROWS, TOKENS, Outputs
from starkv.cli.engine_reference import Match
from starkv.cli.engine_tolerances import (
    Tolerances,
    float32_tolerances,
    other_weights_tolerances,
    rounded_tolerances,
)
from starkv.validation.outputs import MEASURES, Deviation, share_of_equal, summaries
from starkv.validation.report import Check

_AGREEMENTS = (KEPT_ROWS, TOKENS)


def deviations(reference: Sequence[Outputs], engine: Sequence[Outputs]) -> dict[str, Deviation]:
    """Tensor → how far it is off, over all cases."""
    return summaries([_numbers(each) for each in reference], [_numbers(each) for each in engine])


def agreement(reference: Sequence[Outputs], engine: Sequence[Outputs], name: str) -> float:
    """Share of equal entries of kept rows or tokens, over all cases.

    Args:
        reference: of each case.
        engine: likewise.
        name: ``kept_rows`` or ``tokens``.
    """
    pairs = [(right[name], other[name]) for right, other in zip(reference, engine, strict=True)]
    shares = [share_of_equal(*pair) for pair in pairs]
    return float(np.average(shares, weights=[right.size for right, _ in pairs]))


def bounds_for(match: Match, reference: Sequence[Outputs], rounded: Sequence[Outputs] | None) -> Tolerances:
    """What the engine is held to.

    Args:
        match: the engines.
        reference: what came out, for each case.
        rounded: likewise of the rounded reference; None if there was none.
    """
    if rounded is not None:
        seen = deviations(reference, rounded)
        if TOKENS not in reference[0]:
            return rounded_tolerances(seen)
        rows, tokens = (agreement(reference, rounded, name) for name in _AGREEMENTS)
        return rounded_tolerances(seen, rows, tokens, sum(each[TOKENS].size for each in reference))
    if match.same_weights and match.manifest.compute_dtype == "float32":
        return float32_tolerances()
    return other_weights_tolerances(match.manifest.quantization)


def _numbers(outputs: Outputs) -> Outputs:
    return {name: tensor for name, tensor in outputs.items() if name not in _AGREEMENTS}


def output_checks(
    reference: Sequence[Outputs], engine: Sequence[Outputs], bounds: Tolerances, blank: Check
) -> Iterator[Check]:
    """One check for each kind of output, such as the keys of all layers, and for kept rows and tokens."""
    kinds: dict[str, dict[str, Deviation]] = defaultdict(dict)
    for name, found in deviations(reference, engine).items():
        kinds[name.partition(".")[0]][name] = found
    for kind, tensors in kinds.items():
        yield _kind_check(tensors, bounds, replace(blank, case=kind))
    for name, least in ((KEPT_ROWS, bounds.kept_rows), (TOKENS, bounds.tokens)):
        share = agreement(reference, engine, name)
        failures = [] if share >= least else [f"only {share:.1%} are the same"]
        yield replace(blank, case=name).finished(
            failures, {"kept_agreement": share, "tolerance_kept_agreement": least}
        )


def layer_checks(
    reference: Sequence[Outputs], engine: Sequence[Outputs], bounds: Tolerances, blank: Check
) -> list[Check]:
    """One check for each layer, in their order; the first one of vision tower and decoder that differs is
    named."""
    checks, wrong = [], set()
    shown = set(chain.from_iterable(engine))
    for name, found in deviations(reference, engine).items():
        check = replace(blank, case=name)
        if name not in shown:
            checks.append(replace(check, status="skipped", reason="the engine does not show it"))
            continue
        check = _kind_check({name: found}, bounds, check)
        tower = name.partition(".")[0]
        if check.status == "failed" and tower not in wrong:
            wrong.add(tower)
            part = "vision tower" if tower == "blocks" else "decoder"
            check = replace(check, reason=f"the first layer of the {part} that differs: {check.reason}")
        checks.append(check)
    return checks


def _kind_check(tensors: Mapping[str, Deviation], bounds: Tolerances, check: Check) -> Check:
    """The check of a kind of tensors; its measures are those of the one that is nearest to its bounds, or
    farthest beyond."""
    limits = {name: limit for name in tensors if (limit := bounds.of(name))}
    if not limits:
        reason = "the weights were rounded differently"
        farthest = max(tensors.values(), key=lambda found: found.total)
        return replace(check, status="skipped", reason=reason, measures=_measures(farthest, ""))
    worst = max(limits, key=lambda name: _excess(tensors[name], limits[name]))
    found, limit = tensors[worst], limits[worst]
    beyond = ", ".join(f"{measure} {getattr(found, measure):.1e}" for measure in found.beyond(limit))
    failures = [f"{worst} is off: {beyond}"] if beyond else []
    return check.finished(failures, _measures(found, "") | _measures(limit, "tolerance_"))


def _excess(found: Deviation, limit: Deviation) -> float:
    shares: list[float] = [value / bound for value, bound in zip(astuple(found), astuple(limit), strict=True)]
    return max(shares)


def _measures(deviation: Deviation, prefix: str) -> dict[str, float]:
    """As a report names them: ``error`` is the largest, everywhere."""
    names = ("error", *(f"{name}_error" for name in MEASURES[1:]))
    return {prefix + name: value for name, value in zip(names, astuple(deviation), strict=True)}
