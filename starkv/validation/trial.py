# SPDX-License-Identifier: Apache-2.0
"""One case that every implementation of an operator goes through, the same way for all operators."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from starkv.errors import StarkvError
from starkv.validation.implementations import Implementation
from starkv.validation.report import Check
from starkv.validation.timing import median_seconds

Operator = TypeVar("Operator")
Work = Callable[[], object]


@dataclass(frozen=True)
class Trial(Generic[Operator]):
    """A case, and how an implementation is compared with the reference on it."""

    subject: str
    """The operator's name."""
    case: str
    dtype: torch.dtype
    device: torch.device
    rows: int
    """Rows of the cache, by which emulations are too slow."""
    reference: Work
    """The reference's work on the case, to be timed."""
    compare: Callable[[Operator, Check], Check]
    """Runs an implementation and finishes the blank check."""
    repeatable: Callable[[Operator], Work]
    """The implementation's work on the case, to be timed."""

    def run(self, others: Iterable[tuple[Implementation, Operator | None]]) -> Iterator[Check]:
        """One check for each implementation that has the operator, or could have it if it ran here.

        Args:
            others: implementations, each with its operator.
        """
        reference_seconds = self._seconds(self.reference)
        for other, operator in others:
            dtype = str(self.dtype).removeprefix("torch.")
            blank = Check(self.subject, other.name, self.case, "skipped", dtype=dtype)
            if reason := other.why_not(self.rows):
                yield replace(blank, reason=reason)
            elif operator is not None:
                yield self._check(other, operator, blank, reference_seconds)

    def _check(
        self, other: Implementation, operator: Operator, blank: Check, reference_seconds: float
    ) -> Check:
        try:
            check = self.compare(operator, blank)
            if not other.timed:
                return check
            seconds = self._seconds(self.repeatable(operator))
        except StarkvError as error:
            return blank.finished([str(error)], {})
        times = {"seconds": seconds, "reference_seconds": reference_seconds}
        return replace(check, measures=check.measures | times)

    def _seconds(self, work: Work) -> float:
        # A GPU's runs vary little and cost little.
        runs = 20 if self.device.type == "cuda" else 3
        return median_seconds(work, self.device, runs, warm_up=1)
