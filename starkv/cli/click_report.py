# SPDX-License-Identifier: Apache-2.0
"""The report of ``starkv validate clicks``: the same sections for the terminal, Markdown and HTML."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from starkv.cli.click_checks import COMPRESSION, LATENCY, MEMORY, PARITY, QUANTIZATION
from starkv.cli.click_engines import has_random_weights
from starkv.cli.click_report_cells import number, share
from starkv.cli.kv_combination_checks import HEADER, PACKING, TEXT, TITLE, combination_row
from starkv.manifest import Manifest
from starkv.validation.quant import SIGNIFICANCE
from starkv.validation.report import Check, Report, markdown_table

_KIB, _MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Section:
    """One table."""

    title: str
    text: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """The first cell is the check's status."""


@dataclass(frozen=True)
class Document:
    """Everything that a reader sees, but for the pictures."""

    title: str
    passed: bool
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    sections: tuple[Section, ...]

    def markdown(self) -> str:
        """As one page of Markdown."""
        verdict = "**passed**" if self.passed else "**failed**"
        parts = [f"# {self.title}: {verdict}"]
        parts.append("\n".join(f"* {name}: {value}" for name, value in self.facts))
        if self.notes:
            parts.append("\n".join(f"> {note}" for note in self.notes))
        for section in self.sections:
            rows = [[cell.replace("|", "\\|") for cell in row] for row in section.rows]
            parts += [f"## {section.title}", section.text, markdown_table(section.header, rows)]
        return "\n\n".join(parts) + "\n"


def document(report: Report, manifest: Manifest, seed: int, skipped: int) -> Document:
    """Lay a report out.

    Args:
        report: with the checks.
        manifest: of the engine.
        seed: of the questions.
        skipped: questions that could not be asked.
    """
    quantization = manifest.quantization
    counts = ", ".join(f"{report.count(status)} {status}" for status in ("passed", "failed", "skipped"))
    facts = (
        ("engine", f"{manifest.name}, {manifest.backend}, {quantization.preset} ({manifest.compute_dtype})"),
        ("manifest", manifest.manifest_sha256[:12] or "not sealed"),
        ("ran on", f"{report.device}, {report.date}, {report.threads} processors"),
        ("questions", f"seed {seed}" + (f"; {skipped} could not be asked" if skipped else "")),
        ("checks", counts),
        ("versions", ", ".join(f"{name} {value}" for name, value in report.versions.items())),
    )
    notes = []
    if has_random_weights(manifest):
        notes.append(
            "The weights are random: accuracy means nothing here. Equal replies, times and bytes do."
        )
    sections = [
        Section(
            title, text, header, tuple(row(check) for check in report.checks if check.subject in subjects)
        )
        for title, text, subjects, header, row in _SECTIONS
    ]
    filled = tuple(section for section in sections if section.rows)
    return Document(f"Clicks of {manifest.name}", report.passed, facts, tuple(notes), filled)


def _bounds(measures: Mapping[str, float]) -> str:
    """What would have failed, in words."""
    words = []
    if "tolerance_same_replies" in measures:
        words.append(f"same replies ≥ {measures['tolerance_same_replies']:.0%}")
    if "tolerance_lost" in measures:
        words.append(f"net loss ≤ {measures['tolerance_lost']:.0%} or chance (p ≥ {SIGNIFICANCE:g})")
    if "tolerance_kept" in measures:
        words.append(f"rows kept ≤ {measures['tolerance_kept']:.0%}")
    if "tolerance_loss" in measures:
        words.append(f"loss ≤ {measures['tolerance_loss']:.0%} within the interval")
    return "; ".join(words)


def _pair(check: Check) -> tuple[str, ...]:
    found = check.measures
    counts = " / ".join(number(found, f"clicks_{name}", ".0f") for name in ("lost", "won")) if found else ""
    return (
        check.status,
        check.case,
        f"{check.implementation} against {check.reference}",
        share(found, "accuracy"),
        share(found, "reference_accuracy"),
        share(found, "difference", signed=True),
        counts,
        number(found, "same_replies", ".1%"),
        number(found, "same_clicks", ".1%"),
        number(found, "distance", ".1f"),
        _bounds(found),
        check.reason,
    )


def _budget(check: Check) -> tuple[str, ...]:
    found = check.measures
    return (
        check.status,
        check.case,
        check.implementation,
        share(found, "accuracy"),
        share(found, "difference", signed=True),
        number(found, "same_replies", ".1%"),
        number(found, "distance", ".1f"),
        number(found, "kept_share", ".1%"),
        number(found, "compress_ms_median", ".2f"),
        _bounds(found),
        check.reason,
    )


_STAGES = ("vision", "prefill", "compress", "decode_per_token")


def _latency(check: Check) -> tuple[str, ...]:
    def cell(stage: str) -> str:
        ends = [number(check.measures, f"{stage}_ms_{end}", ".2f") for end in ("median", "p95")]
        return " / ".join(ends) if all(ends) else ""

    return (check.status, check.case, *(cell(stage) for stage in _STAGES))


def _memory(check: Check) -> tuple[str, ...]:
    found = check.measures
    names = ("full", "kept", "held", "reserved")
    cells = (number(found, f"kv_bytes_{name}", ",.0f", 1 / _KIB) for name in names)
    peak = number(found, "peak_mib", ",.0f")
    return (check.status, check.case, check.implementation, *cells, peak, check.reason)


_Row = Callable[[Check], tuple[str, ...]]
_PAIR_HEADER = (
    "",
    "task",
    "compared",
    "accuracy",
    "reference",
    "difference",
    "lost / won",
    "same replies",
    "same clicks",
    "off by, px",
    "bound",
    "why",
)
_SECTIONS: Sequence[tuple[str, str, tuple[str, ...], tuple[str, ...], _Row]] = (
    (
        "Against PyTorch",
        "The same questions to a PyTorch decoder with the checkpoint's weights in float32, behind the "
        "engine's own vision tower. Shares with their 95 % intervals.",
        (PARITY,),
        _PAIR_HEADER,
        _pair,
    ),
    (
        "What quantization changes",
        "The same questions to the engine in fp32 of the same model.",
        (QUANTIZATION,),
        _PAIR_HEADER,
        _pair,
    ),
    (
        "What compression changes",
        "STaR-KV at each budget against the whole cache of this engine, from one prefill per question. "
        "Accuracy of the official mode is shown, not judged.",
        (COMPRESSION,),
        (
            "",
            "task",
            "mode, budget",
            "accuracy",
            "difference",
            "same replies",
            "off by, px",
            "rows kept",
            "compress, ms",
            "bound",
            "why",
        ),
        _budget,
    ),
    (TITLE, TEXT, (PACKING,), HEADER, combination_row),
    (
        "Latency",
        "Milliseconds with the whole cache, median / 95th percentile over the questions but the first.",
        (LATENCY,),
        ("", "task", "vision", "prefill", "compress", "decode per token"),
        _latency,
    ),
    (
        "Memory",
        "KiB of the KV cache, mean over the questions: of the prompt, kept of it, held after the reply, "
        "reserved at the peak. MiB at the process's peak, or in use on a GPU. Bound: kept ≤ full, held ≤ "
        "reserved.",
        (MEMORY,),
        ("", "task", "cache", "full", "kept", "held", "reserved", "peak, MiB", "why"),
        _memory,
    ),
)
