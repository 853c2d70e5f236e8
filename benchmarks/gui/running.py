# SPDX-License-Identifier: Apache-2.0
"""One run: a suite's questions, asked in order; it goes on where it was interrupted."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Protocol, TypeVar

from starkv.evaluation.records import AnyRecord, Identified, RecordFile
from starkv.synthetic import suite
from starkv.synthetic.samples import Sample

CLICK, TRAJECTORY = "click", "trajectory"
SUITES: dict[str, Callable[[str, int, int], Iterator[Sample]]] = {
    CLICK: suite.click_samples,
    TRAJECTORY: suite.trajectory_samples,
}
"""Name → split, seed, count → samples, those of a group one after the other."""


Answered = TypeVar("Answered", bound=Identified, covariant=True)


class Asks(Protocol[Answered]):
    """Asks one question after the other."""

    def forget(self) -> None:
        """Begin a new trajectory."""

    def ask(self, sample: Sample) -> Answered:
        """Ask a question, which goes on with the trajectory of those since :meth:`forget`."""


def trajectories(samples: Iterable[Sample], carries_memory: bool) -> Iterator[list[Sample]]:
    """Samples that STaR-KV takes for one trajectory.

    Args:
        samples: those of a group follow each other.
        carries_memory: a group is one; otherwise each sample stands alone.
    """
    for _, group in groupby(samples, key=lambda sample: sample.group if carries_memory else sample.id):
        yield list(group)


def run(
    samples: Iterable[Sample],
    carries_memory: bool,
    asker: Asks[AnyRecord],
    records: RecordFile[AnyRecord],
    on_answer: Callable[[int], None],
) -> None:
    """Ask what is not answered yet.

    What STaR-KV remembers of a trajectory is not written down, so one that was interrupted starts over.

    Args:
        samples: of the suite.
        carries_memory: see :func:`trajectories`.
        asker: has the engine.
        records: of this run so far; gets the new ones.
        on_answer: called with the number of samples that are answered now or were so before.

    Raises:
        StarkvError: the asker refuses a question.
    """
    for steps in trajectories(samples, carries_memory):
        known = {sample.id for sample in steps} & records.records.keys()
        if len(known) == len(steps):
            on_answer(len(steps))
            continue
        if known:
            records.keep(records.records.keys() - known)
        asker.forget()
        for sample in steps:
            records.add(asker.ask(sample))
            on_answer(1)
