# SPDX-License-Identifier: Apache-2.0
"""Two runs over the same samples: whose answers are right, and how often are they the same?"""

from collections.abc import Sequence
from dataclasses import dataclass

from starkv.evaluation.records import Record
from starkv.evaluation.statistics import paired_interval, wilson_interval


@dataclass(frozen=True)
class Comparison:
    """Answers of one run beside a reference's."""

    both: int
    """Samples that both got right."""
    lost: int
    """That the reference alone got right."""
    won: int
    """That the run alone got right."""
    neither: int
    same_replies: int
    """Answered with the very same text."""
    same_clicks: int
    """Answered with a place on the same pixel, or without one by both."""
    distance: float | None
    """Mean pixels from the run's places to the middles of the right boxes; None where it has no place."""

    @property
    def samples(self) -> int:
        return self.both + self.lost + self.won + self.neither

    @property
    def reference_right(self) -> int:
        return self.both + self.lost

    def measures(self) -> dict[str, float]:
        """Shares with their 95 % intervals: accuracy of both, and the run's less the reference's."""
        count = self.samples
        right, before = self.both + self.won, self.reference_right
        low, high = wilson_interval(right, count)
        before_low, before_high = wilson_interval(before, count)
        less, more = paired_interval(self.both, self.won, self.lost, self.neither)
        found = {
            "samples": float(count),
            "accuracy": right / count,
            "accuracy_low": low,
            "accuracy_high": high,
            "reference_accuracy": before / count,
            "reference_accuracy_low": before_low,
            "reference_accuracy_high": before_high,
            "difference": (right - before) / count,
            "difference_low": less,
            "difference_high": more,
            "clicks_lost": float(self.lost),
            "clicks_won": float(self.won),
            "same_replies": self.same_replies / count,
            "same_clicks": self.same_clicks / count,
        }
        return found if self.distance is None else found | {"distance": self.distance}


def compare(records: Sequence[Record], reference: Sequence[Record], rule: str) -> Comparison:
    """Compare the samples that both answered.

    Args:
        records: of the run.
        reference: of the other one.
        rule: by which a grade of 1 is right.

    Raises:
        ValueError: no sample was answered by both.
    """
    by_id = {record.id: record for record in reference}
    pairs = [(record, by_id[record.id]) for record in records if record.id in by_id]
    if not pairs:
        raise ValueError("no sample was answered by both runs")
    right = [(run.grades[rule] == 1.0, other.grades[rule] == 1.0) for run, other in pairs]
    distances = [run.distance for run, _ in pairs if run.distance is not None]
    return Comparison(
        both=right.count((True, True)),
        lost=right.count((False, True)),
        won=right.count((True, False)),
        neither=right.count((False, False)),
        same_replies=sum(run.reply == other.reply for run, other in pairs),
        same_clicks=sum(_pixel(run) == _pixel(other) for run, other in pairs),
        distance=sum(distances) / len(distances) if distances else None,
    )


def _pixel(record: Record) -> tuple[int, int] | None:
    return (round(record.point[0]), round(record.point[1])) if record.point else None
