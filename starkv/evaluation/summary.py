# SPDX-License-Identifier: Apache-2.0
"""What a run comes to: its figures, what was left out, and what others have published."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from starkv.evaluation.metrics import Metric
from starkv.evaluation.published import Published, published_for
from starkv.evaluation.records import Record, Settings
from starkv.evaluation.samples import Problem
from starkv.evaluation.suites.base import Suite
from starkv.validation.report import installed_versions, markdown_table, write_text

METRIC_HEADER = ("figure", "rule", "accuracy", "95 % interval", "samples")
DISTANCE = "mean distance, px"
PUBLISHED_HEADER = ("published by others", "budget", "accuracy", "figure", "source")


@dataclass(frozen=True)
class Summary:
    """The outcome of a run."""

    settings: Settings
    metrics: Sequence[Metric]
    """The first is the one that is published."""
    samples: int
    """That were answered."""
    skipped: int
    """That could not be asked."""
    no_action: int
    """Answers that were no action."""
    limit: int | None
    """Samples that were asked for; None for all."""
    kept_share: float
    """Of the prompts' KV tokens, mean over the samples."""
    seconds: float
    """Time in the engine, of all samples, also those of an earlier run."""
    problems: Sequence[Problem]
    notes: Sequence[str]
    published: Sequence[Published]

    @property
    def headline(self) -> Metric:
        return self.metrics[0]

    def to_json(self) -> dict[str, object]:
        """The summary as JSON values; ``accuracy`` is the first figure."""
        return {
            "suite": self.settings.suite,
            "accuracy": self.headline.value,
            "metric": self.headline.name,
            "rule": self.headline.rule,
            "samples": self.samples,
            "skipped": self.skipped,
            "no_action": self.no_action,
            "limit": self.limit,
            "kv_kept_share": self.kept_share,
            "seconds": self.seconds,
            "metrics": [asdict(metric) for metric in self.metrics],
            "settings": self.settings.model_dump(mode="json"),
            "versions": installed_versions(),
            "problems": [asdict(problem) for problem in self.problems],
            "notes": list(self.notes),
            "published": [figure.model_dump(mode="json") for figure in self.published],
        }

    def write(self, directory: Path) -> None:
        """Write ``report.json`` and ``report.md``."""
        write_text(directory / "report.json", json.dumps(self.to_json(), indent=2) + "\n")
        write_text(directory / "report.md", self._markdown())

    def _markdown(self) -> str:
        parts = [f"# {self.settings.suite}, {self.settings.engine}", self.conditions()]
        parts.append(markdown_table(*metric_table(self.metrics)))
        if self.published:
            parts.append("Published by others, with their own code, prompts and machines:")
            rows = [published_row(figure) for figure in self.published]
            parts.append(markdown_table(PUBLISHED_HEADER, rows))
        left_out = [*self.notes, *map(str, self.problems)]
        if left_out:
            parts.append("Left out:\n\n" + "\n".join(f"* {line}" for line in left_out))
        return "\n\n".join(parts) + "\n"

    def conditions(self) -> str:
        """How the run was made and how much of the data set is in it, in a sentence."""
        kv = self.settings.kv
        mode = f" ({kv.mode})" if kv.method == "star_kv" else ""
        capacity = f", at most {kv.capacity} rows" if kv.capacity else ""
        limited = f", limited to the first {self.limit}" if self.limit else ""
        return (
            f"{self.samples} samples answered{limited}, {self.skipped} skipped, {self.no_action} "
            f"answers are no action; KV method {kv.method}{mode}, budget {kv.budget:.0%}{capacity}, "
            f"{self.kept_share:.1%} of the prompts' rows kept; prompt {self.settings.dialect}, "
            f"replies of up to {self.settings.max_new_tokens} tokens."
        )


def summarise(
    suite: Suite,
    settings: Settings,
    records: Sequence[Record],
    problems: Sequence[Problem],
    notes: Sequence[str],
    limit: int | None,
) -> Summary:
    """Put a run together.

    Args:
        suite: the data set.
        settings: of the run.
        records: at least one.
        problems: what could not be asked.
        notes: parts of the data set that are not there.
        limit: samples that were asked for.
    """
    stages = ("preprocess_ms", "vision_ms", "prefill_ms", "compress_ms", "decode_ms")
    budget = settings.kv.budget if settings.kv.capacity is None else -1.0
    return Summary(
        settings=settings,
        metrics=suite.summarise(records),
        samples=len(records),
        skipped=sum(problem.samples for problem in problems),
        no_action=sum(record.action is None for record in records),
        limit=limit,
        kept_share=sum(record.kv_tokens_kept / record.kv_tokens_full for record in records) / len(records),
        seconds=sum(record.timings.get(stage, 0.0) for record in records for stage in stages) / 1e3,
        problems=problems,
        notes=notes,
        published=published_for(suite.name, settings.engine, budget),
    )


def metric_table(metrics: Sequence[Metric]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows; with how far places are off where that is known."""
    rows = [metric_row(metric) for metric in metrics]
    if all(metric.distance is None for metric in metrics):
        return METRIC_HEADER, rows
    distances = ["–" if metric.distance is None else f"{metric.distance:.1f}" for metric in metrics]
    return (*METRIC_HEADER, DISTANCE), [(*row, far) for row, far in zip(rows, distances, strict=True)]


def metric_row(metric: Metric) -> tuple[str, ...]:
    """Cells under ``METRIC_HEADER``."""
    interval = ""
    if metric.low is not None and metric.high is not None and metric.count:
        interval = f"{metric.low:.1%}–{metric.high:.1%}"
    accuracy = f"{metric.value:.2%}" if metric.count else "–"
    return metric.name, metric.rule, accuracy, interval, str(metric.count)


def published_row(figure: Published) -> tuple[str, ...]:
    """Cells under ``PUBLISHED_HEADER``."""
    return figure.method, f"{figure.budget:.0%}", f"{figure.value:.2%}", figure.metric, figure.origin
