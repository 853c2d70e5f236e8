# SPDX-License-Identifier: Apache-2.0
"""From seconds of alternating rounds to rates, ratios and verdicts."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peers_models import GENAI, LLAMA_CPP, STARKV, SYSTEMS


@dataclass(frozen=True)
class Test:
    """One row of the table: the same work for all, except that starkv may have compacted its cache."""

    name: str
    tokens: int
    """Tokens of one measurement."""
    rows: int
    """Rows cached before; ``-1`` for a prefill, which has none."""
    kept: int
    """Rows that starkv has of them."""
    bars: Mapping[str, float]
    """System → how many times faster than it starkv shall be at least."""

    @property
    def is_prefill(self) -> bool:
        return self.rows < 0

    def peer_name(self) -> str:
        """Name of the test whose measurements of the other systems count here."""
        return decode_name(self.rows) if self.kept != self.rows else self.name


def decode_name(rows: int) -> str:
    return f"decode @ {rows}"


def plan_tests(
    depths: Sequence[int], prefill: int, tokens: int, compacted: tuple[int, int] | None
) -> list[Test]:
    """Tests in the order in which a round runs them.

    Args:
        depths: cached rows of the decode tests.
        prefill: tokens of the prefill test.
        tokens: tokens that a decode test decodes.
        compacted: rows of a full cache and what compaction keeps of them.
    """
    even = {LLAMA_CPP: 1.0, GENAI: 1.0}
    tests = [Test(f"prefill {prefill}", prefill, -1, -1, {LLAMA_CPP: 1.2, GENAI: 1.0})]
    tests += [Test(decode_name(depth), tokens, depth, depth, even) for depth in depths]
    if compacted:
        rows, kept = compacted
        name = f"decode @ {rows}, ours compacted to {kept}"
        tests.append(Test(name, tokens, rows, kept, {LLAMA_CPP: 2.0, GENAI: 1.0}))
    return tests


Samples = Mapping[str, Mapping[str, Sequence[float]]]
"""Test → system → seconds of each round."""


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How many times faster we are: the median over rounds, each compared within itself."""
    return statistics.median(their / our for our, their in zip(ours, theirs, strict=True))


def figures(tests: Sequence[Test], samples: Samples) -> dict[str, Any]:
    """What the JSON file says of each test: rates of all systems, ratios, whether the bars are met."""
    result: dict[str, Any] = {}
    for test in tests:
        ours = samples.get(test.name, {}).get(STARKV)
        if not ours:
            continue
        row: dict[str, Any] = {"tokens": test.tokens, "systems": {STARKV: _rates(test, ours)}, "ratios": {}}
        for system in SYSTEMS[1:]:
            theirs = samples.get(test.peer_name(), {}).get(system)
            if not theirs:
                continue
            measured = ratio(ours, theirs)
            row["systems"][system] = _rates(test, theirs)
            row["ratios"][system] = {
                "median": measured,
                "of_minima": min(theirs) / min(ours),
                "bar": test.bars[system],
                "met": measured >= test.bars[system],
            }
        result[test.name] = row
    return result


def _rates(test: Test, seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "seconds": list(seconds),
        "tokens_per_second_median": test.tokens / statistics.median(seconds),
        "tokens_per_second_best": test.tokens / min(seconds),
    }


def markdown(size: str, measured: Mapping[str, Any]) -> list[str]:
    """Lines of a table: tokens per second (median, best), and our speed against theirs with its bar."""
    lines = [
        f"| {size} | starkv | llama.cpp | ORT GenAI | against llama.cpp | against ORT GenAI |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in measured.items():
        rates = [_rate_cell(row["systems"].get(system)) for system in SYSTEMS]
        ratios = [_ratio_cell(row["ratios"].get(system)) for system in SYSTEMS[1:]]
        lines.append(f"| {' | '.join([name, *rates, *ratios])} |")
    return lines


def _rate_cell(rates: Mapping[str, Any] | None) -> str:
    if rates is None:
        return ""
    return f"{rates['tokens_per_second_median']:.1f} ({rates['tokens_per_second_best']:.1f})"


def _ratio_cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    sign = "≥" if entry["met"] else "**<**"
    return f"{entry['median']:.2f} {sign} {entry['bar']:.1f}"
